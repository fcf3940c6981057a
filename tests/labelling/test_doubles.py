"""Copies that were rescaled, recompressed or cropped are found; different pictures of the same colours are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from cmd_jax.labelling.doubles import find_doubles, look_of


def _picture(seed):
    """Blobs and strokes: low frequencies that pictures share, and detail that they do not."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (160, 200, 3), np.uint8))
    coarse, fine = (ImageOps.autocontrast(noise.filter(ImageFilter.GaussianBlur(radius))) for radius in (16, 3))
    return Image.blend(coarse, fine, 0.4)


def _recompressed(picture):
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=30)
    return Image.open(packed)


COPIES = {
    "rescaled": lambda picture: picture.resize((90, 80)),
    "rescaled to fewer pixels than are compared": lambda picture: picture.resize((29, 23)),
    "recompressed": _recompressed,
    "cropped at a corner": lambda picture: picture.crop((20, 0, 200, 144)),
    "cropped in the middle": lambda picture: picture.crop((10, 8, 190, 152)).resize((120, 100)),
}


@pytest.fixture(scope="module")
def pictures():
    return [_picture(seed) for seed in range(24)]


@pytest.mark.parametrize("kind", COPIES)
def test_every_copy_and_nothing_else(pictures, kind):
    changed = (3, 11, 17)
    looks = [look_of(picture) for picture in [*pictures, *(COPIES[kind](pictures[row]) for row in changed)]]
    features = np.random.default_rng(1).normal(size=(len(looks), 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)  # they know nothing: colours have to propose the pairs
    found = find_doubles(features, np.stack([look.grey for look in looks]), np.stack([look.colours for look in looks]))
    assert [(double.one, double.other) for double in found] == [(row, 24 + place) for place, row in enumerate(changed)]


def test_one_picture_is_no_double(pictures):
    look = look_of(pictures[0])
    assert find_doubles(np.ones((1, 4)), look.grey[None], look.colours[None]) == []
