"""CMD, its baselines and its released variant on Stanford Cars: 196 models, 8,144 training and 8,041 test images.

    python -m cmd_jax.prepare cars --manual_dir=DIR
    python -m cmd_jax.main --config=configs/cars.py --workdir=runs/cars
    python -m cmd_jax.main --config=configs/cars.py:paper --workdir=runs/cars_paper

DIR holds the genuine cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat, or car_ims.tgz and
cars_annos.mat. Their links at Stanford are dead: they must come from a copy.

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
    config = fine_grained("configs/cars.py", preset)
    config.data.source = "cars"
    return config
