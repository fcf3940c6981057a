"""The counts that a test records stand below the summary, from whatever process they come."""

import pytest


def pytest_collection_modifyitems(items):
    """Of several reads at once that fail, Orbax waits for the first alone; the others call back into a loop that is closed.

    That is said when they are collected, in whatever test of the process comes next.
    """
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, counts in report.user_properties:
            terminalreporter.write_line(f"{name} {counts}")
