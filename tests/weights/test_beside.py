"""What config.json and preprocessor_config.json beside weights say, and how a configuration follows them."""

import json

import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import write_safetensors
from cmd_jax.weights.read import Facts, follow, read_facts, read_source, read_source_facts
from tests.weights.checkpoints import dino_vit

HALF = "0.5,0.5,0.5/0.5,0.5,0.5"
VIT = {"model_type": "vit", "num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


def _facts(tmp_path, config=None, preprocessor=None):
    paths = []
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        path = tmp_path / name
        if content is not None:
            path.write_text(json.dumps(content))
        paths.append(str(path) if content is not None else None)
    return read_facts(*paths)


def test_no_file_says_nothing(tmp_path):
    assert _facts(tmp_path) == Facts()


def test_heads_and_epsilon_of_transformers(tmp_path):
    assert _facts(tmp_path, VIT) == Facts(12, 1e-12, None)
    assert _facts(tmp_path, {"model_type": "swin", "num_heads": [3, 6], "layer_norm_eps": 1e-5}) == Facts(None, 1e-5, None)


def test_timm_says_mean_and_deviation(tmp_path):
    timm = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    assert _facts(tmp_path, timm | {"model_args": {"num_heads": 4}}) == Facts(4, None, HALF)


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 0.00392156862745098},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 2 / 255},
        {"image_mean": [127.5, 100, 90], "image_std": [50, 60, 70], "do_rescale": False},
        {"do_normalize": False},
    ],
)
def test_normalization_is_that_of_transformers(tmp_path, preprocessor):
    """The oracle: transformers rescales uint8 pixels, then takes out the mean and divides."""
    pixels = np.arange(30, dtype=np.float64).reshape(10, 3) * 8
    expected = pixels * (preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1)
    if preprocessor.get("do_normalize", True):
        expected = (expected - preprocessor["image_mean"]) / preprocessor["image_std"]
    mean, std = map(np.array, statistics_of(_facts(tmp_path, None, preprocessor).normalization))
    np.testing.assert_allclose((pixels / 255 - mean) / std, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "has hidden_act 'quick_gelu'; only 'gelu'"),
        ({"layer_norm_eps": "small"}, "has values of other types"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "has values of other types"),
        ([1], "holds a list, not a JSON object"),
    ],
)
def test_files_that_cannot_be_followed(tmp_path, config, message):
    with pytest.raises(WeightsError, match=message):
        _facts(tmp_path, config)


def test_open_keys_follow_and_given_ones_must_agree():
    config = config_lib.default()
    followed = follow(Facts(4, 1e-12, HALF), config, "hf")
    assert (followed.model.num_heads, followed.model.layer_norm_eps, followed.data.normalization) == (4, 1e-12, HALF)
    assert config.model.num_heads is None
    config.data.normalization = "imagenet"
    with pytest.raises(ConfigError, match=r"data\.normalization is 'imagenet', but the files beside hf say"):
        follow(Facts(None, None, HALF), config, "hf")
    same = "/".join(",".join(map(str, values)) for values in statistics_of("imagenet"))
    assert follow(Facts(None, None, same), config, "hf").data.normalization == "imagenet"


def test_files_beside_count_for_the_names_of_the_hub_alone(tmp_path):
    _facts(tmp_path, VIT)
    for name in ("model.safetensors", "other.safetensors"):
        write_safetensors(str(tmp_path / name), dino_vit())
    assert read_source(str(tmp_path), "teacher").facts.num_heads == 12
    assert read_source_facts(str(tmp_path / "model.safetensors")).num_heads == 12
    assert read_source_facts(str(tmp_path / "other.safetensors")) == Facts()
