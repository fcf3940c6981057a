"""The training state: one named pytree that, with config and data, determines every later step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import LOOKS
from cmd_jax.method.types import Centers
from cmd_jax.models.build import Params, init_params
from cmd_jax.models.network import Network
from cmd_jax.training.health import BadSteps


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: [] int32, number of steps done.
        student: parameters.
        teacher: parameters, the EMA of the student's.
        optimizer: optax state.
        centers: of the teacher's logits.
        bad_steps: how many steps were left out because they were not finite.
        bank: [M, L, F] float32, a row for each training image (`method.relations`); None without L_N.
    """

    step: jax.Array
    student: Params
    teacher: Params
    optimizer: optax.OptState
    centers: Centers
    bad_steps: BadSteps
    bank: jax.Array | None = None


def init_state(config: ConfigDict, network: Network, optimizer: optax.GradientTransformation, train_images: int) -> TrainState:
    """State before the first step: the teacher equals the student, centers and bank are zero.

    Args:
        config: resolved.
        network: of student and teacher.
        optimizer: of the student.
        train_images: rows of the bank.
    """
    student = init_params(config, network)
    prototypes = config.head.prototypes
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        optimizer=optimizer.init(student),
        centers=Centers(jnp.zeros(prototypes), jnp.zeros(prototypes)),
        bad_steps=BadSteps(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
        bank=jnp.zeros((train_images, len(LOOKS), sum(network.pool_widths))) if config.method.relation_weight else None,
    )
