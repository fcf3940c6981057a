"""The embedded dataset: the species sits in its parts alone, and everything is a function of the seed."""

import numpy as np
import pytest

from cmd_jax.datasets import synthetic_birds
from cmd_jax.datasets.bird_renderer import PARTS, VARIANTS, render
from cmd_jax.datasets.prepared import open_source
from cmd_jax.datasets.synthetic_birds import SPECIES


def _digits(name):
    return tuple(int(digit) for digit in SPECIES[name])


def test_nearest_species_differ_in_few_parts():
    codes = np.array([_digits(name) for name in SPECIES])
    distance = np.sum(codes[:, None] != codes[None], axis=-1)
    np.fill_diagonal(distance, len(PARTS))
    assert set(distance.min(axis=1)) <= {1, 2}
    assert len(SPECIES) == 20
    for part, column in zip(PARTS, codes.T, strict=True):
        assert set(column) == set(range(len(VARIANTS[part]))), part  # no part is the same in all species


@pytest.mark.parametrize("part", PARTS)
def test_a_part_changes_only_its_own_pixels(part):
    number, seed = PARTS.index(part), 11
    birds = []
    for digit in range(4):
        species = [0, 0, 0, 0, 0]
        species[number] = digit
        birds.append(render(tuple(species), np.random.default_rng(seed), 128))
    low = np.min([bird.boxes[part][:2] for bird in birds], axis=0)
    high = np.max([bird.boxes[part][2:] for bird in birds], axis=0)
    position = (np.stack(np.mgrid[0:128, 0:128], -1) + 0.5) / 128
    outside = np.any((position < low - 0.02) | (position > high + 0.02), axis=-1)
    for bird in birds[1:]:
        difference = np.abs(bird.image.astype(int) - birds[0].image).max(axis=-1)
        assert difference[~outside].max() > 60  # the part is visible
        # what is left outside is the shading of the outline, which follows the bird's whole silhouette
        assert np.mean(difference[outside]) < 2.0
        assert np.mean(difference[outside] > 40) < 0.002


def test_images_depend_on_the_seed():
    first, again, other = (render(_digits("reed_tarrel"), np.random.default_rng(seed), 64) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    assert np.mean(first.image != other.image) > 0.5
    for seed in range(40):
        boxes = np.array(list(render(_digits("coast_pellin"), np.random.default_rng(seed), 64).boxes.values()))
        assert np.all(boxes > 0)
        assert np.all(boxes < 1)
        assert np.all(boxes[:, 2:] > boxes[:, :2])


def test_synthetic_birds_are_prepared_and_read(tmp_path, monkeypatch, tiny_config):
    monkeypatch.setattr(synthetic_birds, "IMAGES_PER_SPECIES", {"train": 2, "test": 1})
    tiny_config.data.source, tiny_config.data.data_dir = "synthetic_birds", str(tmp_path)
    train, test = (open_source(tiny_config.data, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 20)
    assert train.class_names == tuple(SPECIES)
    assert list(tmp_path.rglob("*.array_record*"))
    labels = [train[index].label for index in range(len(train))]
    np.testing.assert_array_equal(np.bincount(labels), np.full(20, 2))
    record = test[0]
    assert record.encoded.startswith(b"\x89PNG")
    assert record.name.split("/")[1] == test.class_names[record.label]
    assert record.part_boxes.shape == (len(PARTS), 4)
