"""CMD on CUB-200-2011: 200 bird species, 5,994 training and 5,794 test images.

    python -m cmd_jax.main --config=configs/cub.py --config.data.manual_dir=DIR --workdir=runs/cub

DIR holds the genuine archive CUB_200_2011.tgz (1.1 GB, from https://data.caltech.edu/records/65de6-vp158); the first run
prepares it as ArrayRecord under --config.data.data_dir. ViT-S/16, batch 64, 300 epochs, from scratch. The paper starts
from a self-supervised checkpoint and trains Swin-T. Accuracy, time and memory of this configuration: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config import ConfigError, default


def get_config(preset: str = "") -> ConfigDict:
    if preset:
        raise ConfigError(f"configs/cub.py has no preset {preset!r}; leave it out")
    config = default()
    config.data.source = "cub"
    config.train.epochs = 300.0  # of the reference's training on fine-grained data
    config.train.checkpoint_every_epochs = 10.0
    config.eval.every_epochs = 50.0
    return config
