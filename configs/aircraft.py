"""CMD, its baselines and its released variant on FGVC-Aircraft: 100 variants, 6,667 training and 3,333 test images.

    python -m cmd_jax.main --config=configs/aircraft.py --config.data.folder=DIR --workdir=runs/aircraft
    python -m cmd_jax.main --config=configs/aircraft.py:swin_t_w14 --config.data.folder=DIR --workdir=runs/aircraft_swin

DIR holds the images as train/VARIANT/*.jpg (the official "trainval" list) and test/VARIANT/*.jpg.

Presets, all of 300 epochs; cmd_jax/presets.py has their values beside the references' recipes:

    vit_s16     CMD, ViT-S/16, batch 64 (the default)
    swin_t_w14  CMD as the paper trains it, Swin-T with window 14, batch 64
    dino        DINO, ViT-S/16, batch 64
    esvit       EsViT, Swin-T with window 7, batch 64
    released    what the authors' released code computes, Swin-T with window 14, batch 8 as theirs

The paper starts from a self-supervised checkpoint: --config.init.weights=PATH. Accuracy, time and memory: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    config = fine_grained("configs/aircraft.py", preset)
    config.data.source = "folder"
    config.data.folder = ""  # --config.data.folder=DIR
    return config
