"""The rounds that the benchmark of labelling plays."""

import numpy as np

from benchmarks.labelling import actions_for, play


def test_pure_groups_cost_one_action_each():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.array(["a", "b", "c", "d"]), 12)
    features = np.repeat(np.eye(4), 12, axis=0) + 0.01 * rng.normal(size=(48, 4))
    assert play(features, truth, enough=1.0) == [(0, 0, 0.0), (12, 48, 1.0)]  # 48 images in groups of four on average
    assert play(features, truth)[-1] == (11, 47, 1.0)  # what is right by then is enough


def test_actions_are_the_fewest_of_two_ways():
    assert actions_for(np.array(["a"] * 5)) == 1
    assert actions_for(np.array(["a", "b", "a", "b", "a", "a"])) == 4  # a name, two selections, a move
    assert actions_for(np.array(["a", "b", "c"])) == 3  # one by one
