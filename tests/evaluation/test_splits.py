"""Images to evaluate on: without labels, spread evenly, and parts with an equal share of all classes."""

import numpy as np

from cmd_jax.evaluation.splits import open_splits, order_within_class, spread


def test_without_labels_some_images_are_spread_over_all(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder / "train" / "a class")
    tiny_config.eval.label_free_images = 3
    splits, reason = open_splits(tiny_config)
    assert "has no labels" in str(reason)
    assert (splits.labelled(), len(splits.test), splits.train.class_names) == (False, 0, ())
    assert [record.name[-5] for record in splits.train] == list("037")


def test_the_images_that_were_read_are_selected(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    splits, _ = open_splits(tiny_config)
    assert splits.select(np.arange(24), np.arange(12)) == splits  # nothing is wrapped
    some = splits.select(np.array([1, 23]), np.array([4]))
    assert [some.train[index].name for index in (0, 1)] == [splits.train[index].name for index in (1, 23)]
    assert (len(some.test), some.test[0].name) == (1, splits.test[4].name)
    assert splits.select(np.arange(24), None).test is splits.test


def test_order_within_class():
    labels = np.array([2, 0, 2, 5, 0, 2, 2])
    places = order_within_class(labels, 3)
    assert {label: sorted(places[labels == label]) for label in (0, 2, 5)} == {0: [0, 1], 2: [0, 1, 2, 3], 5: [0]}
    np.testing.assert_array_equal(places, order_within_class(labels, 3))
    first = {int(np.flatnonzero((labels == 2) & (order_within_class(labels, seed) == 0))[0]) for seed in range(40)}
    assert first == {0, 2, 5, 6}  # any image of a class may come first


def test_indices_are_spread_over_all_images():
    np.testing.assert_array_equal(spread(9, 5), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(spread(3, 5), [0, 1, 2])
    assert spread(1, 5).tolist() == [0]
