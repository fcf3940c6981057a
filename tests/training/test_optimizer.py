"""Clipping, parameter groups, the frozen last layer, EMA."""

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.training.optimizer import Group, adamw, clip
from cmd_jax.training.step import ema


def test_each_gradient_is_clipped_on_its_own():
    gradients = {"long": jnp.array([3.0, 4.0]), "short": jnp.array([0.1])}
    clipped = jax.tree.map(lambda gradient: clip(gradient, 1.0), gradients)
    np.testing.assert_allclose(clipped["long"], [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(clipped["short"], gradients["short"])
    unclipped = jax.tree.map(lambda gradient: clip(gradient, 0.0), gradients)
    np.testing.assert_array_equal(unclipped["long"], gradients["long"])


def test_weight_decay_spares_vectors_and_the_frozen_layer():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "image_last_layer": {"weight_v": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(3.0, lambda name: Group(start=int("last_layer" in name)))
    state = optimizer.init(params)
    first, state = optimizer.update(zero, state, params, learning_rate=0.1, weight_decay=0.5)
    second, _ = optimizer.update(zero, state, params, learning_rate=0.1, weight_decay=0.5)
    np.testing.assert_allclose(first["kernel"], -0.05)
    assert np.all(first["bias"] == 0)
    assert np.all(first["image_last_layer"]["weight_v"] == 0)
    np.testing.assert_allclose(second["image_last_layer"]["weight_v"], -0.05)


def test_an_inactive_update_changes_nothing():
    params = {"kernel": jnp.ones((2, 2)), "image_last_layer": {"weight_v": jnp.ones((2, 2))}}
    optimizer = adamw(3.0, lambda name: Group())
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    arguments = {"learning_rate": 0.1, "weight_decay": 0.5}
    _, state = optimizer.update(params, optimizer.init(params), params, **arguments)
    updates, after = optimizer.update(bad, state, params, **arguments, active=False)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_ema_of_momentum_one_is_the_identity():
    tree = {"a": jnp.arange(3.0)}
    np.testing.assert_array_equal(ema(tree, {"a": jnp.zeros(3)}, jnp.ones(()))["a"], tree["a"])
