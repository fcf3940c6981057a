"""CMD on a folder of your own images.

    python -m cmd_jax.main --config=configs/folder.py:continue --config.init.weights=SOURCE --config.data.folder=PHOTOS \\
        --workdir=runs/photos

PHOTOS holds train/CLASS/* and test/CLASS/* (evaluated with k-NN and retrieval), or images at any depth without labels
(evaluated by label-free numbers alone). SOURCE is a pretrained ViT or Swin, for example hf:facebook/dinov2-small
(docs/pretrained.md).

Presets: "continue" (method cmd_relation, from pretrained weights at 224 px, for a GPU or TPU), "continue_small" (the same at
112 px, for two CPU cores); from random weights, with the method cmd_bag unless they say another: "" (ViT-S/16, the DINO recipe,
100 epochs; not measured), "small" (ViT-micro/8 at 48 px, for two CPU cores), "small_paper_objective" ("small" with the paper's
objective and scorer), "paper" (the paper's recipe, as in configs/cub.py: for a GPU or TPU; not measured).
"""

from ml_collections import ConfigDict

from cmd_jax.config import presets

SMALL = presets.TWO_CORES | {"data.canvas_px": 160}
PRESETS = {
    "": presets.MEASURED,
    "small": SMALL,
    "small_paper_objective": SMALL | presets.PAPER,
    "continue": presets.CONTINUE,
    "continue_small": presets.CONTINUE_SMALL,
    "paper": presets.PRESETS["paper"],
}


def get_config(preset: str = "") -> ConfigDict:
    return presets.choose(PRESETS, preset, {"data.source": "folder", "data.folder": ""})  # --config.data.folder=DIR
