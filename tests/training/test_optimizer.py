"""Clipping, parameter groups, the frozen last layer, EMA."""

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import default, resolve
from cmd_jax.training.optimizer import Group, adamw, clip, make_groups
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


def _groups(**values):
    config = default()
    config.init.weights = "weights.safetensors"
    config.update_from_flattened_dict({"optim.layer_decay": 0.5, "optim.freeze_backbone_epochs": 1.5} | values)
    return make_groups(resolve(config, 1000), steps_per_epoch=10)


def test_learning_rate_falls_with_depth():
    group = _groups(**{"model.name": "vit_micro", "model.patch_size": 8})
    expected = {
        "backbone/norm/scale": 1.0,
        "backbone/blocks_1/attn/qkv/kernel": 0.5,
        "backbone/blocks_0/mlp/fc1/bias": 0.25,
        "backbone/pos_embed": 0.125,
        "backbone/patch_embed/kernel": 0.125,
    }
    assert {name: group(name) for name in expected} == {name: Group(rate, 15) for name, rate in expected.items()}
    assert group("image_head/mlp_0/kernel") == Group(1.0, 0)
    assert group("region_last_layer/weight_v") == Group(1.0, 0)
    assert _groups(**{"optim.freeze_last_layer_epochs": 1.0})("region_last_layer/weight_v") == Group(1.0, 10)
    swin = _groups(**{"model.name": "swin_micro", "method.image_pool": "mean"})  # 1, 1, 2 and 1 blocks
    names = ("patch_embed/kernel", "layers_0_blocks_0/x", "layers_0_downsample/x", "layers_2_blocks_1/x", "layers_3_blocks_0/x")
    assert [swin(f"backbone/{name}").rate for name in names] == [0.5**6, 0.5**5, 0.5**5, 0.5**2, 0.5]


def test_parameters_wait_for_their_start_or_rest():
    groups = {"first": Group(), "later": Group(rate=0.5, start=2), "never": Group(start=None)}
    params = {name: jnp.ones((2, 2)) for name in groups}
    optimizer = adamw(0.0, groups.get)
    state = optimizer.init(params)
    for step in range(4):
        updates, state = optimizer.update(params, state, params, learning_rate=0.1, weight_decay=0.0)
        expected = {"first": -0.1, "later": -0.05 if step >= 2 else 0.0, "never": 0.0}  # Adam's of a constant gradient
        for name, value in expected.items():
            np.testing.assert_allclose(updates[name], value, rtol=1e-4)


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
