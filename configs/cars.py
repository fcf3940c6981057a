"""CMD, its baselines and its released variant on Stanford Cars: 196 models, 8,144 training and 8,041 test images.

    python -m cmd_jax.prepare cars --manual_dir=DIR
    python -m cmd_jax.main --config=configs/cars.py:continue --config.init.weights=SOURCE --workdir=runs/cars
    python -m cmd_jax.main --config=configs/cars.py:paper --workdir=runs/cars_paper

DIR holds the genuine cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat, or car_ims.tgz and
cars_annos.mat. Their links at Stanford are dead: they must come from a copy.

Presets: continue (from pretrained weights, --config.init.weights=SOURCE: the first choice, docs/pretrained.md), continue_small
(the same for two CPU cores); from random weights vit_s16 (the default), vit_s16_paper_objective, paper, released, esvit, dino,
small (for two CPU cores). All their values, beside the references' recipes, are in cmd_jax/config/presets.py.

Accuracy, time and memory on the whole set: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    return fine_grained("cars", preset)
