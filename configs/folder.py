"""CMD on a folder of your own images.

    python -m cmd_jax.main --config=configs/folder.py --config.data.folder=PHOTOS --workdir=runs/photos

PHOTOS holds train/CLASS/* and test/CLASS/* (evaluated with k-NN and retrieval), or images at any depth without labels
(trained without evaluation). ViT-S/16 at 224 px wants a GPU or TPU; on a CPU use the preset:

    python -m cmd_jax.main --config=configs/folder.py:small --config.data.folder=PHOTOS --workdir=runs/photos

Presets: "" (ViT-S/16, the DINO recipe, 100 epochs; not measured), "small" (ViT-micro/8 at 64 px, for two CPU cores).
"""

from ml_collections import ConfigDict

from cmd_jax.config import ConfigError, default


def get_config(preset: str = "") -> ConfigDict:
    config = default()
    config.data.source = "folder"
    config.data.folder = ""  # --config.data.folder=DIR
    if preset == "small":
        small(config)
    elif preset:
        raise ConfigError(f"configs/folder.py has no preset {preset!r}; use none or small")
    return config


def small(config: ConfigDict) -> None:
    """Sizes for two CPU cores: minutes for a few thousand images."""
    config.model.name = "vit_micro"
    config.model.patch_size = 8
    config.model.drop_path = 0.0  # two blocks have none to spare
    config.data.canvas_px = 160
    config.views.global_px = 64
    config.views.local_px = 32
    config.views.local_count = 2
    config.views.blur_sigma = (0.1, 0.6)  # 2 pixels of 224 are 0.6 of 64
    config.head.hidden_dim = 256
    config.head.bottleneck_dim = 128
    config.head.layers = 2
    config.head.batch_norm = True  # as in the demo
    config.head.prototypes = 512
    config.optim.lr = 1.2e-3
    config.method.mil_hidden_dim = 64
