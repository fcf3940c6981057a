"""CMD on the embedded birds: 20 species, 2,000 training and 500 test images, minutes on two CPU cores.

    python -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo

Presets: "" (the demo), "smoke" (the same job in seconds: training, checkpoint and evaluation; too short to learn).
"""

from ml_collections import ConfigDict

from cmd_jax.config import ConfigError, default


def get_config(preset: str = "") -> ConfigDict:
    config = default()
    config.data.source = "synthetic_birds"
    config.data.canvas_px = 128
    config.data.decode_threads = 2
    # Colour and light are drawn independently of the species: without them the shapes of the parts are left to learn from.
    config.data.grayscale = True
    config.data.normalization = "local_contrast"

    config.model.name = "vit_micro"
    config.model.patch_size = 16
    config.model.drop_path = 0.0  # two blocks have none to spare

    config.head.prototypes = 512
    config.head.hidden_dim = 256
    config.head.bottleneck_dim = 64
    config.head.layers = 2
    config.head.batch_norm = True  # takes out what all images share, from the first step
    config.method.mil_hidden_dim = 64
    # A run of minutes is too short for moving centers: they lag, the teacher turns uniform and the features with it. Sinkhorn
    # solves for them on the batch, and KoLeo keeps the images apart meanwhile. Without the four terms of CMD, KoLeo alone
    # reaches 2 points of k-NN top-1 less.
    config.method.centering = "sinkhorn"
    config.method.teacher_temp = 0.01
    config.method.koleo_weight = 4.0

    config.views.global_px = 64
    config.views.global_scale = (0.3, 1.0)
    config.views.local_px = 32
    config.views.local_count = 0  # for time
    config.views.blur_sigma = (0.1, 0.6)  # 2 pixels of 224 are 0.6 of 64

    config.optim.lr = 8e-3  # 1e-3 at this batch
    config.optim.warmup_epochs = 1.0
    config.optim.weight_decay_end = 0.04
    config.optim.freeze_last_layer_epochs = 0.0
    config.train.batch_size = 32
    config.train.epochs = 14.0
    config.train.checkpoint_every_epochs = 5.0
    config.train.log_every_steps = 62  # an epoch
    config.eval.resize_px = 64  # the whole picture: birds fill it

    if preset == "smoke":
        config.train.batch_size = 16
        config.train.epochs = 0.1
        config.optim.warmup_epochs = 0.0
        config.train.log_every_steps = 5
    elif preset:
        raise ConfigError(f"configs/demo.py has no preset {preset!r}; use none or smoke")
    return config
