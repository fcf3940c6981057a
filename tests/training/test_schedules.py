"""Schedules by hand."""

import jax.numpy as jnp
import numpy as np

from cmd_jax import config as config_lib
from cmd_jax.training.schedules import cosine, epoch_linear, make_schedules, ramp


def test_schedules_hold_their_end():
    schedule = cosine(1.0, 0.1, steps=10, warmup_steps=4)
    np.testing.assert_allclose(schedule(jnp.array([0, 3, 4, 10, 99])), [0.0, 1.0, 1.0, 0.1, 0.1], atol=1e-7)


def test_the_teachers_temperature_changes_once_an_epoch():
    schedule = epoch_linear(0.04, 0.08, warmup_epochs=3, steps_per_epoch=2)
    np.testing.assert_allclose(schedule(jnp.arange(8)), [0.04, 0.04, 0.06, 0.06, 0.08, 0.08, 0.08, 0.08], rtol=1e-6)


def test_inter_level_terms_rise_step_by_step():
    np.testing.assert_allclose(ramp(4)(jnp.arange(7)), [0, 0.25, 0.5, 0.75, 1, 1, 1])
    config = config_lib.default()
    config.train.batch_size = 8
    images = 5 * config.train.batch_size
    assert make_schedules(config_lib.resolve(config, images), images).inter_scale is None
    config.method.mil_warmup_epochs = 2.0
    scale = make_schedules(config_lib.resolve(config, images), images).inter_scale
    np.testing.assert_allclose(scale(jnp.array([0, 1, 5, 10, 11])), [0, 0.1, 0.5, 1, 1], rtol=1e-6)
