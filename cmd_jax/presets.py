"""Presets that configurations share: those of fine-grained data sets, and a size for two CPU cores (`two_cores`).

The former but "small" train 300 epochs, as the reference does on fine-grained data, with 2 global views of 224 px and 8 local
ones of 96 px, AdamW at 5e-4 for a batch of 256, weight decay 0.04 -> 0.4, 10 epochs of warm-up, clipping at 3, drop path 0.1.
"small" is `two_cores` for 20 epochs. Accuracy, time and memory: not measured.

    preset                   model          method     batch  prototypes  teacher temperature        momentum  last layer
    vit_s16                  ViT-S/16       cmd_bag    open   by data     by data                    by data   unit rows
    vit_s16_paper_objective  ViT-S/16       cmd        open   by data     by data                    by data   unit rows
    paper                    Swin-T, w 14   cmd        8      65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    released                 Swin-T, w 14   released   8      65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    esvit                    Swin-T, w 7    esvit      open   65,536      0.04 -> 0.07, 30 epochs    0.996     learned gain
    dino                     ViT-S/16       dino       open   65,536      0.04                       0.996     unit rows

An open batch is 64 images a GPU or TPU chip, at most 1,024 in all, and 64 on a CPU (cmd_jax/hardware.py). The momentum is given
for 64 images, for 8 in "paper" and "released": at 1,024 it becomes 0.996 ^ 16 = 0.938, the same average per image. DINO has
0.996 at 1,024 images of ImageNet; for exactly that set method.momentum_batch_size=1024.

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

from ml_collections import ConfigDict

from cmd_jax.config import EVAL_PROTOCOLS, default
from cmd_jax.errors import ConfigError

# Objective and scorer, in any recipe: what is best by measurement on small data (docs/results.md), and the paper's.
MEASURED = {"method.name": "cmd_bag", "method.mil_scorer": "class_token", "method.mil_temp": 2.0}
PAPER = {"method.name": "cmd", "method.mil_scorer": "gated", "method.mil_temp": 1.0}


def fine_grained(file: str, preset: str) -> ConfigDict:
    """The configuration of a preset, without its data.

    Args:
        file: of the configuration, for the message.
        preset: a key of PRESETS; "" is vit_s16.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset and preset not in PRESETS:
        raise ConfigError(f"{file} has no preset {preset!r}; use {', '.join(PRESETS)}, or none, which is vit_s16")
    config = default()
    config.train.epochs = 300.0
    config.train.checkpoint_every_epochs = 10.0
    config.eval.every_epochs = 50.0
    config.eval.protocols = EVAL_PROTOCOLS  # with the references' linear probe, minutes on a GPU
    PRESETS[preset or "vit_s16"](config)
    return config


def two_cores(config: ConfigDict) -> None:
    """CMD at a size for two CPU cores: minutes for a few thousand images at 48 px. docs/results.md has what was measured."""
    config.model.name, config.model.patch_size = "vit_micro", 8
    config.model.drop_path = 0.0  # two blocks have none to spare
    config.model.dtype = "float32"  # as measured, on any device: so small a network gains nothing from bfloat16
    config.views.global_px, config.views.local_px = 48, 24
    config.views.local_count = 2  # for time
    # Milder views than the references': with theirs and 256 prototypes DINO's loss was still near that of the uniform
    # distribution after 900 steps of 64 images (docs/results.md).
    config.views.global_scale, config.views.local_scale = (0.5, 1.0), (0.15, 0.4)
    config.views.global_blur_prob, config.views.local_blur_prob = (0.0, 0.0), 0.0
    config.views.global_solarize_prob = (0.0, 0.0)
    config.head.prototypes, config.head.hidden_dim, config.head.bottleneck_dim, config.head.layers = 64, 256, 64, 2
    config.head.batch_norm = True  # takes out what all images share, from the first step
    config.update_from_flattened_dict(MEASURED)
    config.method.mil_hidden_dim = 64  # of the learned scorers
    config.method.centering = "sinkhorn"  # moving centers had gradients with peaks of 60 and more
    config.method.teacher_temp = 0.01
    config.method.teacher_momentum_end = 0.99  # the last steps of a short run count too
    config.method.koleo_weight = 0.1
    # Many small steps: there are few images.
    config.train.batch_size = config.method.momentum_batch_size = 32
    config.optim.lr = 16e-3  # 2e-3 at this batch
    config.optim.warmup_epochs = 1.0
    config.optim.weight_decay_end = 0.04
    config.optim.freeze_last_layer_epochs = 0.0


def _vit_s16(config: ConfigDict) -> None:
    config.update_from_flattened_dict(MEASURED)
    config.model.name, config.model.patch_size = "vit_small", 16


def _vit_s16_paper_objective(config: ConfigDict) -> None:
    _vit_s16(config)
    config.update_from_flattened_dict(PAPER)


def _paper(config: ConfigDict) -> None:
    """What the paper trains, on our reading of its objective."""
    config.update_from_flattened_dict(PAPER)
    _authors_recipe(config)
    config.eval.features = "mean"  # as the reference evaluates


def _dino(config: ConfigDict) -> None:
    config.method.name = "dino"
    config.model.name, config.model.patch_size = "vit_small", 16
    _reference_teacher(config)


def _esvit(config: ConfigDict) -> None:
    config.method.name = "esvit"
    _esvit_recipe(config)


def _released(config: ConfigDict) -> None:
    """The authors' own code; cmd_jax/method/released.py says what it computes."""
    config.method.name = "released"
    _authors_recipe(config)


def _authors_recipe(config: ConfigDict) -> None:
    """Backbone and batch of the authors' training script, `train_nfg.bat`."""
    _esvit_recipe(config)
    config.model.window = 14
    config.train.batch_size = config.method.momentum_batch_size = 8  # 2 GPUs x 4 images


def _esvit_recipe(config: ConfigDict) -> None:
    """Swin-T with EsViT's heads and teacher, which CMD took over."""
    config.model.name = "swin_tiny"
    config.head.norm_last_layer = False
    _reference_teacher(config)
    config.method.teacher_temp = 0.07
    config.method.warmup_teacher_temp_epochs = 30


def _reference_teacher(config: ConfigDict) -> None:
    """What the defaults would otherwise fit to a small data set."""
    config.head.prototypes = 65_536
    config.method.teacher_temp = config.method.warmup_teacher_temp = 0.04
    config.method.teacher_momentum = 0.996


def _small(config: ConfigDict) -> None:
    """For a first look on a CPU."""
    two_cores(config)
    config.data.canvas_px = 160
    config.train.epochs = 20.0
    config.train.checkpoint_every_epochs = 5.0
    config.eval.every_epochs = 0.0
    config.eval.protocols = tuple(name for name in EVAL_PROTOCOLS if name != "linear")


PRESETS = {
    "vit_s16": _vit_s16,
    "vit_s16_paper_objective": _vit_s16_paper_objective,
    "paper": _paper,
    "released": _released,
    "esvit": _esvit,
    "dino": _dino,
    "small": _small,
}
