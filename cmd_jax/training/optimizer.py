"""AdamW as DINO trains: clipping per parameter, decay on matrices only, the last layer frozen at first."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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


def is_last_layer(path: tuple) -> bool:
    """Whether a parameter belongs to the prototypes."""
    return any("last_layer" in str(getattr(part, "key", part)) for part in path)


class AdamWState(NamedTuple):
    """Moments of the gradients, and the updates that the last layer and all other parameters have had, for bias correction."""

    count: jax.Array  # [] int32
    last_layer_count: jax.Array  # [] int32
    mu: Params
    nu: Params


def adamw(clip_grad: float, freeze_steps: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """The optimizer, an `optax.GradientTransformationExtraArgs`.

    `update` takes `learning_rate` and `weight_decay` of the step, and `active`: where it is false, state and parameters stay
    as they are. While it is frozen the last layer is left out wholly: no decay, no moments, and its bias-correction count
    stands still. Written out rather than composed of optax's parts: those read old moments again after the new ones are
    known, so that the compiler copies every donated moment and parameter, 0.4 GB at 65,536 prototypes.

    Args:
        clip_grad: norm to which each parameter's gradient is clipped; 0 does not clip.
        freeze_steps: number of first steps in which the last layer stays as it is.
        b1, b2: of the moving averages.
        eps: beside the root of the second moment.
    """

    def init(params: Params) -> AdamWState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros((), jnp.int32)
        return AdamWState(zero, zero, zeros(), zeros())

    def update(gradients, state, params=None, *, learning_rate, weight_decay, active=True, **_):
        moving = jnp.asarray(active), jnp.asarray(active) & (state.count >= freeze_steps)  # all others, the last layer
        counts = tuple(
            old + on.astype(jnp.int32) for old, on in zip((state.count, state.last_layer_count), moving, strict=True)
        )

        def step(path: tuple, gradient: jax.Array, mu: jax.Array, nu: jax.Array, parameter: jax.Array) -> tuple:
            on, count = moving[is_last_layer(path)], counts[is_last_layer(path)]
            gradient = clip(gradient, clip_grad)
            mu = jnp.where(on, b1 * mu + (1 - b1) * gradient, mu)
            nu = jnp.where(on, b2 * nu + (1 - b2) * jnp.square(gradient), nu)
            # Only new moments are read from here on, so that they are written in place of the old ones.
            mu, nu = jax.lax.optimization_barrier((mu, nu))
            direction = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            decay = weight_decay * parameter if is_decayed(parameter) else 0.0
            return jnp.where(on, -learning_rate * (direction + decay), 0.0), mu, nu

        stepped = jax.tree.map_with_path(step, gradients, state.mu, state.nu, params)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), stepped)
        return updates, AdamWState(*counts, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
