"""CMD, its baselines and its released variant on FGVC-Aircraft: 100 variants, 6,667 training and 3,333 test images.

    python -m cmd_jax.prepare aircraft --manual_dir=DIR
    python -m cmd_jax.main --config=configs/aircraft.py:continue --config.init.weights=SOURCE --workdir=runs/aircraft
    python -m cmd_jax.main --config=configs/aircraft.py:paper --workdir=runs/aircraft_paper

DIR holds the genuine archive fgvc-aircraft-2013b.tar.gz (2.75 GB, from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft), or
is where `prepare` puts it.

Presets: continue (from pretrained weights, --config.init.weights=SOURCE: the first choice, docs/pretrained.md), continue_small
(the same for two CPU cores); from random weights vit_s16 (the default), vit_s16_paper_objective, paper, released, esvit, dino,
small (for two CPU cores). All their values, beside the references' recipes, are in cmd_jax/config/presets.py.

Beside them: family and manufacturer are vit_s16, evaluated on these coarser labels (70 and 30 classes). Any preset takes them
with --config.data.source=aircraft/family or aircraft/manufacturer.

Accuracy, time and memory on the whole set: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    if preset in ("family", "manufacturer"):
        return fine_grained(f"aircraft/{preset}", "")
    return fine_grained("aircraft", preset)
