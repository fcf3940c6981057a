"""CMD, its baselines and its released variant on Stanford Cars: 196 models, 8,144 training and 8,041 test images.

    python -m cmd_jax.main --config=configs/cars.py --config.data.folder=DIR --workdir=runs/cars
    python -m cmd_jax.main --config=configs/cars.py:swin_t_w14 --config.data.folder=DIR --workdir=runs/cars_swin

DIR holds the images as train/MODEL/*.jpg and test/MODEL/*.jpg, by the official split.

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
    config = fine_grained("configs/cars.py", preset)
    config.data.source = "folder"
    config.data.folder = ""  # --config.data.folder=DIR
    return config
