"""AdamW as DINO trains: clipping per parameter, decay on matrices only, the last layer frozen at first."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any


def parameter_norm(gradient: jax.Array) -> jax.Array:
    """Euclidean norm of one parameter's gradient, [] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(gradient)))


def clip_per_parameter(max_norm: float) -> optax.GradientTransformation:
    """Scales each parameter's gradient on its own to at most `max_norm`, by max_norm / (norm + 1e-6); 0: not at all."""

    def clip(gradient: jax.Array) -> jax.Array:
        return gradient * jnp.minimum(1.0, max_norm / (parameter_norm(gradient) + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates) if max_norm else updates)


def is_decayed(parameter: jax.Array) -> bool:
    """Weight decay falls on every parameter of two or more dimensions (class token and position table included)."""
    return parameter.ndim >= 2


def is_last_layer(path: tuple) -> bool:
    """Whether a parameter belongs to the prototypes."""
    return any("last_layer" in str(getattr(part, "key", part)) for part in path)


def _decay_and_scale() -> optax.GradientTransformationExtraArgs:
    """-learning_rate * (direction + weight_decay * parameter), both factors given at each update."""

    def update(updates, state, params=None, *, learning_rate, weight_decay, **_):
        def scaled(direction, parameter):
            decay = weight_decay * parameter if is_decayed(parameter) else 0.0
            return -learning_rate * (direction + decay)

        return jax.tree.map(scaled, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def adamw(clip_grad: float, freeze_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer.

    `update` takes `learning_rate` and `weight_decay` of the step. While it is frozen the last layer is left out wholly: no
    decay, no moments, and its bias-correction count stands still.

    Args:
        clip_grad: norm to which each parameter's gradient is clipped; 0 does not clip.
        freeze_steps: number of first steps in which the last layer stays as it is.
    """
    group = optax.chain(clip_per_parameter(clip_grad), optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), _decay_and_scale())
    frozen_at_first = optax.transforms.conditionally_mask(group, lambda step: step >= freeze_steps)
    return optax.partition(
        {"rest": group, "last_layer": frozen_at_first},
        lambda params: jax.tree.map_with_path(lambda path, _: "last_layer" if is_last_layer(path) else "rest", params),
    )
