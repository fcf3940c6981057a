"""CMD on the embedded birds: 20 species, 2,000 training and 500 test images, minutes on two CPU cores.

    python -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo

Presets: "" (the demo, method cmd_bag), "paper_objective" (the same with the paper's objective and scorer), "smoke" (the same
job in seconds: training, checkpoint and evaluation; too short to learn).
"""

from ml_collections import ConfigDict

from cmd_jax.config import default
from cmd_jax.errors import ConfigError
from cmd_jax.presets import PAPER, two_cores


def get_config(preset: str = "") -> ConfigDict:
    config = default()
    config.data.source = "synthetic_birds"
    config.data.canvas_px = 128
    config.data.decode_threads = 2
    # Colour and light are drawn independently of the species: without them the shapes of the parts are left to learn from.
    config.data.grayscale = True
    config.data.normalization = "local_contrast"

    two_cores(config)
    config.train.epochs = 20.0
    config.train.checkpoint_every_epochs = 5.0
    config.train.log_every_steps = 62  # an epoch
    config.eval.resize_px = config.views.global_px  # the whole picture: birds fill it

    if preset == "smoke":
        config.train.batch_size = config.method.momentum_batch_size = 16
        config.views.local_count = 0  # their compilation is a tenth of its time
        config.train.epochs = 0.1
        config.optim.warmup_epochs = 0.0
        config.train.log_every_steps = 5
    elif preset == "paper_objective":
        config.update_from_flattened_dict(PAPER)
    elif preset:
        raise ConfigError(f"configs/demo.py has no preset {preset!r}; use none, paper_objective or smoke")
    return config
