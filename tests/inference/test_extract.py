"""What features are read from is the network that was trained."""

import jax
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.api import Model
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.inference.load import Trained
from cmd_jax.inference.run import check_finite, encode, normalized, widths
from cmd_jax.models.build import init_params, make_backbone, make_network
from tests.conftest import quick, tiny


@pytest.mark.parametrize(("scorer", "heads"), [("gated", 1), ("attention", 3), ("class_token", 1), ("mean", 1)])
def test_outputs_equal_those_of_the_training_network(scorer, heads):
    config = tiny()
    config.method.mil_scorer, config.method.mil_heads, config.method.mil_temp = scorer, heads, 0.1
    config.eval.features = "cls+mean+mil"
    config = config_lib.resolve(config, 0)
    network = make_network(config)
    params = quick(lambda: init_params(config, network))()
    kept = {part: params[part] for part in ("backbone", "mil_scorer") if part in params}
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    encoded = quick(lambda params, images: network.apply({"params": params}, normalized(images, config)))(params, images)
    outputs = quick(lambda params, images: encode(config, make_backbone(config), params, images))(kept, images)
    pools = (encoded.backbone["cls_token"], np.mean(encoded.patch_tokens, axis=1), encoded.bag)
    pools = [pool / np.linalg.norm(pool, axis=1, keepdims=True) for pool in pools]
    np.testing.assert_allclose(outputs["mil_weights"], encoded.mil_weights, atol=1e-6)
    np.testing.assert_allclose(outputs["features"], np.concatenate(pools, axis=1) / np.sqrt(3), atol=1e-6)
    # class token and mean, and a bag of each head: the backbone has three
    bags = {"class_token": 3}.get(scorer, heads)
    assert outputs["features"].shape == (3, (2 + bags) * encoded.patch_tokens.shape[-1])
    assert widths(config, kept) == {name: leaf.shape[1:] for name, leaf in outputs.items()}
    assert np.ptp(jax.device_get(outputs["mil_weights"]), axis=1).min() > 0 or scorer == "mean"


def test_without_a_class_token_nothing_reads_one():
    config = tiny()
    config.model.update(class_token=False, registers=2)
    config.eval.features = None
    config = config_lib.resolve(config, 0)
    params = quick(lambda: init_params(config, make_network(config)))()
    model = Model(Trained(config, jax.device_get(params), None, "teacher", "a.pth", "0"), batch_size=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert model.config.eval.features == "mean+mil"
    assert model.embed(images).shape == (3, 2 * 96)
    assert model.mil_weights(images).shape == (3, 2, 2)
    with pytest.raises(ConfigError, match="vit_micro has no class token, whose attention this is; load a model that has one"):
        model.attention(images)


def test_numbers_that_are_not_finite_name_the_image():
    outputs = {"features": np.ones((3, 2), np.float32), "patch_tokens": np.ones((3, 2, 2), np.float16)}
    assert check_finite(outputs, ["a", "b", "c"]) is outputs
    outputs["patch_tokens"][1, 0, 1] = np.inf
    with pytest.raises(WeightsError, match=r"patch_tokens of b \(1 of 3 images\) are NaN or infinite"):
        check_finite(outputs, ["a", "b", "c"])
