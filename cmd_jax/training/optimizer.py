"""AdamW as DINO trains: clipping per parameter, decay on matrices only, learning rates and first steps by parameter."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from cmd_jax.config import ConfigDict
from cmd_jax.models.sizes import SWIN_SIZES

Params = Any


def parameter_norm(gradient: jax.Array) -> jax.Array:
    """Euclidean norm of one parameter's gradient, [] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(gradient)))


def clip(gradient: jax.Array, max_norm: float) -> jax.Array:
    """Scales a parameter's gradient to at most `max_norm`, by max_norm / (norm + 1e-6); 0: not at all."""
    return gradient * jnp.minimum(1.0, max_norm / (parameter_norm(gradient) + 1e-6)) if max_norm else gradient


def is_decayed(parameter: jax.Array) -> bool:
    """Weight decay falls on every parameter of two or more dimensions (class token and position table included)."""
    return parameter.ndim >= 2


def joined(path: tuple) -> str:
    """The name of a parameter: the keys of its path, joined by "/"."""
    return keystr(path, simple=True, separator="/")


class Group(NamedTuple):
    """How a parameter moves.

    Attributes:
        rate: factor of the learning rate.
        start: number of first steps in which it stays as it is; None: it never moves.
    """

    rate: float = 1.0
    start: int | None = 0


def make_groups(config: ConfigDict, steps_per_epoch: int) -> Callable[[str], Group]:
    """Builds (name of a parameter, joined by "/") -> its group.

    The prototypes wait for `optim.freeze_last_layer_epochs` and the backbone for `optim.freeze_backbone_epochs`. The learning
    rate of the backbone falls with the distance from its end (BEiT, arXiv 2106.08254): `optim.layer_decay` to the power of
    the layers above, where the final norm is the last layer and all that stands before the blocks the first. The first
    `init.freeze_blocks` blocks, and what stands before them, never move.

    Args:
        config: resolved.
        steps_per_epoch: of the run.
    """
    optim, is_frozen = config.optim, frozen_parameters(config)
    last_layer, backbone = (
        round(epochs * steps_per_epoch) for epochs in (optim.freeze_last_layer_epochs, optim.freeze_backbone_epochs)
    )
    number, count = backbone_layers(config)

    def group(name: str) -> Group:
        if not name.startswith("backbone/"):
            return Group(start=last_layer if "last_layer/" in name else 0)
        if is_frozen(name):
            return Group(start=None)
        return Group(optim.layer_decay ** (count - number(name)), backbone)

    return group


def frozen_parameters(config: ConfigDict) -> Callable[[str], bool]:
    """Builds (name of a parameter) -> whether it belongs to `init.freeze_blocks` or stands before them."""
    (number, _), frozen = backbone_layers(config), config.init.freeze_blocks
    return lambda name: bool(frozen) and name.startswith("backbone/") and number(name) <= frozen


def backbone_layers(config: ConfigDict) -> tuple[Callable[[str], int], int]:
    """((name of a backbone's parameter) -> number of its layer, number of the last): 0 before the blocks, then the blocks."""
    sizes = SWIN_SIZES.get(config.model.name)
    depths = sizes.depths if sizes else (config.model.depth,)

    def number(name: str) -> int:
        module = name.split("/")[1]
        block = re.fullmatch(r"(?:layers_(?P<stage>\d+)_)?(?:blocks_(?P<block>\d+)|downsample)", module)
        if not block:
            return sum(depths) + 1 if module == "norm" else 0
        stage = int(block["stage"] or 0)
        return sum(depths[:stage]) + (int(block["block"]) + 1 if block["block"] else depths[stage])

    return number, sum(depths) + 1


class AdamWState(NamedTuple):
    """Moments of the gradients, and the number of updates, for bias correction."""

    count: jax.Array  # [] int32
    mu: Params
    nu: Params


def adamw(clip_grad: float, group: Callable[[str], Group], b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """The optimizer, an `optax.GradientTransformationExtraArgs`.

    `update` takes `learning_rate` and `weight_decay` of the step, and `active`: where it is false, state and parameters stay
    as they are. A parameter that waits for its start is left out wholly: no decay, no moments, and its bias correction counts
    from there. Written out rather than composed of optax's parts: those read old moments again after the new ones are
    known, so that the compiler copies every donated moment and parameter, 0.4 GB at 65,536 prototypes.

    Args:
        clip_grad: norm to which each parameter's gradient is clipped; 0 does not clip.
        group: of a parameter by its name, see `make_groups`.
        b1, b2: of the moving averages.
        eps: beside the root of the second moment.
    """

    def init(params: Params) -> AdamWState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return AdamWState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(gradients, state, params=None, *, learning_rate, weight_decay, active=True, **_):
        active = jnp.asarray(active)
        total = state.count + active.astype(jnp.int32)

        def step(path: tuple, gradient: jax.Array, mu: jax.Array, nu: jax.Array, parameter: jax.Array) -> tuple:
            rate, start = group(joined(path))
            if start is None:
                return jnp.zeros_like(parameter), mu, nu
            on, count = (active & (state.count >= start), jnp.maximum(total - start, 0)) if start else (active, total)
            gradient = clip(gradient, clip_grad)
            mu = jnp.where(on, b1 * mu + (1 - b1) * gradient, mu)
            nu = jnp.where(on, b2 * nu + (1 - b2) * jnp.square(gradient), nu)
            # Only new moments are read from here on, so that they are written in place of the old ones.
            mu, nu = jax.lax.optimization_barrier((mu, nu))
            direction = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            decay = weight_decay * parameter if is_decayed(parameter) else 0.0
            scaled = learning_rate if rate == 1 else rate * learning_rate
            return jnp.where(on, -scaled * (direction + decay), 0.0), mu, nu

        stepped = jax.tree.map_with_path(step, gradients, state.mu, state.nu, params)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), stepped)
        return updates, AdamWState(total, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
