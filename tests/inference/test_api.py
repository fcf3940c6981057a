"""`cmd_jax.load`: the evaluation's features of any kind of picture, from runs, our own files and other projects' weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import cmd_jax
from cmd_jax import config as config_lib
from cmd_jax.data.augment import normalize
from cmd_jax.data.decode import eval_crop
from cmd_jax.errors import BadImage, ConfigError, WeightsError
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.inference.export import export_run
from cmd_jax.models.build import make_network
from cmd_jax.train_and_evaluate import train_and_evaluate
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.weights.files import read_metadata, read_safetensors, write_safetensors
from tests.conftest import tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(finished):
    return cmd_jax.load(finished[0])


@pytest.fixture(scope="module")
def pictures(photo_folder):
    paths = sorted(map(str, (photo_folder / "test").rglob("*.png")))
    return paths, [np.asarray(Image.open(path)) for path in paths]


@pytest.fixture(scope="module")
def encoded(finished, pictures):
    """What the whole network of the run says of the pictures, without any code of `features`."""
    config = config_lib.load(str(finished[0] / "config.json"))
    checkpoints = Checkpoints(str(finished[0]), read_only=True)
    teacher = checkpoints.read_network("teacher")[1]
    checkpoints.close()
    crops = np.stack([eval_crop(pixels, config.eval.resize_px, config.eval.crop_px) for pixels in pictures[1]])
    return jax.jit(lambda x: make_network(config).apply({"params": teacher}, x))(normalize(crops, "imagenet"))


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_features_are_those_of_the_network(model, pictures, encoded, finished):
    paths, _ = pictures
    tokens, weights = np.asarray(encoded.patch_tokens), np.asarray(encoded.mil_weights)
    features = model.embed(paths)
    assert (features.shape, features.dtype) == ((12, 96), np.float32)
    bags = np.stack([sum(w * token for w, token in zip(*row, strict=True)) for row in zip(weights, tokens, strict=True)])
    np.testing.assert_allclose(features, _unit(bags), atol=2e-6)
    np.testing.assert_allclose(model.mil_weights(paths), weights.reshape(12, 2, 2), atol=1e-6)
    np.testing.assert_allclose(model.patch_tokens(paths), tokens.reshape(12, 2, 2, 96), atol=1e-5)
    attention = np.asarray(encoded.backbone["attention"])
    np.testing.assert_allclose(model.attention(paths), attention[:, :, 0, 1:].reshape(12, 3, 2, 2), atol=1e-6)
    both = cmd_jax.load(finished[0], features="cls+mean", batch_size=5).embed(paths)
    parts = [_unit(np.asarray(encoded.backbone["cls_token"])), _unit(tokens.mean(axis=1))]
    np.testing.assert_allclose(both, np.concatenate(parts, axis=1) / np.sqrt(2), atol=2e-6)


def test_any_kind_of_picture_gives_the_same_features(model, pictures, photo_folder):
    paths, arrays = pictures
    expected = model.embed(paths)
    kinds = {
        "a directory": str(photo_folder / "test"),
        "paths": tuple(map(Path, paths)),
        "a generator of paths": (path for path in paths),
        "an array of text": np.array(paths),
        "an array of objects": np.array([paths[0], Path(paths[1]), *paths[2:]], object),
        "PIL images": [Image.open(path) for path in paths],
        "a list of arrays": arrays,
        "a batch": np.stack(arrays),
        "floating-point arrays": np.stack(arrays).astype(np.float32) / 255,
        "arrays of a device": jax.numpy.asarray(np.stack(arrays)),
        "a mixture": [paths[0], Image.open(paths[1]), *arrays[2:]],
    }
    for kind, images in kinds.items():
        np.testing.assert_allclose(model.embed(images), expected, atol=2e-6, err_msg=kind)
    for one in (paths[3], Image.open(paths[3]), arrays[3]):
        np.testing.assert_allclose(model.embed(one), expected[3:4], atol=2e-6)
    gray = arrays[0][..., 0]
    np.testing.assert_allclose(model.embed(gray), model.embed(np.repeat(gray[..., None], 3, axis=-1)), atol=2e-6)
    assert model.embed([]).shape == (0, 96)
    assert model.mil_weights([]).shape == (0, 2, 2)
    np.testing.assert_array_equal(model.crop(arrays[0]), eval_crop(arrays[0], 18, 16))


def test_a_notebook_goes_from_photographs_to_labels(model, pictures):
    paths, arrays = pictures
    groups = model.groups(arrays)
    assert sorted(np.concatenate([group.rows for group in groups])) == list(range(12))
    labels = [None] * 12
    for group in groups[:3]:
        for row in group.rows:
            labels[row] = Path(paths[row]).parent.name
    found = model.suggest(paths, labels)
    named = [row for row in range(12) if labels[row]]
    assert [found.classes[row] for row in named] == [labels[row] for row in named]
    assert set(found.nearest) <= set(named)
    left = model.groups(paths, labels)
    assert sorted(np.concatenate([np.zeros(0, int), *(group.rows for group in left)])) == sorted(set(range(12)) - set(named))
    with pytest.raises(ConfigError, match="2 labels for 12 images"):
        model.suggest(paths, ["a", None])


def test_a_network_of_grey_levels_sees_grey_levels(model, finished, pictures, tmp_path):
    (tmp_path / "checkpoints").symlink_to(finished[0] / "checkpoints")
    config = config_lib.load(str(finished[0] / "config.json"))
    config.data.grayscale = True
    config_lib.save(config, str(tmp_path / "config.json"))
    gray = cmd_jax.load(tmp_path)
    luma = [np.asarray(Image.fromarray(array).convert("L")) for array in pictures[1]]
    expected = model.embed(luma)
    np.testing.assert_allclose(gray.embed(pictures[0]), expected, atol=2e-6)
    np.testing.assert_allclose(gray.embed(pictures[1]), expected, atol=2e-6)
    assert gray.fingerprint != model.fingerprint
    assert np.abs(model.embed(pictures[1]) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.full((8, 8, 3), -0.1, np.float32)], r"floating-point numbers from -0\.1 to -0\.1; give 0\.\.1"),
        ([np.full((8, 8, 3), np.nan)], r"from nan to nan; give 0\.\.1"),
        ([np.zeros((8, 8, 3), np.int64)], "numbers of type int64; give uint8"),
        ([np.zeros((8, 8, 4), np.uint8)], r"shape \(8, 8, 4\); give \[height, width, 3\]"),
        ([np.zeros((0, 8, 3), np.uint8)], r"shape \(0, 8, 3\)"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), r"shape \(2, 2, 8, 8, 3\)"),
        ({"a.png": 1}, "images are a dict; give paths, PIL images or arrays"),
        ({"a.png"}, "images are a set; give paths, PIL images or arrays"),
        (None, "images are a NoneType; give paths"),
        ([b"a.png"], "an image is a bytes; give a path, a PIL image or an array"),
        ([["a.png"], "b.png"], "an image is a list; give a path"),
        (np.array([["a.png"]]), r"an array of <U5 has shape \(1, 1\); give paths as an array of one axis"),
    ],
)
def test_inputs_that_are_no_images(model, images, message):
    with pytest.raises(ConfigError, match=message):
        model.embed(images)


def test_bad_images_raise_with_their_name(model, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"bad\.png: not a readable image"):
        model.embed([*pictures[0], tmp_path / "bad.png"])
    with pytest.raises(BadImage, match=r"none\.png: cannot be read"):
        model.embed(tmp_path / "none.png")
    with pytest.raises(BadImage, match="one side is over 200 times the other"):
        model.embed(np.zeros((1, 400, 3), np.uint8))


def test_repr_and_attributes(model, finished):
    assert (model.step, model.crop_px, model.grid, model.feature_width, model.patch_width) == (6, 16, (2, 2), 96, 96)
    assert repr(model) == f"<cmd_jax model vit_micro/8 at 16 px, mil features of 96, step 6, from {finished[0]}>"
    assert cmd_jax.load(finished[0], step=3).fingerprint != model.fingerprint


def test_exported_file_gives_identical_features(model, exported, pictures, photo_folder):
    single = cmd_jax.load(exported)
    np.testing.assert_array_equal(single.embed(pictures[0]), model.embed(pictures[0]))
    np.testing.assert_array_equal(single.mil_weights(pictures[0]), model.mil_weights(pictures[0]))
    assert (single.step, single.fingerprint) == (model.step, model.fingerprint)
    assert str(photo_folder.parent).encode() not in exported.read_bytes()  # nor any other path of this machine
    assert json.loads(read_metadata(str(exported))["cmd_jax"])["config"]["data"]["folder"] == photo_folder.name


def _changed(exported, path, change=None, **about):
    """A copy of our file with other metadata, or other arrays."""
    arrays, stored = read_safetensors(str(exported)), json.loads(read_metadata(str(exported))["cmd_jax"])
    stored |= about
    if change is not None:
        change(arrays, stored)
    write_safetensors(str(path), arrays, {"cmd_jax": json.dumps(stored)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, about: arrays["backbone/norm/scale"].__setitem__(3, 7), "its fingerprint differs"),
        (lambda arrays, about: arrays.pop("backbone/norm/scale"), "its fingerprint differs"),
        (lambda arrays, about: about.pop("config"), "damaged metadata"),
        (lambda arrays, about: about.update(config=[]), "damaged metadata"),
        (lambda arrays, about: about.update(schema=2), "has format 2, and this version reads 1"),
        (lambda arrays, about: about.update(step=-1), "says step -1 of 'teacher'"),
        (lambda arrays, about: about["config"]["optim"].update(lr="fast"), r"optim\.lr is 'fast'; it must be a number"),
        (lambda arrays, about: about["config"]["optim"].update(lrr=1.0), r"unknown config key optim\.lrr"),
        (lambda arrays, about: about["config"].update(optim=3), "configuration that is none|optim"),
        (lambda arrays, about: about["config"].update(note="x" * 2**20), "characters of metadata"),
    ],
)
def test_a_damaged_or_edited_file_is_refused(change, message, exported, tmp_path):
    with pytest.raises(WeightsError, match=message) as error:
        cmd_jax.load(_changed(exported, tmp_path / "a.safetensors", change))
    assert str(tmp_path / "a.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_ask_for_too_much(exported, tmp_path):
    """Edited with care: the fingerprint is of what is there."""
    from cmd_jax.weights.single import Single, read_single, write_single

    whole, path = read_single(str(exported)), str(tmp_path / "a.safetensors")
    config = json.loads(json.dumps(whole.config))
    config["eval"].update(crop_px=16000, resize_px=16000)
    write_single(path, Single(whole.arrays, config, 1, "teacher"))
    with pytest.raises(WeightsError, match="asks for crops of 16000 px; at most 4096"):
        cmd_jax.load(path)
    config["eval"].update(crop_px=16, resize_px=18)
    config["model"]["mlp_dim"] = 100
    write_single(path, Single(whole.arrays, config, 1, "teacher"))
    with pytest.raises(WeightsError, match=r"does not fit its own configuration: .* arrays differ, first backbone/"):
        cmd_jax.load(path)
    text = '{"cmd_jax":' + "[" * 100_000
    write_safetensors(path, {"a": np.zeros(1, np.float32)}, {"cmd_jax": text})
    with pytest.raises(WeightsError, match=r"damaged metadata \(RecursionError"):
        cmd_jax.load(path)


def test_a_backbone_of_another_project(finished, pictures, encoded, tmp_path):
    path = tmp_path / "timm.safetensors"
    export_run(str(finished[0]), None, "teacher", "timm", str(path))
    other = cmd_jax.load(path)
    np.testing.assert_allclose(other.embed(pictures[0]), _unit(np.asarray(encoded.backbone["cls_token"])), atol=2e-6)
    assert (other.config.model.name, other.config.model.patch_size, other.step, other.grid) == ("vit_micro", 8, None, (2, 2))
    assert (other.config.eval.crop_px, other.config.eval.resize_px) == (16, 18)
    with pytest.raises(ConfigError, match="without a MIL scorer; load a run or an export of one"):
        other.mil_weights(pictures[0])
    with pytest.raises(ConfigError, match="features=mil need the MIL scorer"):
        cmd_jax.load(path, features="mil")
    with pytest.raises(ConfigError, match=r"model\.name is 'vit_tiny', but .*timm\.safetensors says 'vit_micro'"):
        cmd_jax.load(path, model="vit_tiny")
    with pytest.raises(ConfigError, match=r"model\.name is 'resnet50'; it must be one of"):
        cmd_jax.load(path, model="resnet50")


def test_sizes_of_another_project_can_be_asked_for(finished, pictures, tmp_path):
    path = str(tmp_path / "timm.safetensors")
    export_run(str(finished[0]), None, "teacher", "timm", path)
    whole = cmd_jax.load(path, image_px=24, resize_px=24)
    square = pictures[1][0][:24, :24]
    np.testing.assert_array_equal(whole.crop(square), square)
    assert (whole.grid, cmd_jax.load(path, image_px=32).config.eval.resize_px) == ((3, 3), 36)  # in proportion
    with pytest.raises(ConfigError, match=r"eval\.crop_px is 20|views\.global_px is 20; it must be a multiple of model\.patch"):
        cmd_jax.load(path, image_px=20)
    arrays = read_safetensors(path)
    arrays |= {name.replace("blocks.1.", "blocks.2."): array for name, array in arrays.items()}  # of no known depth
    write_safetensors(str(tmp_path / "deep.safetensors"), arrays)
    with pytest.raises(ConfigError, match=r"set model\.num_heads \(in Python num_heads\), for example 1"):
        cmd_jax.load(tmp_path / "deep.safetensors")
    deep = cmd_jax.load(tmp_path / "deep.safetensors", num_heads=3)
    assert (deep.config.model.name, deep.config.model.depth, deep.attention(square).shape[1]) == ("vit", 3, 3)


def test_unlearned_scorer_and_several_pools(pictures, photo_folder, tmp_path):
    config = tiny()
    config.data.source, config.data.folder = "folder", str(photo_folder)
    config.train.epochs = config.optim.warmup_epochs = 1.0
    config.method.mil_scorer, config.method.image_pool, config.eval.features = "mean", "cls+mil", "cls+mil"
    train_and_evaluate(config, str(tmp_path / "run"))
    model = cmd_jax.load(tmp_path / "run")
    export_run(str(tmp_path / "run"), None, "teacher", "safetensors", str(tmp_path / "a.safetensors"))
    features = model.embed(pictures[1])
    np.testing.assert_array_equal(cmd_jax.load(tmp_path / "a.safetensors").embed(pictures[1]), features)
    parts = [cmd_jax.load(tmp_path / "run", features=name).embed(pictures[1]) for name in ("cls", "mean")]
    np.testing.assert_allclose(features, np.concatenate(parts, axis=1) / np.sqrt(2), atol=1e-6)
    with pytest.raises(ConfigError, match="without a MIL scorer"):
        model.mil_weights(pictures[1])
    card = (tmp_path / "a.safetensors.md").read_text()
    assert "There is no MIL scorer" in card
    assert "and MIL scorer" not in card


def test_arguments_that_do_not_fit_are_refused(finished, exported, tmp_path):
    with pytest.raises(ConfigError, match="is a run, which knows its model; leave model=vit_small out"):
        cmd_jax.load(finished[0], model="vit_small")
    with pytest.raises(ConfigError, match="is no work directory of a run; leave step=3 out"):
        cmd_jax.load(exported, step=3)
    with pytest.raises(ConfigError, match="knows its model; leave image_px=32 out"):
        cmd_jax.load(exported, image_px=32)
    with pytest.raises(ConfigError, match=r"eval\.features is 'best'; it must be one of"):
        cmd_jax.load(finished[0], features="best")
    with pytest.raises(ConfigError, match="batch_size is 0; it must be a whole number from 1 on"):
        cmd_jax.load(finished[0], batch_size=0)
    with pytest.raises(WeightsError, match="does not exist"):
        cmd_jax.load(tmp_path / "none")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        cmd_jax.lode  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    program = "import cmd_jax, sys; assert not {'jax', 'numpy', 'flax', 'cmd_jax.api'} & set(sys.modules); cmd_jax.load"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_documented_example_runs(finished, photo_folder, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(finished[0])
    (tmp_path / "photos").symlink_to(photo_folder)
    monkeypatch.chdir(tmp_path)
    embed_folder(trained, "photos/train", "features.parquet")
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("api.md", "features.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "docs", "exec"), names)  # the page is the program under test
    assert "vit_micro/8 at 16 px" in capsys.readouterr().out
    assert names["nearest"].shape == (5,)
    assert all("a class" in sorted(names["paths"])[index] for index in names["nearest"][:1])
    assert names["patch"].shape == (8, 8, 3)
    assert (names["tokens"].shape, names["attention"].shape) == ((12, 2, 2, 96), (12, 3, 2, 2))
    np.testing.assert_allclose(names["features"], cmd_jax.load("runs/photos").embed("photos/train"), atol=2e-6)
