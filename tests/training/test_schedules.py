"""Schedules against the references' golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.training.schedules import cosine, epoch_linear


@pytest.mark.parametrize("case", ["a", "b"])
def test_schedules_match_golden_numbers(golden, case):
    arrays, meta = golden("schedules")
    p = meta["cases"][case]
    epoch, steps = p["niter_per_ep"], p["epochs"] * p["niter_per_ep"]
    warmup = p["warmup_epochs"] * epoch
    with jax.enable_x64(True):
        step = jnp.arange(steps)
        lr = cosine(p["base_lr"] * p["global_batch_size"] / 256, p["min_lr"], steps, warmup, p["start_warmup_value"])
        decay = cosine(p["weight_decay"], p["weight_decay_end"], steps)
        momentum = cosine(p["momentum_teacher"], 1.0, steps)
        temp = epoch_linear(p["warmup_teacher_temp"], p["teacher_temp"], p["warmup_teacher_temp_epochs"], epoch)
        for name, schedule in {"lr": lr, "wd": decay, "momentum": momentum}.items():
            np.testing.assert_allclose(schedule(step), arrays[f"out_{case}_{name}"], atol=1e-9, rtol=0)
        np.testing.assert_allclose(temp(step[::epoch]), arrays[f"out_{case}_teacher_temp"], atol=1e-9, rtol=0)


def test_schedules_hold_their_end():
    schedule = cosine(1.0, 0.1, steps=10, warmup_steps=4)
    np.testing.assert_allclose(schedule(jnp.array([0, 3, 4, 10, 99])), [0.0, 1.0, 1.0, 0.1, 0.1], atol=1e-7)
