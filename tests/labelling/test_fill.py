"""Classes of images without a label, against a loop over images; probabilities against the share that is right."""

import numpy as np

from cmd_jax.labelling.features import SHRINKAGE, directions
from cmd_jax.labelling.fill import SHARPNESS, STEPS, classes_of, fill_in


def _whitened(features):
    """Unit directions whose covariance is shrunk and removed, by its eigenvectors."""
    rows = features - features.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values = (1 - SHRINKAGE) * values + SHRINKAGE * values.mean()
    rows = rows @ vectors / np.sqrt(values)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_directions_have_no_common_part():
    rows = np.random.default_rng(0).normal(size=(50, 6)) * np.array([9, 3, 1, 1, 1, 0.1]) + 5
    expected = _whitened(rows)
    found = directions(rows)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_array_equal(directions(np.ones((3, 4))), 0)


def test_classes_are_those_of_soft_means():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6))
    labelled, labels = np.array([5, 0, 17, 30, 31, 9]), np.array(["b", "a", "b", "c", "c", "a"])
    ruled_out = {2: {"a", "b"}, 3: {"c", "nobody's"}, 4: {"a", "b", "c"}}
    filled = fill_in(features, labelled, labels, ruled_out)
    rows, possible = _whitened(features), {image: set("abc") - ruled_out.get(image, set()) for image in range(40)}
    share = {image: dict.fromkeys("abc", 0.0) for image in range(40)}
    share |= {image: {name: float(name == label) for name in "abc"} for image, label in zip(labelled, labels, strict=True)}
    for _ in range(STEPS + 1):
        means = {name: sum(share[image][name] * rows[image] for image in range(40)) for name in "abc"}
        cosine = {i: {name: rows[i] @ means[name] / np.linalg.norm(means[name]) for name in possible[i]} for i in range(40)}
        for image in set(range(40)) - set(labelled):
            total = sum(np.exp(SHARPNESS * value) for value in cosine[image].values())
            share[image] = {name: np.exp(SHARPNESS * cosine[image].get(name, -np.inf)) / max(total, 1e-9) for name in "abc"}
    for image in set(range(40)) - {4}:
        if image in labelled:
            assert filled.classes[image] == labels[labelled == image][0]
            assert (filled.probability[image], filled.nearest[image]) == (1, image)
        else:
            expected = max(cosine[image], key=cosine[image].get)
            assert filled.classes[image] == expected
            of_class = labelled[labels == expected]
            assert filled.nearest[image] == of_class[np.argmax(rows[of_class] @ rows[image])]
    assert filled.probability[4] == 0
    np.testing.assert_array_equal(classes_of(features, labelled, labels), fill_in(features, labelled, labels).classes)


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
