"""Intervals, accuracy of classes and confused pairs."""

import numpy as np
import pytest

from cmd_jax.evaluation.knn import PAIRS, confusions, per_class
from cmd_jax.evaluation.protocol import interval
from cmd_jax.metrics import Confusion, Metrics, confusion_table


def test_interval_equals_the_normal_approximation():
    values = np.arange(400) < 120  # 30 %
    low, high = interval(values, 0)
    error = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - error, abs=0.1 * error)
    assert high == pytest.approx(0.3 + error, abs=0.1 * error)
    assert interval(values, 0) == (low, high)
    assert interval(values, 1) != (low, high)
    assert interval(10 * values, 0) == pytest.approx((10 * low, 10 * high))


def test_interval_of_constants():
    assert interval(np.full(7, 0.25), 0) == (0.25, 0.25)
    assert interval(np.array([True]), 0) == (1.0, 1.0)


def test_interval_coverage():
    rng = np.random.default_rng(0)
    found = [interval(rng.random(60) ** 2, seed) for seed in range(200)]  # the mean is 1/3
    assert 0.88 < np.mean([low <= 1 / 3 <= high for low, high in found]) < 0.99


def test_classes_and_confusions_by_hand():
    names = ("a", "b", "c", "no test image")
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 1, 1, 2, 0, 1, 0, 3])
    assert per_class(predictions, labels, names) == {"a": 25.0, "b": 50.0, "c": 0.0}
    assert confusions(predictions, labels, names) == [
        Confusion("a", "b", 2, 50.0),
        # one image each: the larger share of its class first, then the order of the classes
        Confusion("b", "a", 1, 50.0),
        Confusion("c", "a", 1, 50.0),
        Confusion("c", "no test image", 1, 50.0),
        Confusion("a", "c", 1, 25.0),
    ]
    metrics = Metrics(0, "", [], {}, "", confusions(predictions, labels, names), {})
    assert confusion_table(metrics, lines=1).splitlines()[1:] == ["     2   50.0  a -> b"]
    assert confusions(labels, labels, names) == []


def test_the_tail_of_the_confusions_is_cut():
    labels = np.arange(200)
    assert len(confusions((labels + 1) % 200, labels, tuple(map(str, labels)))) == PAIRS
