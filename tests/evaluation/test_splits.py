"""Images to evaluate on: without labels, spread evenly, and parts with an equal share of all classes."""

import shutil

import numpy as np
import pytest

from cmd_jax.data.decode import decode_record
from cmd_jax.data.errors import BadImage
from cmd_jax.evaluation.splits import open_splits, order_within_class, spread


def test_without_labels_some_images_are_spread_over_all_and_bad_ones_are_passed_over(tiny_config, photo_folder, tmp_path):
    for number in range(8):
        shutil.copy(photo_folder / "train" / "a class" / f"{number}.png", tmp_path)
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "7.png").write_bytes(b"no picture")
    tiny_config.data.source, tiny_config.data.folder = "folder", str(tmp_path)
    tiny_config.eval.label_free_images = 8
    splits, reason = open_splits(tiny_config)
    assert "has no labels" in str(reason)
    assert (splits.labelled(), len(splits.test), splits.train.class_names) == (False, 0, ())
    records = [splits.train[index] for index in range(len(splits.train))]
    assert [record.name[-5] for record in records] == list("01334560")  # the next one, and behind the last the first
    assert all(decode_record(record).shape == (24, 32, 3) for record in records)
    tiny_config.eval.label_free_images = 3
    assert [record.name[-5] for record in open_splits(tiny_config)[0].train] == list("030")
    for path in tmp_path.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(BadImage):
        splits.train[0]


def test_places_within_a_class_are_a_random_order_of_it():
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
