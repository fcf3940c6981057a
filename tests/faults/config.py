"""Of the runs that are killed: steps of milliseconds, with a checkpoint every third and an evaluation every sixth."""

from ml_collections import ConfigDict

from tests.conftest import tiny


def get_config() -> ConfigDict:
    config = tiny()
    config.data.source = "folder"
    config.eval.every_epochs = 2.0
    return config
