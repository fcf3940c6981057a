"""The fast linear probe: whose minimum it finds, how it chooses, what it draws. All have one shape, and so one program."""

import numpy as np
import pytest

from cmd_jax.evaluation.logistic import FITS, ROWS_UNIT, STRENGTHS, LinearModel, fit_predict, fraction_of, programs

WIDTH, CLASSES = 20, 3


def _gaussians(count, noise, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    return (np.eye(CLASSES, WIDTH)[labels] + noise * rng.normal(size=(count, WIDTH))).astype(np.float32), labels


def _fit(features, labels, weights, strength):
    """LinearModel and scaler of the rows of weight 1, and the classes of all rows."""
    pad = lambda array: np.pad(array, [(0, ROWS_UNIT - len(array))] + [(0, 0)] * (array.ndim - 1))
    features, labels, weights = pad(features), pad(labels.astype(np.int32)), pad(weights.astype(np.float32))
    axes = np.linalg.qr(np.random.default_rng(2).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)  # any axes will do
    rows, scaler = programs().prepare(features, axes, labels, weights)
    zero = LinearModel(np.zeros((WIDTH, CLASSES), np.float32), np.zeros(CLASSES, np.float32))
    model, found = programs().fit(rows, np.float32(strength), zero)
    return LinearModel(axes @ np.asarray(model.kernel), np.asarray(model.bias)), scaler, np.asarray(found)


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2)])
def test_it_finds_the_minimum_of_scikit_learn(present):
    """Of the rows that count alone, and of the classes that they have: two are one logistic function there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = _gaussians(240, 0.8, 0)
    features[:, -1] = 0.3  # constant: centered, not divided by rounding
    weights = np.isin(labels, present) & (np.arange(240) % 5 > 0)
    theirs = StandardScaler().fit(features[weights])
    for strength in (1e-2, 1.0):
        model, scaler, found = _fit(features, labels, weights, strength)
        oracle = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000)
        oracle.fit(theirs.transform(features[weights]), labels[weights])
        logits = np.asarray(model.logits((features - scaler.mean) / scaler.deviation))[:, list(present)]
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected = oracle.predict_proba(theirs.transform(features))
        np.testing.assert_allclose(probabilities, expected, atol=5e-3)
        assert np.mean(found[:240] == oracle.predict(theirs.transform(features))) > 0.99


def test_noise_is_regularised_more_than_structure():
    structure, labels = _gaussians(240, 0.05, 0)
    rng = np.random.default_rng(0)
    tilted = structure.copy()
    tilted[:, 3:] += 4 * rng.normal(size=(240, 17))  # three directions of twenty tell the classes, and only together
    assert fit_predict(tilted, labels, structure, seed=0)[1] < STRENGTHS[-1]
    assert np.all(fit_predict(structure, labels, structure, seed=0)[0] == labels)


def test_strength_depends_on_training_images_alone():
    train, labels = _gaussians(60, 0.8, 0)
    test, _ = _gaussians(30, 0.8, 1)
    first, strength = fit_predict(train, labels, test, seed=0)
    again, other = fit_predict(train, labels, np.concatenate([test, 100 * test]), seed=0)
    np.testing.assert_array_equal(first, again[:30])
    assert strength == other


def test_classes_of_one_image():
    calls = []
    train = np.eye(CLASSES, WIDTH, dtype=np.float32)
    predictions, _ = fit_predict(train, np.arange(3), train, seed=0, poll=lambda: calls.append(0))
    np.testing.assert_array_equal(predictions, [0, 1, 2])
    assert len(calls) == FITS  # as many as of any other data: processes wait for one another in it
    assert not np.any(_fit(train, np.arange(3), np.arange(3) == 1, 1.0)[2][:3] != 1)


def test_fractions_are_stratified_and_nested():
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    fifth, half = (fraction_of(labels, fraction, seed=1) for fraction in (0.2, 0.5))
    assert np.bincount(labels[fifth]).tolist() == [10, 2, 1]  # one of two images: none would be no class
    assert np.bincount(labels[half]).tolist() == [25, 5, 1]
    assert np.all(half[fifth])
    assert np.any(fraction_of(labels, 0.2, seed=2) != fifth)
    assert np.all(fraction_of(labels, 1.0, seed=1))
