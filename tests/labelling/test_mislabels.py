"""Planted errors are found, and the threshold is what a plain search says."""

import numpy as np

from cmd_jax.labelling.mislabels import _threshold, find_mislabels, plant


def test_planted_errors_are_found():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 40)
    features = rng.normal(size=(6, 12))[labels] + 0.7 * rng.normal(size=(240, 12))
    changed, bad = plant(labels, seed=3)
    assert bad.sum() == 12
    np.testing.assert_array_equal(changed != labels, bad)
    found = find_mislabels(features, np.array(["abcdef"[label] for label in changed]))
    hits = bad[found.rows]
    assert hits.sum() >= 11
    assert hits.mean() >= 0.5
    assert [str(name) for name in found.other[hits]] == ["abcdef"[label] for label in labels[found.rows[hits]]]
    assert np.all(np.diff(found.probability) >= 0)


def test_threshold_is_the_largest_that_is_precise():
    rng = np.random.default_rng(1)
    bad = rng.random(200) < 0.1
    own = np.where(bad, rng.beta(1, 9, 200), rng.beta(4, 2, 200))
    threshold, precision, recall = _threshold(own, bad)
    below = lambda value: own <= value
    expected = max(value for value in own if bad[below(value)].mean() >= 0.5)
    np.testing.assert_array_equal(own < threshold, below(expected))
    assert precision == bad[below(expected)].mean()
    assert recall == bad[below(expected)].sum() / bad.sum()


def test_too_few_images_raise_no_suspicion():
    assert len(find_mislabels(np.eye(6), np.array(list("aabbcc"))).rows) == 0
    assert len(find_mislabels(np.eye(6), np.array(["a"] * 6)).rows) == 0
