"""Schedules of DINO as functions of the step; every one takes an int array and gives a float array of the same shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.config import ConfigDict

Array = jax.Array
Schedule = Callable[[Array], Array]


def cosine(start: float, end: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.0) -> Schedule:
    """Linear warm-up to `start`, then half a cosine towards `end`.

    Both ends of the warm-up are reached (so the peak occurs twice, at its end and at the cosine's start); the cosine's end
    is approached, and held from `steps` on.
    """

    def value(step: Array) -> Array:
        warmup = warmup_start + (start - warmup_start) * step / max(1, warmup_steps - 1)
        progress = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0, 1)
        decayed = end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warmup, decayed)

    return value


def epoch_linear(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> Schedule:
    """`warmup_epochs` values from `start` to `end`, one an epoch, then `end` (DINO's teacher temperature)."""

    def value(step: Array) -> Array:
        epoch = step // steps_per_epoch
        warmup = start + (end - start) * epoch / max(1, warmup_epochs - 1)
        return jnp.where(epoch < warmup_epochs, warmup, end)

    return value


def scaled_momentum(momentum: Array | float, config: ConfigDict) -> Array | float:
    """A momentum given for `method.momentum_batch_size` images, at this batch: m ^ (B / reference).

    An average then forgets as much with every image at any batch size (arXiv 2307.13813, the EMA scaling rule).
    """
    return momentum ** (config.train.batch_size / config.method.momentum_batch_size)


class Schedules(NamedTuple):
    """Everything that changes with the step."""

    learning_rate: Schedule
    weight_decay: Schedule
    teacher_momentum: Schedule
    teacher_temp: Schedule


def steps_per_epoch(config: ConfigDict, train_images: int) -> int:
    """Whole batches in an epoch; at least 1."""
    return max(1, train_images // config.train.batch_size)


def make_schedules(config: ConfigDict, train_images: int) -> Schedules:
    """The schedules of a resolved configuration."""
    epoch = steps_per_epoch(config, train_images)
    steps = total_steps(config, train_images)
    optim, method = config.optim, config.method
    momentum = cosine(method.teacher_momentum, method.teacher_momentum_end, steps)
    return Schedules(
        learning_rate=cosine(
            optim.lr * config.train.batch_size / 256,
            optim.min_lr,
            steps,
            warmup_steps=round(optim.warmup_epochs * epoch),
        ),
        weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, steps),
        teacher_momentum=lambda step: scaled_momentum(momentum(step), config),
        teacher_temp=epoch_linear(method.warmup_teacher_temp, method.teacher_temp, method.warmup_teacher_temp_epochs, epoch),
    )


def total_steps(config: ConfigDict, train_images: int) -> int:
    """Steps of the whole run; at least 1."""
    return max(1, round(config.train.epochs * steps_per_epoch(config, train_images)))
