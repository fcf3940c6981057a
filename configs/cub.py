"""CMD, its baselines and its released variant on CUB-200-2011: 200 bird species, 5,994 training and 5,794 test images.

    python -m cmd_jax.prepare cub --manual_dir=DIR
    python -m cmd_jax.main --config=configs/cub.py:continue --config.init.weights=SOURCE --workdir=runs/cub
    python -m cmd_jax.main --config=configs/cub.py:paper --workdir=runs/cub_paper

DIR holds the genuine archive CUB_200_2011.tgz (1.1 GB, from https://data.caltech.edu/records/65de6-vp158), or is where
`prepare` puts it.

Presets: continue (from pretrained weights, --config.init.weights=SOURCE: the first choice, docs/pretrained.md), continue_small
(the same for two CPU cores); from random weights vit_s16 (the default), vit_s16_paper_objective, paper, released, esvit, dino,
small (for two CPU cores). All their values, beside the references' recipes, are in cmd_jax/config/presets.py.

Accuracy, time and memory on the whole set: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    return fine_grained("cub", preset)
