"""ONNX exports in ONNX Runtime: our features, by the code of the model card in a process without this package."""

import numpy as np
import onnx
import onnxruntime
import pytest

import cmd_jax
from cmd_jax.errors import WeightsError
from cmd_jax.inference.export import export_run
from cmd_jax.inference.programs import OUTPUTS, write_onnx
from cmd_jax.inference.run import place
from tests.inference.test_export import OPTIONS, coarse_images, random_network, run_card

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert export_run(str(finished[0]), None, "teacher", "onnx", str(path))[0] == 6
    return path


@pytest.mark.parametrize("count", [1, 5])
def test_the_code_of_the_card_gives_our_features(count, exported, finished, photo_folder, tmp_path):
    paths = sorted((photo_folder / "test").rglob("*.png"))[:count]
    found = run_card(f"{exported}.md", tmp_path / "out.npz", paths)
    model = cmd_jax.load(finished[0])
    np.testing.assert_array_equal(found["images"], np.stack([model.crop(path) for path in paths]))
    np.testing.assert_allclose(found["features"], model.embed(paths), atol=TOLERANCE)
    np.testing.assert_allclose(found["weights"], model.mil_weights(paths).reshape(count, -1), atol=TOLERANCE)


def test_metadata_describe_how_images_are_prepared(exported, finished):
    model = onnx.load(str(exported))
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    fingerprint = cmd_jax.load(finished[0]).fingerprint
    expected = {"step": "6", "fingerprint": fingerprint, "features": "mil", "resize_px": "18", "crop_px": "16"}
    expected |= {"resize_mode": "shorter_side", "interpolation": "bicubic"}
    assert expected.items() <= facts.items()


@pytest.mark.parametrize(
    "network",
    [
        random_network("vit_tiny", 224, eval_features="blocks+mil"),
        random_network("swin_micro", 64, model_window=2, eval_features="mean+mil"),  # with shifted windows
        random_network("swin_tiny", 224, model_window=7),
        random_network("vit_micro", 32, model_patch_size=8, data_grayscale=True, data_normalization="local_contrast"),
        random_network("vit_micro", 32, **OPTIONS),
        random_network("vit_micro", 48, model_patch_size=8, model_table_px=32, model_resample_rule="antialiased"),
    ],
    ids=["vit_tiny", "swin_micro", "swin_tiny", "grey levels, local contrast", "options", "resampled positions"],
)
def test_onnx_runtime_computes_the_same(network, tmp_path):
    path = str(tmp_path / "a.onnx")
    write_onnx(path, network)
    images = coarse_images(network.config.eval.crop_px)
    if network.config.data.grayscale:
        images[..., 1:] = images[..., :1]
    (expected,) = place(network).run(images, OUTPUTS, batch_size=3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (3, 1):
        outputs = session.run(list(OUTPUTS), {"images": images[:count]})
        for name, output in zip(OUTPUTS, outputs, strict=True):
            np.testing.assert_allclose(output, expected[name][:count], atol=TOLERANCE, err_msg=name)
    assert np.std(expected["features"], axis=0).max() > 1e-2


def test_unknown_conversions_are_refused(tmp_path):
    network = random_network("swin_micro", 96, model_window=5)  # maps of 24, 12, 6 and 3 are padded to windows
    with pytest.raises(WeightsError, match=r"jax2onnx cannot convert this swin_micro at 96 px \(.*; use --format=stablehlo"):
        write_onnx(str(tmp_path / "a.onnx"), network)
