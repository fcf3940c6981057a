"""k-NN, retrieval and pointing against hand-made cases."""

import numpy as np
import pytest

from cmd_jax.evaluation.knn import knn_classify, knn_votes
from cmd_jax.evaluation.pointing import patches_on_parts, pointing
from cmd_jax.evaluation.retrieval import average_precision, ratio_split


def test_knn_by_hand():
    gallery = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    queries = np.array([[1.0, 0.0], [0.0, 1.0]])
    votes = knn_votes(gallery, np.array([0, 1, 1]), queries, k=2, temp=0.5, classes=3)
    np.testing.assert_allclose(votes, [[np.exp(2), np.exp(1.6), 0], [0, np.exp(2) + np.exp(1.2), 0]])
    result = knn_classify(gallery, np.array([0, 1, 1]), queries, np.array([1, 2]), k=2, temp=0.5, classes=3)
    # the second query's class has no vote, and fewer than five classes have one
    assert (result.top1, result.top5, result.open_top5) == (0.0, 50.0, 1)
    np.testing.assert_array_equal(result.predictions, [0, 1])


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
    np.testing.assert_allclose(average_precision(relevant), [5 / 6, 0])


def test_patches_on_parts_counts_large_and_tiny_boxes_and_skips_empty_ones():
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
