"""CMD on a folder of your own images.

    python -m cmd_jax.main --config=configs/folder.py --config.data.folder=PHOTOS --workdir=runs/photos

PHOTOS holds train/CLASS/* and test/CLASS/* (evaluated with k-NN and retrieval), or images at any depth without labels
(evaluated by label-free numbers alone). ViT-S/16 at 224 px wants a GPU or TPU; on a CPU use the preset:

    python -m cmd_jax.main --config=configs/folder.py:small --config.data.folder=PHOTOS --workdir=runs/photos

Presets: "" (ViT-S/16, the DINO recipe, 100 epochs; not measured), "small" (ViT-micro/8 at 48 px, for two CPU cores), both
with the method cmd_bag; "small_paper_objective" ("small" with the paper's objective and scorer); "paper" (the paper's recipe,
as in configs/cub.py: for a GPU or TPU; not measured).
"""

from ml_collections import ConfigDict

from cmd_jax.config import default
from cmd_jax.errors import ConfigError
from cmd_jax.presets import MEASURED, PAPER, fine_grained, two_cores


def get_config(preset: str = "") -> ConfigDict:
    config = default()
    if preset in ("small", "small_paper_objective"):
        two_cores(config)
        config.data.canvas_px = 160
        if preset == "small_paper_objective":
            config.update_from_flattened_dict(PAPER)
    elif preset == "paper":
        config = fine_grained("configs/folder.py", preset)
    elif not preset:
        config.update_from_flattened_dict(MEASURED)
    else:
        raise ConfigError(f"configs/folder.py has no preset {preset!r}; use none, small, small_paper_objective or paper")
    config.data.source = "folder"
    config.data.folder = ""  # --config.data.folder=DIR
    return config
