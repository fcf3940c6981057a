"""The rounds that the benchmark of labelling plays."""

import numpy as np

from benchmarks.labelling import play


def test_pure_groups_cost_one_action_each():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.array(["a", "b", "c", "d"]), 12)
    features = np.repeat(np.eye(4), 12, axis=0) + 0.01 * rng.normal(size=(48, 4))
    rounds = play(features, truth)
    assert rounds[0] == (0, 0, 0.0)
    assert rounds[-1] == (12, 48, 1.0)  # 48 images in groups of four on average
