"""Schedules by hand."""

import jax.numpy as jnp
import numpy as np

from cmd_jax.training.schedules import cosine, epoch_linear


def test_schedules_hold_their_end():
    schedule = cosine(1.0, 0.1, steps=10, warmup_steps=4)
    np.testing.assert_allclose(schedule(jnp.array([0, 3, 4, 10, 99])), [0.0, 1.0, 1.0, 0.1, 0.1], atol=1e-7)


def test_the_teachers_temperature_changes_once_an_epoch():
    schedule = epoch_linear(0.04, 0.08, warmup_epochs=3, steps_per_epoch=2)
    np.testing.assert_allclose(schedule(jnp.arange(8)), [0.04, 0.04, 0.06, 0.06, 0.08, 0.08, 0.08, 0.08], rtol=1e-6)
