"""Five steps of the reference's training recipe on given gradients, and what the parameter groups mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmd_jax.training.optimizer import adamw, clip_per_parameter
from cmd_jax.training.step import ema

NAMES = ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight", "fc2.bias")


@pytest.mark.parametrize("variant", ["frozen_g", "train_g"])
def test_five_steps_match_golden_numbers(golden, variant):
    arrays, meta = golden("optimizer")
    names = NAMES + (("last_layer.weight_g",) if variant == "train_g" else ()) + ("last_layer.weight_v",)
    pick = lambda prefix: {name: jnp.asarray(arrays[f"{prefix}__{name}"]) for name in names}
    student = teacher = pick("in_param0")
    optimizer = adamw(meta["clip_grad"], meta["freeze_last_layer"] * meta["steps_per_epoch"])
    state = optimizer.init(student)
    for step in range(meta["steps"]):
        gradients = pick(f"in_grad{step}")
        clipped, _ = clip_per_parameter(meta["clip_grad"]).update(gradients, optax.EmptyState())
        for name in names:
            np.testing.assert_allclose(clipped[name], arrays[f"out_{variant}_step{step}_clipped__{name}"], atol=1e-6)
        updates, state = optimizer.update(
            gradients, state, student, learning_rate=arrays["out_lr"][step], weight_decay=arrays["out_wd"][step]
        )
        student = optax.apply_updates(student, updates)
        teacher = ema(teacher, student, arrays["out_momentum"][step])
        for name in names:
            np.testing.assert_allclose(student[name], arrays[f"out_{variant}_step{step}_student__{name}"], atol=1e-6)
            np.testing.assert_allclose(teacher[name], arrays[f"out_{variant}_step{step}_teacher__{name}"], atol=1e-6)


def test_weight_decay_falls_on_matrices_alone_and_spares_the_frozen_last_layer():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "image_last_layer": {"weight_v": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(clip_grad=3.0, freeze_steps=1)
    state = optimizer.init(params)
    first, state = optimizer.update(zero, state, params, learning_rate=0.1, weight_decay=0.5)
    second, _ = optimizer.update(zero, state, params, learning_rate=0.1, weight_decay=0.5)
    np.testing.assert_allclose(first["kernel"], -0.05)
    assert np.all(first["bias"] == 0)
    assert np.all(first["image_last_layer"]["weight_v"] == 0)
    np.testing.assert_allclose(second["image_last_layer"]["weight_v"], -0.05)


def test_ema_of_momentum_one_is_the_identity():
    tree = {"a": jnp.arange(3.0)}
    np.testing.assert_array_equal(ema(tree, {"a": jnp.zeros(3)}, jnp.ones(()))["a"], tree["a"])
