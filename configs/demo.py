"""CMD on the embedded birds: 20 species, 2,000 training and 500 test images, minutes on two CPU cores.

    python -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo

Presets: "" (the demo, method cmd_bag), "paper_objective" (the same with the paper's objective and scorer), "smoke" (the same
job in seconds: training, checkpoint and evaluation; too short to learn).
"""

from ml_collections import ConfigDict

from cmd_jax.config.presets import PAPER, TWO_CORES, choose

DEMO = TWO_CORES | {
    "data.source": "synthetic_birds",
    "data.canvas_px": 128,
    "data.decode_threads": 2,
    # Colour and light are drawn independently of the species: without them the shapes of the parts are left to learn from.
    "data.grayscale": True,
    "data.normalization": "local_contrast",
    "train.epochs": 20.0,
    "train.checkpoint_every_epochs": 5.0,
    "train.log_every_steps": 62,  # an epoch
    "eval.resize_px": TWO_CORES["views.global_px"],  # the whole picture: birds fill it
}
PRESETS = {
    "": {},
    "paper_objective": PAPER,
    "smoke": {
        "train.batch_size": 16,
        "method.momentum_batch_size": 16,
        "views.local_count": 0,  # their compilation is a tenth of its time
        "train.epochs": 0.1,
        "optim.warmup_epochs": 0.0,
        "train.log_every_steps": 5,
    },
}


def get_config(preset: str = "") -> ConfigDict:
    return choose(PRESETS, preset, DEMO)
