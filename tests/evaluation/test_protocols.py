"""k-NN and retrieval against golden numbers; pointing against a hand-made picture."""

import numpy as np
import pytest

from cmd_jax.evaluation.knn import knn_classify, knn_votes
from cmd_jax.evaluation.pointing import patches_on_parts, pointing
from cmd_jax.evaluation.retrieval import average_precision, retrieval


def test_knn_matches_golden_numbers(golden):
    arrays, meta = golden("knn")
    data = [arrays[f"in_{split}_{what}"] for split in ("train", "test") for what in ("feats", "labels")]
    for k in meta["k"]:
        votes = knn_votes(*data[:3], k=k, temp=meta["T"], classes=meta["num_classes"])
        np.testing.assert_allclose(votes, arrays[f"out_knn{k}_votes"], rtol=1e-4)
        result = knn_classify(*data, k=k, temp=meta["T"], classes=meta["num_classes"])
        assert result.top1 == pytest.approx(float(arrays[f"out_knn{k}_top1"]), abs=1e-5)
        assert result.top5 == pytest.approx(float(arrays[f"out_knn{k}_top5_positive_votes_only"]), abs=1e-5)


@pytest.mark.parametrize("kind", ["", "raw_"])
def test_retrieval_matches_golden_numbers(golden, kind):
    arrays, _ = golden("knn")
    train, test = (arrays[f"in_{split}_{kind.strip('_')}feats"] for split in ("train", "test"))
    result = retrieval(train, arrays["in_train_labels"], test, arrays["in_test_labels"])
    np.testing.assert_allclose(result[:3], arrays[f"out_retrieval_{kind}origin"], atol=0.01)


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
