"""Training health: steps that are not finite, and collapse of the teacher."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.config import ConfigDict
from cmd_jax.errors import NonFinite
from cmd_jax.method import mil
from cmd_jax.training.schedules import steps_per_epoch, total_steps

Array = jax.Array

BAD_STEPS_LIMIT = 3  # in a row; a single one may be caused by one batch


class BadSteps(NamedTuple):
    """Steps that were left out because loss or gradient were not finite: up to now without a break, and of the whole run."""

    in_row: Array  # [] int32
    total: Array  # [] int32


def is_finite(loss: Array, grad_norm: Array) -> Array:
    """[] bool: whether a step may change the state."""
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def count_bad(before: BadSteps, good: Array) -> BadSteps:
    """The counts after a step."""
    bad = jnp.logical_not(good).astype(jnp.int32)
    return BadSteps(bad * (before.in_row + 1), before.total + bad)


def read_bad_step(step: int, metrics: dict[str, float], checkpoints: list[int]) -> str:
    """The warning about a step that was left out because it was not finite.

    Args:
        step: number of steps done, with this one.
        metrics: of the step.
        checkpoints: steps on disk, ascending.

    Raises:
        NonFinite: it is the last of BAD_STEPS_LIMIT in a row.
    """
    in_row = int(metrics["bad_steps_in_row"])
    numbers = (
        f"loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g} at learning rate {metrics['learning_rate']:.2g}"
    )
    if in_row < BAD_STEPS_LIMIT:
        return f"step {step}: {numbers}; the step was left out, {in_row} in a row ({BAD_STEPS_LIMIT} stop the run)"
    newest = f"the newest checkpoint is step {checkpoints[-1]}" if checkpoints else "there is no checkpoint"
    raise NonFinite(
        f"steps {step - in_row + 1} to {step}: {numbers}; {in_row} in a row were left out, the last good step is "
        f"{step - in_row}, {newest}; lower optim.lr or optim.clip_grad, in config.json too, and run again"
    )


def relative_entropy(entropy: Array, prototypes: int) -> Array:
    """Mean of entropies of distributions over K prototypes, over log K: 1 is uniform, 0 one-hot.

    Args:
        entropy: [...] nats.
        prototypes: K.
    """
    return jnp.mean(entropy) / jnp.log(prototypes)


def feature_std(embedding: Array) -> Array:
    """Standard deviation over the batch of l2-normalised features, times sqrt(D): 1 is isotropic, 0 constant (collapse).

    Args:
        embedding: [B, D].
    """
    unit = embedding / jnp.maximum(jnp.linalg.norm(embedding, axis=-1, keepdims=True), 1e-12)
    return jnp.mean(jnp.std(unit, axis=0)) * jnp.sqrt(embedding.shape[-1])


def mil_entropy(weights: Array) -> Array:
    """Mean entropy of the MIL weights over log N: 1 is uniform, 0 a single patch.

    Neither end is a collapse: weights start uniform, and one part can decide a class.

    Args:
        weights: [..., N], sum to 1.
    """
    return jnp.mean(mil.relative_entropy(weights))


class CollapseIndicator(NamedTuple):
    """A metric that shows one kind of collapse.

    Attributes:
        metric: its name.
        alarm: beyond it the teacher has collapsed.
        healthy: back beyond it the teacher has recovered; between the two nothing changes, so that noise repeats no warning.
        finding: what it means.
        advice: what to change.
    """

    metric: str
    alarm: float
    healthy: float
    finding: str
    advice: str

    def is_over(self, value: float) -> bool:
        """Whether the value lies beyond the alarm."""
        return value > self.alarm if self.alarm > self.healthy else value < self.alarm

    def is_healthy(self, value: float) -> bool:
        """Whether the value lies on the good side of `healthy`."""
        return value < self.healthy if self.alarm > self.healthy else value > self.healthy


COLLAPSE_INDICATORS = (
    # Healthy teachers have 0.3 to 0.9. At 0.99 its logits differ by less than half a nat.
    CollapseIndicator(
        "teacher_entropy",
        0.99,
        0.97,
        "the teacher's distributions are uniform",
        "lower method.teacher_temp, or set method.centering=sinkhorn",
    ),
    # 0.05 log K are less than log 2 for any K up to a million: a whole batch has fewer than two prototypes.
    CollapseIndicator(
        "marginal_entropy",
        0.05,
        0.1,
        "all images have the same prototype",
        "set method.centering=sinkhorn, or lower method.center_momentum so that the centers follow",
    ),
    # The square is 1 - the mean cosine of two images: at 0.05 that is 0.9975. Healthy runs have 0.3 and more.
    CollapseIndicator(
        "feature_std",
        0.05,
        0.1,
        "the features of all images are the same",
        "raise method.koleo_weight (0.1, or more for a small model), lower optim.lr, or set head.batch_norm=True",
    ),
)
LOGS_IN_ROW = 3  # logged steps beyond the alarm before a collapse is reported, so that one unusual batch is not
FEWEST_IMAGES = 4  # of a batch: fewer may well be alike


def watched_from(config: ConfigDict, train_images: int) -> int:
    """The step after which the teacher is checked for collapse.

    By then the learning rate is warmed up, all layers are trained, and the EMA, which averages over 1 / (1 - momentum) steps,
    has followed.
    """
    optim, momentum = config.optim, config.method.teacher_momentum
    epochs = max(optim.warmup_epochs, optim.freeze_last_layer_epochs, optim.freeze_backbone_epochs)
    warmup = epochs * steps_per_epoch(config, train_images)
    window = 1 / (1 - momentum) if momentum < 1 else math.inf
    return math.ceil(min(warmup + window, total_steps(config, train_images)))


class CollapseWatch:
    """Reports each kind of collapse once, and again after a recovery.

    Nothing is kept across processes: a resumed run reports a collapse that persists once more.

    Args:
        first_step: see `watched_from`; earlier steps are not judged.
        images: that a metric is of, a batch or a part of it; with fewer than FEWEST_IMAGES nothing is judged.
    """

    def __init__(self, first_step: int, images: int):
        self._first_step, self._images = first_step, images
        self._seen = dict.fromkeys(
            COLLAPSE_INDICATORS, 0
        )  # logged steps in a row beyond the alarm; LOGS_IN_ROW also until it is healthy

    def read(self, step: int, metrics: dict[str, float]) -> list[str]:
        """New findings at a logged step: a sentence for each kind of collapse, mostly none.

        Args:
            step: number of steps done.
            metrics: of the step; those of a bad step (not finite) are passed over.
        """
        if step <= self._first_step or self._images < FEWEST_IMAGES:
            return []
        return [
            f"step {step}: collapse: {indicator.finding} ({indicator.metric} "
            f"{metrics[indicator.metric]:.4f}, alarm at {indicator.alarm:g}); "
            f"{indicator.advice}"
            for indicator in COLLAPSE_INDICATORS
            if math.isfinite(metrics[indicator.metric]) and self._is_new(indicator, metrics[indicator.metric])
        ]

    def _is_new(self, indicator: CollapseIndicator, value: float) -> bool:
        if self._seen[indicator] == LOGS_IN_ROW:  # reported already
            self._seen[indicator] = 0 if indicator.is_healthy(value) else LOGS_IN_ROW
            return False
        self._seen[indicator] = self._seen[indicator] + 1 if indicator.is_over(value) else 0
        return self._seen[indicator] == LOGS_IN_ROW
