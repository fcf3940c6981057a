"""Of runs that tests of this folder start."""

import pytest


@pytest.fixture
def config(tiny_config, photo_folder):
    """Six steps: 24 images, batches of 8, 2 epochs."""
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    return tiny_config
