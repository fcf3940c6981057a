"""Classes of images without a label, against a loop; probabilities against the share that is right."""

import numpy as np

from cmd_jax.labelling.fill import fill_in


def test_classes_are_those_of_the_nearest_mean():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6))
    labelled, labels = np.array([5, 0, 17, 30, 31, 9]), np.array(["b", "a", "b", "c", "c", "a"])
    filled = fill_in(features, labelled, labels)
    rows = features - features.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for image in range(40):
        means = {name: rows[labelled[labels == name]].mean(axis=0) for name in "abc"}
        expected = max(means, key=lambda name: rows[image] @ means[name] / np.linalg.norm(means[name]))
        if image in labelled:
            assert filled.classes[image] == labels[labelled == image][0]
            assert (filled.probability[image], filled.nearest[image]) == (1, image)
        else:
            assert filled.classes[image] == expected
            of_class = labelled[labels == expected]
            assert filled.nearest[image] == of_class[np.argmax(rows[of_class] @ rows[image])]


def test_probability_is_the_share_that_is_right():
    """Calibrated over all images, also where the classes of some were never named, and larger for clearer ones."""
    rng = np.random.default_rng(0)
    truth = np.arange(600) % 6
    noise = np.linspace(0.1, 0.9, 600)
    features = np.eye(6, 8)[truth] + noise[:, None] * rng.normal(size=(600, 8))
    labelled = rng.permutation(600)[:120]
    filled = fill_in(features, labelled, truth[labelled])
    asked = np.setdiff1d(np.arange(600), labelled)
    right = filled.classes == truth
    assert 0.6 < right[asked].mean() < 0.9
    order = asked[np.argsort(filled.probability[asked])]
    for group in np.array_split(order, 3):
        assert abs(filled.probability[group].mean() - right[group].mean()) < 0.1
    assert filled.probability[order[:160]].mean() < filled.probability[order[-160:]].mean() - 0.3


def test_one_class_and_one_image():
    filled = fill_in(np.random.default_rng(0).normal(size=(5, 3)), [2], [7])
    assert list(filled.classes) == [7] * 5
    assert list(filled.nearest) == [2] * 5
    np.testing.assert_allclose(filled.probability[[0, 1, 3, 4]], 1 / 3)  # its class was wrong without it
