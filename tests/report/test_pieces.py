"""Projections, patches, matches and curves against oracles written from their definitions."""

import itertools
import json

import jax
import numpy as np
import pytest

from cmd_jax.inference.patches import BATCH, class_attention, read_patches
from cmd_jax.inference.preprocess import eval_images
from cmd_jax.inference.run import Encoder, normalized
from cmd_jax.report.curves import COLOURS, HIDDEN, POINTS, Curve, charts, read_curves
from cmd_jax.report.facts import duration, source_commit
from cmd_jax.report.images import heat_overlay, patch_mosaic, short, tile, upsample
from cmd_jax.report.similarity import feature_map, matches, nearest, patch_colours, principal


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_principal_components_by_singular_values(rng):
    rows = rng.normal(size=(40, 6)) * (5, 3, 1, 0.5, 0.2, 0.1)
    scores, shares = principal(rows, 3)
    left, values, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    signs = np.sign(right[np.arange(3), np.argmax(np.abs(right[:3]), axis=1)])
    np.testing.assert_allclose(scores, left[:, :3] * values[:3] * signs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shares, values[:3] ** 2 / np.sum(values**2), rtol=1e-6)
    np.testing.assert_allclose(principal(-rows, 3)[0], -scores, rtol=1e-5, atol=1e-5)  # an axis does not turn with the data


def test_principal_components_beyond_the_rank_are_zero(rng):
    scores, shares = principal(rng.normal(size=(2, 5)), 3)
    assert np.ptp(scores[:, 0]) > 0
    np.testing.assert_allclose(scores[:, 2], 0)
    np.testing.assert_array_equal(principal(np.ones((4, 5)), 3)[0], 0)
    assert shares.shape == (3,)


def test_patches_of_one_kind_have_one_colour(rng):
    kinds = np.repeat([0, 1, 2, 3], 4).reshape(2, 8)
    tokens = np.eye(8)[kinds] + rng.normal(size=(2, 8, 8)) * 1e-3
    colours, shares = patch_colours(tokens)
    assert colours.shape == (2, 8, 3)
    assert (colours.min(), colours.max()) == (0, 1)
    means = np.stack([colours[kinds == kind].mean(0) for kind in range(4)])
    assert max(np.ptp(colours[kinds == kind], axis=0).max() for kind in range(4)) < 0.1
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(means, 2)) > 0.3
    assert shares.sum() > 0.99
    np.testing.assert_array_equal(patch_colours(np.ones((1, 4, 5)))[0], 0.5)


def test_the_map_groups_images_and_is_reproducible(rng):
    group = np.repeat([0, 1, 2], 20)
    features = np.eye(8)[group] + rng.normal(size=(60, 8)) * 0.05
    places, how = feature_map(features, seed=3)
    assert how.startswith("t-SNE, perplexity 19.7")
    assert np.abs(places).max() == 1
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.diag(np.full(60, np.inf))
    np.testing.assert_array_equal(group[np.argmin(distances, axis=1)], group)
    np.testing.assert_array_equal(feature_map(features, seed=3)[0], places)


@pytest.mark.parametrize("features", [np.eye(4)[[0, 1, 2]], np.ones((30, 4)), np.ones((1, 4))])
def test_maps_of_few_images_are_a_pca(features):
    places, how = feature_map(features, seed=0)
    assert how == "PCA"
    assert places.shape == (len(features), 2)
    assert np.isfinite(places).all()


def test_class_attention_leaves_itself_and_registers_out():
    attention = np.zeros((1, 2, 3), np.float32)  # two heads, three patches; the rest is the class token's and a register's
    attention[0, 0] = (0.4, 0.0, 0.0)
    attention[0, 1] = (0.0, 0.2, 0.2)
    np.testing.assert_allclose(class_attention(attention), [[0.5, 0.25, 0.25]], rtol=1e-6)


def test_the_inspector_agrees_with_the_network(measured):
    evaluation, config, network, teacher, splits, _ = measured
    rows = list(range(BATCH + 2))
    patches = read_patches(Encoder(config, network.backbone, teacher), splits.train, rows)
    np.testing.assert_allclose(patches.mil_weights, evaluation.gallery.mil_weights[rows], atol=1e-5)
    np.testing.assert_allclose(patches.attention.sum(1), 1, rtol=1e-5)
    crops = np.stack([crop for crop, *_ in eval_images(splits.train, config, [0, 17])])
    encode = jax.jit(lambda images: network.apply({"params": teacher}, normalized(images, config)).patch_tokens)
    np.testing.assert_allclose(patches.tokens[[0, 17]], encode(crops), atol=1e-4)


def _image(rng, patches=4, width=5):
    tokens, weights = rng.normal(size=(patches, width)), rng.random(patches)
    return tokens, weights / weights.sum()


