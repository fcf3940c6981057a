"""k-NN, retrieval and pointing against hand-made cases."""

import jax
import numpy as np
import pytest

from cmd_jax.evaluation import devices
from cmd_jax.evaluation.knn import knn_classify, knn_votes, nearest
from cmd_jax.evaluation.pointing import patches_on_parts, pointing
from cmd_jax.evaluation.retrieval import average_precision, query_scores, ratio_split


def test_knn_by_hand():
    gallery, labels = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), np.array([0, 1, 1])
    neighbours = nearest(gallery, np.array([[1.0, 0.0], [0.0, 1.0]]), k=3)
    np.testing.assert_array_equal(neighbours.index, [[0, 1, 2], [2, 1, 0]])
    votes = knn_votes(neighbours, labels, k=2, temp=0.5, classes=3)
    np.testing.assert_allclose(votes, [[np.exp(2), np.exp(1.6), 0], [0, np.exp(2) + np.exp(1.2), 0]], rtol=1e-6)
    result = knn_classify(neighbours, labels, np.array([1, 2]), k=2, temp=0.5, classes=3)
    # the second query's class has no vote, and fewer than five classes have one
    assert (result.top1, result.top5, result.open_top5) == (0.0, 50.0, 1)
    np.testing.assert_array_equal(result.predictions, [0, 1])


def test_knn_in_chunks_with_ties(monkeypatch):
    rng = np.random.default_rng(0)
    gallery, queries = rng.integers(-2, 3, (60, 4)).astype(np.float32), rng.integers(-2, 3, (23, 4)).astype(np.float32)
    labels, wanted = rng.integers(0, 7, 60), rng.integers(0, 7, 23)
    monkeypatch.setattr(devices, "QUERIES_PER_DEVICE", 8)
    calls = []
    found = nearest(gallery, queries, 9, lambda: calls.append(0))
    similarity = queries @ gallery.T  # whole numbers: many are equal
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_array_equal(found.similarity, np.take_along_axis(similarity, order, axis=1))
    assert len(calls) == devices.chunks(23) == -(-23 // (8 * jax.device_count()))
    for k in (3, 9):
        votes = np.zeros((23, 7))
        for query, items in enumerate(order[:, :k]):
            for item in items:
                votes[query, labels[item]] += np.exp(float(similarity[query, item]) / 2)
        ranked = np.argsort(-votes, axis=1, kind="stable")[:, :5]
        right = (ranked == wanted[:, None]) & (np.take_along_axis(votes, ranked, axis=1) > 0)
        result = knn_classify(found, labels, wanted, k=k, temp=2.0, classes=7)
        np.testing.assert_array_equal(result.predictions, ranked[:, 0])
        np.testing.assert_array_equal(result.right5, right.any(axis=1))


def test_retrieval_equals_a_plain_sort():
    rng = np.random.default_rng(0)
    gallery, queries = (rng.normal(size=(count, 8)).astype(np.float32) for count in (300, 40))
    labels, wanted = rng.integers(0, 6, 300), rng.integers(0, 7, 40)  # nothing in the gallery is of the last class
    relevant = (labels == wanted[:, None])[np.arange(40)[:, None], np.argsort(-(queries @ gallery.T), axis=1)]
    precision = np.cumsum(relevant, axis=1) / np.arange(1, 301)
    mean = lambda ranks: np.sum((precision * relevant)[:, :ranks], 1) / np.maximum(1, np.sum(relevant[:, :ranks], 1))
    expected = np.stack([relevant[:, 0], relevant[:, :5].any(1), mean(100), mean(300)], axis=1)
    np.testing.assert_allclose(query_scores(gallery, labels, queries, wanted), expected, rtol=1e-5)
    alike = query_scores(np.ones((300, 8)), labels, np.ones((40, 8)), wanted)
    assert not alike[:, :3].any()
    assert np.all(alike[:, 3] < 0.2)


def test_ratio_split_takes_every_ninth_test_item():
    queries = np.arange(20.0)[:, None]
    gallery, chosen = ratio_split(np.full((2, 1), -1.0), np.array([7, 8]), queries, np.arange(20))
    np.testing.assert_array_equal(chosen[0][:, 0], [0, 9, 18])
    np.testing.assert_array_equal(chosen[1], [0, 9, 18])
    assert gallery[0].shape == (19, 1)
    np.testing.assert_array_equal(gallery[1][:4], [7, 8, 1, 2])
    np.testing.assert_array_equal(gallery[0][2:, 0], gallery[1][2:])


def test_average_precision_by_hand():
    # relevant at ranks 1 and 3: (1/1 + 2/3) / 2; nothing relevant: 0
    relevant = np.array([[True, False, True, False], [False, False, False, False]])
    np.testing.assert_allclose(average_precision(relevant), [5 / 6, 0], rtol=1e-6)


def test_patches_on_large_tiny_and_empty_boxes():
    boxes = np.array([[[0.0, 0.0, 0.5, 0.5], [0.8, 0.8, 0.82, 0.82], [0.9, 0.1, 0.9, 0.1]]])
    expected = np.zeros((4, 4), bool)
    expected[:2, :2] = True  # the centres of four patches lie in the first box
    expected[3, 3] = True  # the second box is smaller than a patch
    np.testing.assert_array_equal(patches_on_parts(boxes, 16, 1 / 4)[0].reshape(4, 4), expected)


def test_pointing_leaves_images_without_parts_out():
    boxes = np.zeros((3, 1, 4), np.float32)
    boxes[0, 0] = boxes[1, 0] = (0.0, 0.0, 0.5, 0.5)
    weights = np.eye(4, dtype=np.float32)[[0, 3, 0]]  # hit, miss, no part
    result = pointing(weights, boxes, 1 / 2)
    assert (result.accuracy, result.chance) == (50.0, 25.0)


def test_patches_may_reach_beyond_the_crop():
    # a Swin's tokens of 32 px on a crop of 48 px: the second column covers the last third alone
    boxes = np.array([[[0.0, 0.7, 0.3, 1.0]]])
    np.testing.assert_array_equal(patches_on_parts(boxes, 4, 32 / 48)[0], [False, True, False, False])


def test_patches_must_form_a_square():
    with pytest.raises(ValueError, match="5 patches"):
        patches_on_parts(np.zeros((1, 1, 4)), 5, 0.5)
