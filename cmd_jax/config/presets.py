"""Values that files in `configs/` share: presets of the fine-grained datasets, and sizes for two CPU cores.

"continue" and "continue_small" train cmd_relation from pretrained weights (--config.init.weights=SOURCE) with the recipe of
config/recipe.py (docs/pretrained.md); the latter has 112 px and fewer views, for two CPU cores. "small" starts from random
weights on two cores: TWO_CORES for 20 epochs. The others train 300 epochs, as the reference does on fine-grained data, with 2
global views of 224 px and 8 local ones of 96 px, AdamW at 5e-4 for a batch of 256, weight decay 0.04 -> 0.4, 10 epochs of
warm-up, clipping at 3, drop path 0.1; not measured.

    preset                   model          method     batch  prototypes  teacher temperature        momentum  last layer
    vit_s16                  ViT-S/16       cmd_bag    open   by data     by data                    by data   unit rows
    vit_s16_paper_objective  ViT-S/16       cmd        open   by data     by data                    by data   unit rows
    paper                    Swin-T, w 14   cmd        8      65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    released                 Swin-T, w 14   released   8      65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    esvit                    Swin-T, w 7    esvit      open   65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    dino                     ViT-S/16       dino       open   65,536      0.04                       0.996     unit rows

An open batch is 64 images a GPU or TPU chip, at most 1,024 in all, and 64 on a CPU (`default_batch_size`). The momentum is
given for 64 images, for 8 in "paper" and "released": at 1,024 it becomes 0.996 ^ 16 = 0.938, the same average per image. DINO
has 0.996 at 1,024 images of ImageNet; for exactly that set method.momentum_batch_size=1024.

The references' recipes: DINO trains 100 epochs of ImageNet at 64 images a GPU. EsViT trains 300 epochs at 16 GPUs x 32 images.
CMD (`train_nfg.bat`) trains Swin-T with window 14 for 300 epochs at 2 GPUs x 4 images, a peak learning rate of 1.56e-5, from
a self-supervised checkpoint, and evaluates after 270 (of NABirds after 90). The learning rate here scales with the batch, as
theirs does; give a checkpoint to start from with --config.init.weights=PATH.

"paper" is the paper's recipe, whatever the size of the data. It differs from what the authors ran in:

- the objective, which is our reading of the paper's equations (docs/method.md); "released" trains what their code computes;
- the start: random weights, where they take a self-supervised checkpoint of Swin-T with window 14 (--config.init.weights=PATH);
- values that the paper and its code leave open: lambda is 1, the MIL softmax has temperature 1, its scorer 128 hidden units;
- the evaluated teacher, which is that of the last epoch;
- precision: model.dtype, where they train in float16;
- linear layers start from 1/sqrt(fan-in), theirs from a standard deviation of 0.02;
- the linear probe, whose learning rate is chosen on held-out training images (docs/evaluation.md).

Another batch, --config.train.batch_size=64 for example, keeps the recipe: learning rate and momenta are given for their batch
and follow it.
"""

from typing import Any

from ml_collections import ConfigDict

from cmd_jax.config.keys import EVAL_PROTOCOLS, default
from cmd_jax.config.recipe import FROM_SCRATCH, WARMUP_EPOCHS
from cmd_jax.errors import ConfigError

# Objective and scorer, in any recipe: what is best by measurement on small data (docs/results.md), and the paper's.
MEASURED = {"method.name": "cmd_bag", "method.mil_scorer": "class_token", "method.mil_temp": 2.0}
PAPER = {"method.name": "cmd", "method.mil_scorer": "gated", "method.mil_temp": 1.0}

# Views, heads and teacher for a few thousand images, as measured (docs/results.md).
FEW_IMAGES = {
    # Milder views than the references': with theirs and 256 prototypes DINO's loss was still near that of the uniform
    # distribution after 900 steps of 64 images (docs/results.md).
    "views.global_scale": (0.5, 1.0),
    "views.local_scale": (0.15, 0.4),
    "views.global_blur_prob": (0.0, 0.0),
    "views.local_blur_prob": 0.0,
    "views.global_solarize_prob": (0.0, 0.0),
    "head.prototypes": 64,
    "head.hidden_dim": 256,
    "head.bottleneck_dim": 64,
    "head.layers": 2,
    "head.batch_norm": True,  # takes out what all images share, from the first step
    "method.mil_hidden_dim": 64,  # of the learned scorers
    "method.centering": "sinkhorn",  # moving centers had gradients with peaks of 60 and more
    "method.teacher_temp": 0.01,
    "method.teacher_momentum_end": 0.99,  # the last steps of a short run count too
    "method.koleo_weight": 0.1,
}
# Many small steps: there are few images.
SMALL_BATCHES = {"train.batch_size": 32, "method.momentum_batch_size": 32}

