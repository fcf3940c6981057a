"""CMD, its baselines and its released variant on FGVC-Aircraft: 100 variants, 6,667 training and 3,333 test images.

    python -m cmd_jax.prepare aircraft --manual_dir=DIR
    python -m cmd_jax.main --config=configs/aircraft.py --workdir=runs/aircraft
    python -m cmd_jax.main --config=configs/aircraft.py:paper --workdir=runs/aircraft_paper

DIR holds the genuine archive fgvc-aircraft-2013b.tar.gz (2.75 GB, from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft), or
is where `prepare` puts it.

Presets, all of 300 epochs but the last; cmd_jax/presets.py has their values beside the references' recipes:

    vit_s16     CMD as measured best on small data (method cmd_bag), ViT-S/16 (the default)
    vit_s16_paper_objective
                the same with the paper's objective and scorer
    paper       the paper's recipe: its objective as we read it, Swin-T with window 14, batch 8
    released    the same with what the authors' released code computes
    esvit       EsViT, Swin-T with window 7
    dino        DINO, ViT-S/16
    small       CMD, ViT-micro at 48 px, batch 32, 20 epochs: for two CPU cores
    family, manufacturer
                the default, evaluated on these coarser labels (70 and 30 classes)

Any preset takes them with --config.data.source=aircraft/family or aircraft/manufacturer.

The paper starts from a self-supervised checkpoint: --config.init.weights=PATH. Accuracy, time and memory: not measured.
"""

from ml_collections import ConfigDict

from cmd_jax.presets import fine_grained


def get_config(preset: str = "") -> ConfigDict:
    coarser = preset in ("family", "manufacturer")
    config = fine_grained("configs/aircraft.py", "" if coarser else preset)
    config.data.source = f"aircraft/{preset}" if coarser else "aircraft"
    return config
