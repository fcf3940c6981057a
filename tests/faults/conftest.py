"""Runs that a test can interrupt. The counts that it records stand below the summary, from whatever process they come."""

import pytest

from tests.conftest import QUICK_FLAGS
from tests.faults.runs import TrainRun
from tests.programs import Programs


@pytest.fixture(scope="session")
def programs():
    """Every run here is compared with runs of the same compiler: it need not optimize."""
    with Programs(XLA_FLAGS=QUICK_FLAGS, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0") as programs:
        yield programs


@pytest.fixture
def start(programs, photo_folder, tmp_path):
    """(work directory, epochs, flags, folder of photos) -> TrainRun, a process of its own."""
    return lambda workdir, epochs, *flags, photos=photo_folder: TrainRun(programs, workdir, photos, tmp_path, epochs, *flags)


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
