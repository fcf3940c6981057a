"""CMD, its baselines and its released variant on NABirds: 555 categories of birds, 23,929 training and 24,633 test images.

    python -m cmd_jax.prepare nabirds --manual_dir=DIR
    python -m cmd_jax.main --config=configs/nabirds.py --workdir=runs/nabirds
    python -m cmd_jax.main --config=configs/nabirds.py:paper --workdir=runs/nabirds_paper

DIR holds the genuine archive nabirds.tar.gz (9 GB, from https://dl.allaboutbirds.org/nabirds after agreeing to its terms).

Presets: vit_s16 (the default), vit_s16_paper_objective, paper, released, esvit, dino, small (for two CPU cores); all their
values, beside the references' recipes, are in cmd_jax/config/presets.py.

The paper starts from a self-supervised checkpoint: --config.init.weights=PATH. Accuracy, time and memory: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    return fine_grained("nabirds", preset)
