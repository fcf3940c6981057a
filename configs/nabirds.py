"""CMD, its baselines and its released variant on NABirds: 555 categories of birds, 23,929 training and 24,633 test images.

    python -m cmd_jax.prepare nabirds --manual_dir=DIR
    python -m cmd_jax.main --config=configs/nabirds.py --workdir=runs/nabirds
    python -m cmd_jax.main --config=configs/nabirds.py:paper --workdir=runs/nabirds_paper

DIR holds the genuine archive nabirds.tar.gz (9 GB, from https://dl.allaboutbirds.org/nabirds after agreeing to its terms).

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
    config = fine_grained("configs/nabirds.py", preset)
    config.data.source = "nabirds"
    return config
