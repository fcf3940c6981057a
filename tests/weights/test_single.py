"""Fingerprints: what features depend on counts, and files of versions without the later keys keep theirs."""

import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.weights.single import SETTINGS, fingerprint, settings_of

ARRAYS = {"backbone/norm/scale": np.ones(3, np.float32)}


def _resolved(**keys):
    config = config_lib.default()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return config_lib.resolve(config, 0).to_dict()


def _before(config):
    """The same as a version without the later keys stored it."""
    new = ("width", "depth", "mlp_dim", "table_px", "class_token", "positions", "resample_rule", "rope_base", "layer_scale")
    new += ("gated_mlp", "activation", "pre_norm", "qkv_bias")
    model = {key: value for key, value in config["model"].items() if key not in new} | {"num_heads": None}
    evaluation = {key: value for key, value in config["eval"].items() if key not in ("resize_mode", "interpolation")}
    return config | {"model": model, "eval": evaluation}


@pytest.mark.parametrize("name", ["vit_small", "swin_tiny"])
def test_later_keys_leave_fingerprints_as_they_were(name):
    config = _resolved(model__name=name)
    assert set(settings_of(config)) == set(SETTINGS)
    assert settings_of(config) == settings_of(_before(config))
    asked = _before(config)
    asked["model"]["num_heads"] = 6  # written down by hand, and then a part
    assert settings_of(asked)["model.num_heads"] == 6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__num_heads", 12),
        ("model__layer_norm_eps", 1e-5),
        ("model__table_px", 112),
        ("model__activation", "quick_gelu"),
        ("model__qkv_bias", "qv"),
        ("model__resample_rule", "size"),
        ("model__positions", "rotary"),
        ("eval__resize_mode", "squash"),
        ("eval__interpolation", "bilinear"),
    ],
)
def test_what_features_depend_on_counts(key, value):
    plain, changed = settings_of(_resolved()), settings_of(_resolved(**{key: value}))
    assert fingerprint(ARRAYS, plain) != fingerprint(ARRAYS, changed)
