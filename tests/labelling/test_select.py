"""Which images are asked for, against a greedy loop over all pairs."""

import numpy as np

from cmd_jax.labelling import select
from cmd_jax.labelling.features import directions
from cmd_jax.labelling.select import choose_images


def _features(images, seed=0):
    return np.random.default_rng(seed).normal(size=(images, 5)).astype(np.float32)


def _greedy(features, count, labelled, worth):
    """The slow loop: the image that adds most to the sum of best covers."""
    rows = directions(features)
    distance = 1 - rows @ rows.T
    np.fill_diagonal(distance, 0)
    near = distance <= np.sort(distance, axis=1)[:, select.NEIGHBOURS - 1 : select.NEIGHBOURS]
    scale = select.SCALE * np.median(np.where(near, distance, 0).max(axis=1))
    cover = np.where(near | near.T, np.exp(-distance / scale), 0)
    chosen = []
    for _ in range(count):
        done = cover[:, [*labelled, *chosen]].max(axis=1, initial=0)
        gains = worth @ np.maximum(cover - done[:, None], 0)
        gains[[*labelled, *chosen]] = -1
        chosen.append(int(np.argmax(gains)))
    return chosen


def test_choice_equals_greedy_facility_location():
    features, worth = _features(60), np.random.default_rng(1).uniform(size=60)
    np.testing.assert_array_equal(choose_images(features, 12), _greedy(features, 12, [], np.ones(60)))
    chosen = choose_images(features, 12, labelled=[3, 50], weights=worth)
    np.testing.assert_array_equal(chosen, _greedy(features, 12, [3, 50], worth))
    np.testing.assert_array_equal(choose_images(features, 5, [3, 50], worth), chosen[:5])


def test_doubles_come_last_and_all_images_once():
    features = np.repeat(_features(30), 2, axis=0)
    order = choose_images(features, 99, labelled=[7])
    assert sorted(order) == [image for image in range(60) if image != 7]
    assert len(set(order[:29] // 2) - {3}) == 29  # one of every other pair
