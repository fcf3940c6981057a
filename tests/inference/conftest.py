"""What the tests of features share: the finished run, loaded once, and once exported as one file."""

import pytest

from cmd_jax.inference.export import export_run
from cmd_jax.inference.load import read_trained


@pytest.fixture(scope="session")
def trained(finished):
    return read_trained(str(finished[0]))


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """Path of our own file of the finished run's teacher."""
    path = tmp_path_factory.mktemp("export") / "tiny.safetensors"
    export_run(str(finished[0]), None, "teacher", "safetensors", str(path))
    return path
