"""The fast linear probe: what it learns, how it chooses, what it draws."""

import numpy as np

from cmd_jax.evaluation.logistic import FOLDS, STRENGTHS, fit_predict, fraction_of


def _gaussians(count, classes, width, noise, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return (np.eye(classes, width)[labels] + noise * rng.normal(size=(count, width))).astype(np.float32), labels


def test_it_comes_near_the_best_that_is_possible():
    # two classes a distance of sqrt(2) apart, noise 0.5: the best rule is right in Phi(sqrt(2) / 2 / 0.5) = 92 %
    train, labels = _gaussians(600, 2, 5, 0.5, 0)
    test, truth = _gaussians(2000, 2, 5, 0.5, 1)
    predictions, _ = fit_predict(train, labels, test, seed=0)
    assert 0.90 < np.mean(predictions == truth) < 0.94


def test_noise_is_regularised_more_than_structure():
    structure, labels = _gaussians(240, 3, 20, 0.05, 0)
    rng = np.random.default_rng(0)
    tilted = structure.copy()
    tilted[:, 3:] += 4 * rng.normal(size=(240, 17))  # three directions of twenty tell the classes, and only together
    assert fit_predict(tilted, labels, structure, seed=0)[1] < STRENGTHS[-1]
    assert np.all(fit_predict(structure, labels, structure, seed=0)[0] == labels)


def test_the_choice_reads_the_training_images_alone_and_repeats_itself():
    train, labels = _gaussians(60, 3, 8, 0.8, 0)
    test, _ = _gaussians(30, 3, 8, 0.8, 1)
    first, strength = fit_predict(train, labels, test, seed=0)
    again, other = fit_predict(train, labels, np.concatenate([test, 100 * test]), seed=0)
    np.testing.assert_array_equal(first, again[:30])
    assert strength == other


def test_classes_of_one_image_and_a_single_class_are_no_error():
    calls = []
    train = np.eye(3, dtype=np.float32)
    predictions, _ = fit_predict(train, np.arange(3), train, seed=0, between=lambda: calls.append(0))
    np.testing.assert_array_equal(predictions, [0, 1, 2])
    assert len(calls) == FOLDS * len(STRENGTHS) + 1  # as many as of any other data: processes wait for one another in it
    assert fit_predict(train, np.full(3, 7), train, seed=0)[0].tolist() == [7, 7, 7]


def test_a_fraction_holds_the_same_share_of_every_class_and_more_holds_less():
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    fifth, half = (fraction_of(labels, fraction, seed=1) for fraction in (0.2, 0.5))
    assert np.bincount(labels[fifth]).tolist() == [10, 2, 1]  # one of two images: none would be no class
    assert np.bincount(labels[half]).tolist() == [25, 5, 1]
    assert np.all(half[fifth])
    assert np.any(fraction_of(labels, 0.2, seed=2) != fifth)
    assert np.all(fraction_of(labels, 1.0, seed=1))
