"""CMD, its baselines and its released variant on NABirds: 555 categories of birds, 23,929 training and 24,633 test images.

    python -m cmd_jax.prepare nabirds --manual_dir=DIR
    python -m cmd_jax.main --config=configs/nabirds.py:continue --config.init.weights=SOURCE --workdir=runs/nabirds
    python -m cmd_jax.main --config=configs/nabirds.py:paper --workdir=runs/nabirds_paper

DIR holds the genuine archive nabirds.tar.gz (9 GB, from https://dl.allaboutbirds.org/nabirds after agreeing to its terms).

Presets: continue (from pretrained weights, --config.init.weights=SOURCE: the first choice, docs/pretrained.md), continue_small
(the same for two CPU cores); from random weights vit_s16 (the default), vit_s16_paper_objective, paper, released, esvit, dino,
small (for two CPU cores). All their values, beside the references' recipes, are in cmd_jax/config/presets.py.

Accuracy, time and memory on the whole set: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    return fine_grained("nabirds", preset)
