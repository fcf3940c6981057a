"""Every family of transformers: its files are recognised and give its features, and our exports of them are its files again."""

import json
import re

import jax
import numpy as np
import pytest
import transformers as hf
from flax.traverse_util import unflatten_dict
from PIL import Image

from cmd_jax import config as config_lib
from cmd_jax.inference.export import export_run
from cmd_jax.models.build import make_backbone, make_network
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.transfer import follow_source, import_run, initial_weights
from tests.interop.families import FAMILIES, OTHER_PX, compare, pixels, reference

TOLERANCE = 1e-4  # absolute, on tokens after norms whose scales are in 0.5..1.5
# One of each class of transformers, with what its others have and more.
EXPORTED = ("ViT", "Dinov2 gated", "Dinov2WithRegisters", "DINOv3 gated", "CLIP", "Swin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model, directory as its save_pretrained writes it), made once."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("model")
            model = FAMILIES[name].make()
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_transformers(name, saved):
    model, directory = saved(name)
    for side in (model.config.image_size, OTHER_PX):
        worst, deviation = compare(model, name, directory, side)
        assert deviation > 0.5
        assert worst < TOLERANCE


@pytest.mark.parametrize("name", EXPORTED)
def test_a_run_starts_without_keys_of_the_model(name, saved):
    model, directory = saved(name)
    config = config_lib.default()
    config.init.weights = str(directory)
    if name == "Swin":
        config.method.image_pool = "mean"
    config, _ = follow_source(config)
    config = config_lib.resolve(config, 0)
    assert config.views.global_px == model.config.image_size
    fitted = initial_weights(config, make_network(config))
    side = config.views.global_px
    images = pixels(side)
    statistics = statistics_of(config.data.normalization)
    params = unflatten_dict(fitted.arrays, sep="/")["backbone"]
    x = ((images / 255 - np.array(statistics[0])) / np.array(statistics[1])).astype(np.float32)
    loss = lambda params: jax.numpy.mean(make_backbone(config).apply({"params": params}, x)["patch_tokens"] ** 2)
    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    named = jax.jit(make_backbone(config).apply)({"params": params}, x)
    _, patches = reference(name, model, images, statistics)
    np.testing.assert_allclose(named["patch_tokens"], patches, atol=TOLERANCE)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_are_files_of_the_family(name, saved, tmp_path, monkeypatch):
    model, directory = saved(name)
    config = config_lib.default()
    config.init.weights = str(directory)
    if name == "Swin":
        config.method.image_pool = "mean"
    import_run(config, str(tmp_path / "run"))
    export_run(str(tmp_path / "run"), None, "teacher", "hf", str(tmp_path / "out"))
    architecture = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
    assert architecture == [type(model).__name__]
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, **FAMILIES[name].arguments)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = {key: value for key, value in loaded.state_dict().items() if "mask_token" not in key}
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, model.state_dict()[key], err_msg=key)
    for side in (model.config.image_size, OTHER_PX):
        images, statistics = pixels(side), statistics_of("imagenet")
        for ours, expected in zip(
            reference(name, loaded.eval(), images, statistics), reference(name, model, images, statistics), strict=True
        ):
            np.testing.assert_array_equal(ours, expected)
    original, ours = (read_safetensors(str(folder / "model.safetensors")) for folder in (directory, tmp_path / "out"))
    bare = lambda arrays: {key.removeprefix("vision_model."): value for key, value in arrays.items() if "mask_token" not in key}
    original, ours = bare(original), bare(ours)
    assert original.keys() == ours.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    assert hf.AutoModel.from_pretrained(tmp_path / "out").config.model_type == model.config.model_type
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    Image.fromarray(pixels(48)[0]).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert names["tokens"].shape[0] == 1
