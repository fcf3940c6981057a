"""The references' linear probe: its crops, its steps, and what it may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cmd_jax import config as config_lib
from cmd_jax.data.augment import resized_crop
from cmd_jax.evaluation import linear
from cmd_jax.evaluation.evaluate import evaluate
from cmd_jax.evaluation.linear import Probe, held_out, start, step, training_crop
from cmd_jax.evaluation.splits import open_splits
from cmd_jax.models.build import init_params, make_network
from tests.conftest import quick, tiny


@pytest.mark.parametrize("box", [(3, 5, 40, 31), (0, 0, 13, 11), (1, 2, 16, 16)])
def test_crops_are_pillows_bilinear_ones(box):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    top, left, height, width = box
    cut = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    # Along x, then along y: in one call Pillow chooses the order by the shape.
    expected = np.asarray(cut.resize((16, height), Image.Resampling.BILINEAR).resize((16, 16), Image.Resampling.BILINEAR))
    crop = resized_crop(pixels, jnp.array(box, jnp.float32), jnp.array(False), 16, interpolation="bilinear")
    assert np.max(np.abs(np.asarray(crop) - expected)) <= 1  # where a level lies in the middle of two
    assert np.mean(np.asarray(crop) != expected) < 0.05


def test_training_crops_match_random_resized_crop():
    # the picture's pixel says where it is: red its row, green its column
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(64)[:, None], 4 * np.arange(64)
    keys = jax.random.split(jax.random.key(0), 300)
    crops = jax.jit(jax.vmap(lambda key: training_crop(key, pixels, jnp.array([64, 64]), 32)))(keys)
    rows, columns = np.ptp(crops[..., 0], axis=(1, 2)) / 252, np.ptp(crops[..., 1], axis=(1, 2)) / 252
    area = rows * columns
    assert 0.05 < area.min() < 0.1
    assert area.max() > 0.9
    assert abs(np.median(area) - 0.52) < 0.08  # uniform in 0.08 to 1, less the largest that do not fit
    flipped = np.asarray(crops[:, 16, 0, 1] > crops[:, 16, -1, 1])
    assert 0.4 < flipped.mean() < 0.6


def _slow(features, labels, weights, rates, kernel):
    """SGD with momentum 0.9 as PyTorch does it, one classifier after the other."""
    found = []
    for rate, seen in zip(rates, weights, strict=True):
        w, b = kernel.astype(np.float64), np.zeros(kernel.shape[1])
        mw, mb = np.zeros_like(w), np.zeros_like(b)
        for x, y, s in zip(features, labels, seen, strict=True):
            logits = x @ w + b
            probs = np.exp(logits - logits.max(1, keepdims=True))
            probs /= probs.sum(1, keepdims=True)
            error = (probs - np.eye(len(b))[y]) * s[:, None] / max(1, s.sum())
            mw, mb = 0.9 * mw + x.T @ error, 0.9 * mb + error.sum(0)
            w, b = w - rate * mw, b - rate * mb
        found.append((w, b))
    return found


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 6, 5)).astype(np.float32)  # four batches of six
    weights = (rng.random((2, 4, 6)) < 0.7).astype(np.float32)
    weights[0, 1] = 0  # a batch of which the first classifier sees nothing
    return features, rng.integers(0, 3, (4, 6)), weights, np.array([0.1, 0.5], np.float32)


def _train(features, labels, weights, rates):
    probe = start(2, 5, 3, seed=0)
    for number in range(len(features)):
        probe = step(probe, features[number], labels[number].astype(np.int32), weights[:, number], rates)
    return probe


def test_parallel_classifiers_equal_separate_ones(problem):
    probe = _train(*problem)
    assert isinstance(probe, Probe)
    first = np.asarray(start(2, 5, 3, seed=0).layers.kernel)
    np.testing.assert_array_equal(first[0], first[1])
    assert 0.003 < first.std() < 0.02
    for index, (kernel, bias) in enumerate(_slow(*problem, first[0])):
        np.testing.assert_allclose(probe.layers.kernel[index], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(probe.layers.bias[index], bias, rtol=1e-4, atol=1e-6)


def test_hidden_images_do_not_change_a_classifier(problem):
    features, labels, weights, rates = problem
    changed = np.where(weights[0] == 0, (labels + 1) % 3, labels)
    (kernel, _), (other, _) = _train(*problem).layers, _train(features, changed, weights, rates).layers
    np.testing.assert_array_equal(kernel[0], other[0])
    assert np.any(kernel[1] != other[1])


def test_a_fifth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2, 3], [50, 5, 2, 1])
    assert np.bincount(labels[held_out(labels, 0)], minlength=4).tolist() == [10, 1, 1, 0]
    assert np.any(held_out(labels, 0) != held_out(labels, 1))


@pytest.fixture(scope="module")
def subject(photo_folder):
    config = tiny()
    config.data.source, config.data.folder, config.data.cache = "folder", str(photo_folder), "ram"
    config.eval.linear_epochs, config.eval.linear_batch_size, config.eval.last_blocks = 4, 9, 1
    config = config_lib.resolve(config, 24)
    network = make_network(config)
    return config, network, quick(lambda: init_params(config, network))(), 0, open_splits(config)[0]


def test_the_probe_of_a_random_network_tells_colours(subject):
    polls = []
    rows = evaluate(*subject, lambda: polls.append(0), ("linear",)).metrics.numbers
    assert [row.key for row in rows] == ["linear_top1", "linear_top5"]
    assert rows[0].value >= 75  # of three classes
    assert rows[0].low <= rows[0].value <= rows[0].high
    assert "last epoch of 4, SGD, batch 9, lr " in rows[0].protocol
    assert "chosen on 6 train images held out, last 1 blocks at 16 px" in rows[0].protocol
    # 3 + 2 batches of all features, 11 of the probe's training (4 x 24 / 9), 1 of the held-out images, 2 of the test images,
    # and one chunk of queries of k-NN
    assert len(polls) == 5 + 11 + 1 + 2 + 1
    assert rows == evaluate(*subject, protocols=("linear",)).metrics.numbers  # a function of the seed


def test_no_rate_is_chosen_on_test_labels(subject, monkeypatch):
    """Without held-out images the smallest rate is taken, however badly it does on the test images."""
    config, *rest = subject
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.linear_lrs = (1e-9, 0.3)
    lr = lambda: evaluate(config, *rest, protocols=("linear",)).metrics.numbers[0].protocol.split("lr ")[1].split()[0]
    assert lr() == "0.3"
    monkeypatch.setattr(linear, "held_out", lambda labels, seed: np.zeros(len(labels), bool))
    assert lr() == "1e-09"
