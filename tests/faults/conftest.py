"""The counts that a test records stand below the summary, from whatever process they come."""


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, counts in report.user_properties:
            terminalreporter.write_line(f"{name} {counts}")
