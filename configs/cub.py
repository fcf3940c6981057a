"""CMD, its baselines and its released variant on CUB-200-2011: 200 bird species, 5,994 training and 5,794 test images.

    python -m cmd_jax.prepare cub --manual_dir=DIR
    python -m cmd_jax.main --config=configs/cub.py --workdir=runs/cub
    python -m cmd_jax.main --config=configs/cub.py:paper --workdir=runs/cub_paper

DIR holds the genuine archive CUB_200_2011.tgz (1.1 GB, from https://data.caltech.edu/records/65de6-vp158), or is where
`prepare` puts it.

Presets, all of 300 epochs but the last; cmd_jax/presets.py has their values beside the references' recipes:

    vit_s16     CMD as measured best on small data (method cmd_bag), ViT-S/16 (the default)
    vit_s16_paper_objective
                the same with the paper's objective and scorer
    paper       the paper's recipe: its objective as we read it, Swin-T with window 14, batch 8
    released    the same with what the authors' released code computes
    esvit       EsViT, Swin-T with window 7
    dino        DINO, ViT-S/16
    small       CMD, ViT-micro at 48 px, batch 32, 20 epochs: for two CPU cores

The paper starts from a self-supervised checkpoint: --config.init.weights=PATH. Accuracy, time and memory: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    config = fine_grained("configs/cub.py", preset)
    config.data.source = "cub"
    return config
