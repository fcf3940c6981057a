"""A tree of mergers beside scikit-learn's own clusters, and groups in the order in which to ask."""

import numpy as np
from sklearn.cluster import AgglomerativeClustering

from cmd_jax.labelling.features import directions
from cmd_jax.labelling.groups import ALIKE, LIKELY, cut, group_images, grow
from cmd_jax.labelling.select import choose_images
from cmd_jax.labelling.suggest import suggest


def _blobs(classes, each, spread, seed=0):
    rng = np.random.default_rng(seed)
    features = np.repeat(rng.normal(size=(classes, 16)), each, axis=0) + spread * rng.normal(size=(classes * each, 16))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), np.repeat(np.arange(classes), each)


def _sets(groups):
    return {frozenset(map(int, rows)) for rows in groups}


def test_cuts_are_those_of_ward():
    features, _ = _blobs(5, 3, 0.3)  # fewer images than neighbours: the graph leaves nothing out
    tree = grow(features)
    for count in (2, 5, 9):
        labels = AgglomerativeClustering(count, linkage="ward").fit_predict(directions(features))
        assert _sets(cut(tree, count)) == _sets([np.nonzero(labels == label)[0] for label in range(count)])


def test_separate_parts_of_the_graph_are_joined():
    features, classes = _blobs(4, 40, 0.01)
    assert _sets(cut(grow(features), 4)) == _sets([np.nonzero(classes == name)[0] for name in range(4)])
    assert [len(grow(features[:count]).order) for count in (1, 2, 3)] == [1, 2, 3]


def test_every_open_image_once_and_first_what_pays():
    features, classes = _blobs(6, 10, 0.2)
    tree = grow(features)
    groups = group_images(features, tree)
    assert sorted(np.concatenate([group.rows for group in groups])) == list(range(60))
    assert choose_images(features, 1)[0] in groups[0].rows
    labels = [f"class {name}" if row % 10 < 2 and name < 5 else None for row, name in enumerate(classes)]
    suggested = suggest(features, labels)._replace(probability=np.random.default_rng(0).uniform(size=60))
    done = [row for row, label in enumerate(labels) if label]
    groups = group_images(features, tree, [*done, 59], suggested)
    assert sorted(np.concatenate([group.rows for group in groups])) == sorted(set(range(60)) - {*done, 59})
    for group in groups:
        assert set(suggested.probability[group.rows] >= LIKELY) == {bool(group.name)}
        if group.name:
            assert set(suggested.classes[group.rows]) == {group.name}
            assert np.all(np.diff(suggested.probability[group.rows]) <= 0)
    assert {1, 2} <= {len(group.rows) for group in groups if not group.name}
    put_right = [_put_right(suggested.probability[group.rows].tolist(), group.name) for group in groups]
    assert put_right == sorted(put_right, reverse=True)
    assert group_images(features, tree, range(60), suggested) == []


def _put_right(probabilities, name):
    """Expected errors of a group for each action, by a loop over its images."""
    errors = sum(1 - probability for probability in probabilities)
    wrong = errors if name else sum(1 - ALIKE for _ in probabilities[1:])
    return round(errors / min(len(probabilities), 1 + 2 * wrong), 12)
