"""The counts that a test records stand below the summary, from whatever process they come."""

import pytest


def pytest_collection_modifyitems(items):
    """Of several reads at once that fail, Orbax waits for the first alone; the others call back into a loop that is closed.

    That is said when they are collected, in whatever test of the process comes next. And two processes get half of the tests
    each: a long one at the start of either half, so that neither is left with one while the other has nothing to do.
    """
    long = [item for item in items if "kills" in item.name]
    others = [item for item in items if "kills" not in item.name]
    half = len(items) // 2
    items[:] = long[:1] + others[: half - 1] + long[1:] + others[half - 1 :]
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, counts in report.user_properties:
            terminalreporter.write_line(f"{name} {counts}")