def test_matches_by_the_slow_loop(rng):
    (tokens, weights), (others, other_weights) = a, b = _image(rng), _image(rng)
    value = {}
    for i, j in itertools.product(range(4), repeat=2):
        cosine = tokens[i] @ others[j] / (np.linalg.norm(tokens[i]) * np.linalg.norm(others[j]))
        value[i, j] = (weights[i] * other_weights[j] * cosine, cosine)
    total, left, expected = sum(v for v, _ in value.values() if v > 0), dict(value), []
    while left and max(left.values())[0] > 0:
        i, j = max(left, key=left.get)
        expected.append((i, j, left[i, j][1], left[i, j][0] / total))
        left = {pair: v for pair, v in left.items() if pair[0] != i and pair[1] != j}
    found = matches(*a, *b, count=10)
    assert [match[:2] for match in found] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([match[2:] for match in found], [pair[2:] for pair in expected], rtol=1e-6)
    assert matches(*a, *b, count=2) == found[:2]


def test_an_image_matches_itself_and_not_its_opposite(rng):
    image = _image(rng)
    assert all(match.query == match.neighbour and match.cosine == pytest.approx(1) for match in matches(*image, *image, 1))
    tokens, weights = np.ones((2, 3)), np.full(2, 0.5)
    assert matches(tokens, weights, -tokens, weights) == []


def test_nearest_skips_the_image_itself():
    gallery = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    np.testing.assert_array_equal(nearest(gallery[:1], gallery, 2), [[0, 1]])
    np.testing.assert_array_equal(nearest(gallery, gallery, 9, np.arange(3)), [[1, 2], [0, 2], [1, 0]])


def test_short_names():
    assert short("/home/me/train/a class/0.png") == "a class/0.png"
    assert short("C:\\photos\\x.png") == "photos/x.png"
    assert short("bird_7") == "bird_7"


def test_overlays_and_tiles():
    pixels = np.full((8, 8, 3), 100, np.uint8)
    out = heat_overlay(pixels, np.array([0.1, 0.7, 0.1, 0.1]), 1 / 2).astype(int)
    assert out[0, -1].sum() > out[0, 0].sum() > 0  # the brightest place is that of the largest weight
    beyond = upsample(np.arange(4.0), 0.8, 10)  # 2 x 2 patches of 8 px on a crop of 10
    assert beyond.shape == (10, 10)
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(patch_mosaic(colours, 1 / 2, 4)[0], [[255, 0, 0]] * 2 + [[0, 255, 0]] * 2)
    sheet = tile([np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3)], columns=2)
    np.testing.assert_array_equal(sheet[..., 0], [[1, 1, 2, 2]] * 2 + [[3, 3, 0, 0]] * 2)


def test_curves_have_gaps_and_lose_no_key(tmp_path):
    lines = [{"step": step, "loss": None if step == 2 else 1.0 / step, "loss_x": 1.0, "new": 2.0} for step in (1, 2, 3)]
    text = "\n".join(map(json.dumps, [*lines, {"step": 3, "eval_rank1": 5.0}]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 4, "lo')
    curves = read_curves(str(tmp_path))
    assert curves["loss"] == Curve([1, 2, 3], [1.0, None, pytest.approx(1 / 3)])
    assert curves["eval_rank1"] == Curve([3], [5.0])
    found = charts([("", {**curves, HIDDEN[0]: Curve([1], [0.0])})])
    assert [chart["keys"] for chart in found] == [["loss"], ["loss_x"], ["eval_rank1"], ["new"]]
    assert found[0]["table"]["rows"] == [["1", "1"], ["2", "not finite"], ["3", "0.3333"]]
    assert found[0]["summary"] == "loss from 1 to 0.3333"
    assert read_curves(str(tmp_path / "nothing")) == {}


def test_long_curves_are_thinned_and_overlaid():
    long = {"loss": Curve(list(range(5000)), [1.0] * 5000), "grad_norm": Curve([1], [None])}
    found = charts([("a", long), ("b", {"loss": Curve([7], [2.0])})])
    loss, norm = found
    assert loss["legend"] == [("a", COLOURS[0]), ("b", COLOURS[1])]
    steps = loss["figure"]["data"][0]["x"]
    assert (len(steps), steps[0], steps[-1]) == (POINTS, 0, 4999)
    assert norm["summary"] == "a has no finite number"


def test_commit_and_duration(tmp_path):
    assert source_commit(str(tmp_path)) == ""
    (tmp_path / ".git").write_text("gitdir: nowhere")  # what git refuses is no commit
    assert source_commit(str(tmp_path)) == ""
    assert [duration(s) for s in (59.6, 119, 600, 7200, 9000)] == ["60 s", "119 s", "10 min", "2 h 00 min", "2 h 30 min"]
