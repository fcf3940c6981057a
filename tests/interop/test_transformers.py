"""Exports loaded by transformers, and what transformers saves imported: the same features within 1e-4."""

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from transformers import SwinForImageClassification, SwinModel, ViTForImageClassification, ViTModel

from cmd_jax import config as config_lib
from cmd_jax.config import validate
from cmd_jax.inference.export import export_run
from cmd_jax.models.build import init_params, make_backbone, make_network
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.weights.transfer import initial_weights
from tests.interop.references import swin, tokens, vit

TOLERANCE = 1e-4  # absolute, on tokens of unit variance


def _config(name, image_px, **model):
    config = config_lib.default()
    config.model.update({"name": name, **model})
    config.views.global_px, config.views.local_px = image_px, 32
    config.head.prototypes, config.head.hidden_dim, config.head.bottleneck_dim = 24, 16, 8
    validate(config)
    return config_lib.resolve(config, 0)


def _images(image_px):
    return np.random.default_rng(0).normal(size=(2, image_px, image_px, 3)).astype(np.float32)


def _features(config, backbone, images):
    named = jax.jit(make_backbone(config).apply)({"params": backbone}, images)
    patches = np.asarray(named["patch_tokens"])
    return np.concatenate([named["cls_token"][:, None], patches], axis=1) if "cls_token" in named else patches


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (ViTModel, _config("vit_tiny", 224, patch_size=16)),
        (SwinModel, _config("swin_tiny", 224, window=7)),
    ],
    ids=["vit_tiny", "swin_tiny_w7"],
)
def test_an_export_gives_our_features(model, config, tmp_path):
    params = jax.device_get(jax.jit(lambda: init_params(config, make_network(config)))())
    rng = np.random.default_rng(1)
    # Zero biases and unit scales would hide a mistake.
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.1, params)
    checkpoints = Checkpoints(str(tmp_path / "run"))
    checkpoints.save_teacher(params, config)
    checkpoints.close()
    config_lib.save(config, str(tmp_path / "run" / "config.json"))
    export_run(str(tmp_path / "run"), None, "teacher", "hf", str(tmp_path / "out"))
    loaded, info = model.from_pretrained(tmp_path / "out", add_pooling_layer=False, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = _images(config.views.global_px)
    expected = _features(config, params["backbone"], images)
    assert expected.std() > 0.5
    np.testing.assert_allclose(tokens(loaded.eval(), images), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("make", "wrapper", "config"),
    [
        (vit, ViTForImageClassification, _config("vit_micro", 32, patch_size=8)),
        (swin, SwinForImageClassification, _config("swin_micro", 64, window=2)),
    ],
    ids=["vit", "swin"],
)
def test_what_transformers_saves_is_read(make, wrapper, config, tmp_path):
    model = make()
    images = _images(config.views.global_px)
    expected = tokens(model, images)
    model.save_pretrained(tmp_path / "backbone")
    classifier = wrapper(model.config)
    classifier.base_model.load_state_dict(model.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "classifier")
    config = config.copy_and_resolve_references()
    for name in ("backbone", "classifier"):
        config.init.weights = str(tmp_path / name)
        fitted = initial_weights(config, make_network(config))
        assert any("ignored, not a part of the networks here: classifier" in note for note in fitted.notes) == (
            name == "classifier"
        )
        backbone = unflatten_dict(fitted.arrays, sep="/")["backbone"]
        np.testing.assert_allclose(_features(config, backbone, images), expected, atol=TOLERANCE)
