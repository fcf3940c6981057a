"""Images of another subject are found, also where there are several that are like one another."""

import numpy as np

from cmd_jax.labelling.look import _outliers, crowd_similarity
from cmd_jax.labelling.photos import Photos


def test_a_few_of_another_subject_are_outliers():
    rng = np.random.default_rng(0)
    features = np.repeat(np.eye(2, 8), (200, 4), axis=0) + 0.1 * rng.normal(size=(204, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T - 2 * np.eye(204)
    np.testing.assert_allclose(crowd_similarity(features), np.sort(cosines, axis=1)[:, -20:].mean(axis=1))
    empty = np.full(204, "", object)
    found = _outliers(Photos("", [str(row) for row in range(204)], features, empty, [], empty, empty, [], ""))
    assert {finding.file for finding in found[:4]} == {"200", "201", "202", "203"}
    assert len(found) < 12
    assert _outliers(Photos("", ["one"], features[:1], empty, [], empty, empty, [], "")) == []