# Minutes for a few thousand images at 48 px on two CPU cores; docs/results.md has what was measured.
TWO_CORES = {
    **MEASURED,
    **FEW_IMAGES,
    **SMALL_BATCHES,
    "model.name": "vit_micro",
    "model.patch_size": 8,
    "model.drop_path": 0.0,  # two blocks have none to spare
    "model.dtype": "float32",  # as measured, on any device: so small a network gains nothing from bfloat16
    "views.global_px": 48,
    "views.local_px": 24,
    "views.local_count": 2,  # for time
    "optim.lr": 16e-3,  # 2e-3 at this batch
    "optim.warmup_epochs": 1.0,
    "optim.weight_decay_end": 0.04,
    "optim.freeze_last_layer_epochs": 0.0,
}

# Of all presets but "small" and those that continue.
LONG = {
    "train.epochs": 300.0,
    "train.checkpoint_every_epochs": 10.0,
    "eval.every_epochs": 50.0,
    "eval.protocols": EVAL_PROTOCOLS,  # with the references' linear probe, minutes on a GPU
}
VIT_S16 = LONG | {"model.name": "vit_small", "model.patch_size": 16}
# What the defaults would otherwise fit to a small dataset, or to weights that a run starts from.
REFERENCE = {
    **FROM_SCRATCH,
    "optim.warmup_epochs": WARMUP_EPOCHS,
    **LONG,
    "head.prototypes": 65_536,
    "method.teacher_temp": 0.04,
    "method.warmup_teacher_temp": 0.04,
    "method.teacher_momentum": 0.996,
}
# Swin-T with EsViT's heads and teacher, which CMD took over.
ESVIT = REFERENCE | {
    "model.name": "swin_tiny",
    "head.norm_last_layer": False,
    "method.teacher_temp": 0.07,
    "method.warmup_teacher_temp_epochs": 30,
}
# Backbone and batch of the authors' training script, `train_nfg.bat`: 2 GPUs x 4 images.
AUTHORS = ESVIT | {"model.window": 14, "train.batch_size": 8, "method.momentum_batch_size": 8}

# From pretrained weights, which say what the backbone is; the recipe is that of config/recipe.py.
CONTINUE = MEASURED | FEW_IMAGES | {"method.name": "cmd_relation", "method.mil_temp": 1.0, "init.weights": ""}  # to be given
# The same on two CPU cores.
CONTINUE_SMALL = {
    **CONTINUE,
    **SMALL_BATCHES,
    "views.global_px": 112,  # local views follow, in whole patches
    "views.local_count": 2,
    "data.canvas_px": 224,
    "model.product_dtype": "bfloat16",
}

PRESETS: dict[str, dict[str, Any]] = {
    "vit_s16": VIT_S16 | MEASURED,
    "vit_s16_paper_objective": VIT_S16 | PAPER,
    "paper": AUTHORS | PAPER | {"eval.features": "mean"},  # our reading; features as the reference evaluates
    "released": AUTHORS | {"method.name": "released"},  # the authors' own code (cmd_jax/method/released.py)
    "esvit": ESVIT | {"method.name": "esvit"},
    "dino": VIT_S16 | REFERENCE | {"method.name": "dino"},
    "continue": CONTINUE,
    "continue_small": CONTINUE_SMALL,
    "small": TWO_CORES  # for a first look on a CPU
    | {
        "data.canvas_px": 160,
        "train.epochs": 20.0,
        "train.checkpoint_every_epochs": 5.0,
        "eval.every_epochs": 0.0,
    },
}


def choose(presets: dict[str, dict[str, Any]], preset: str, common: dict[str, Any] | None = None) -> ConfigDict:
    """The default configuration with the values of a preset.

    Args:
        presets: values by name and key.
        preset: a name.
        common: values of all presets, which a preset may change.

    Raises:
        ConfigError: the preset is unknown.
    """
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r}; use {', '.join(filter(None, presets))}, or none")
    config = default()
    config.update_from_flattened_dict((common or {}) | presets[preset])
    return config


def fine_grained(source: str, preset: str) -> ConfigDict:
    """The configuration of a fine-grained dataset.

    Args:
        source: value of `data.source`.
        preset: one of PRESETS; "" is vit_s16.

    Raises:
        ConfigError: the preset is unknown.
    """
    return choose(PRESETS, preset or "vit_s16", {"data.source": source})
