"""Values of a run that its start decides: from random weights, or from those of `init.weights`.

A pretrained backbone knows much that a few thousand photos do not teach, and a new head knows nothing. So the heads learn alone
at first, the learning rate is low and falls towards the input, and the run is short; docs/pretrained.md has the reasons and
docs/results.md what was measured.
"""

from typing import Any

# DINO's.
FROM_SCRATCH = {
    "model.drop_path": 0.1,
    "optim.lr": 5e-4,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.layer_decay": 1.0,
    "optim.freeze_backbone_epochs": 0.0,
    "optim.freeze_last_layer_epochs": 1.0,
    "train.epochs": 100.0,
    "train.checkpoint_every_epochs": 10.0,
}
WARMUP_EPOCHS = 10.0  # or a tenth of a shorter run

CONTINUED = {
    "model.drop_path": 0.1,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.04,
    "optim.layer_decay": 0.9,
    "optim.freeze_last_layer_epochs": 0.0,  # the backbone rests meanwhile
    "method.teacher_momentum": 0.996,
}
# Measured on a ViT-Ti; wider layers take smaller steps (arXiv 2203.03466).
LEARNING_RATE, OF_WIDTH = 5e-3, 192
# A run of 600 photos sees each 10 times, one of 1,500 or more 4 times.
IMAGES_SEEN, FEWEST_EPOCHS, MOST_EPOCHS = 6_000, 4, 40
CANDIDATES = 4  # steps after the start of which the best is the result


def recipe(continued: bool, width: int, train_images: int, epochs: float | None) -> dict[str, Any]:
    """The values by key.

    Args:
        continued: whether the run starts from weights.
        width: channels of the backbone's last block.
        train_images: number of training images.
        epochs: `train.epochs` if it is given.
    """
    if not continued:
        epochs = epochs or FROM_SCRATCH["train.epochs"]
        return FROM_SCRATCH | {"optim.warmup_epochs": WARMUP_EPOCHS if epochs >= WARMUP_EPOCHS else epochs / 10}
    epochs = epochs or float(min(max(round(IMAGES_SEEN / max(1, train_images)), FEWEST_EPOCHS), MOST_EPOCHS))
    return CONTINUED | {
        "optim.lr": LEARNING_RATE * OF_WIDTH / width,
        "train.epochs": epochs,
        "train.checkpoint_every_epochs": epochs / CANDIDATES,
        "optim.warmup_epochs": epochs / 8,
        "optim.freeze_backbone_epochs": epochs / 16,
    }
