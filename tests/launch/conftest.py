"""A home of its own: SkyPilot writes there when it is imported."""

import os
import shutil
import tempfile


def pytest_configure(config):
    config.home = os.environ["HOME"] = tempfile.mkdtemp(prefix="launch-")
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"


def pytest_unconfigure(config):
    shutil.rmtree(config.home, ignore_errors=True)
