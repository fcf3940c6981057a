"""Matching of regions: by similarity against permutations, by location against loops and against what the views show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data.augment import resized_crop
from cmd_jax.method.regions import Places, match_by_location, match_by_similarity
from tests.conftest import quick


def test_similarity_finds_the_permutation_of_views():
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(3, 9, 4)).astype(np.float32)
    orders = np.stack([rng.permutation(9) for _ in range(4)])
    # scaling must not matter: the comparison is by cosine
    student = np.stack([7.0 * tokens[:, order] for order in orders[:2]], axis=1)
    teacher = np.stack([tokens[:, order] for order in orders[2:]], axis=1)
    match = match_by_similarity(student, teacher)
    for q in range(2):
        for v in range(2):
            np.testing.assert_array_equal(orders[2 + q][match[:, q, v]], np.broadcast_to(orders[v], (3, 9)))


def _places(rng, views, patch_side, images=3):
    size = rng.uniform(20, 100, (images, views, 2))
    corner = rng.uniform(0, 100 - size)
    return Places(
        np.concatenate([corner, size], axis=-1).astype(np.float32), rng.integers(0, 2, (images, views)).astype(bool), patch_side
    )


def _loop(student, teacher, patches, teacher_patches):
    """By the definition, a patch at a time: (match where it is seen else -1)."""
    side, teacher_side = round(patches**0.5), round(teacher_patches**0.5)
    images, views = student.flip.shape
    found = np.full((images, 2, views, patches), -1)
    for b, q, v, i in np.ndindex(found.shape):
        place = [min((cell + 0.5) * student.patch_side, 1.0) for cell in divmod(i, side)]
        place[1] = 1 - place[1] if student.flip[b, v] else place[1]
        pixel = student.box[b, v, :2] + np.array(place) * student.box[b, v, 2:]
        y, x = (pixel - teacher.box[b, q, :2]) / teacher.box[b, q, 2:]
        x = 1 - x if teacher.flip[b, q] else x
        if 0 <= y <= 1 and 0 <= x <= 1:
            row, column = (min(int(part / teacher.patch_side), teacher_side - 1) for part in (y, x))
            found[b, q, v, i] = row * teacher_side + column
    return found


@pytest.mark.parametrize(("sides", "patches"), [((1 / 3, 1 / 4), (9, 16)), ((0.3, 0.27), (16, 16))])
def test_location_equals_the_loops_of_its_definition(sides, patches):
    rng = np.random.default_rng(2)
    student, teacher = _places(rng, 4, sides[0]), _places(rng, 2, sides[1])
    match, seen = match_by_location(student, teacher, *patches)
    expected = _loop(student, teacher, *patches)
    assert 0.2 < np.mean(seen) < 0.8
    np.testing.assert_array_equal(seen, expected >= 0)
    np.testing.assert_array_equal(np.where(seen, match, -1), expected)


def test_a_view_matches_itself_patch_by_patch():
    places = _places(np.random.default_rng(3), 2, 0.25)
    match, seen = match_by_location(places, places, 16, 16)
    for q in range(2):
        assert np.all(seen[:, q, q])
        np.testing.assert_array_equal(match[:, q, q], np.broadcast_to(np.arange(16), (3, 16)))


def test_matching_patches_show_one_place_of_the_picture():
    """Views of a picture whose colours are its coordinates."""
    rng, patch, side = np.random.default_rng(4), 8, 6
    ramp = np.arange(128, dtype=np.uint8)
    picture = np.stack([*np.broadcast_arrays(ramp[:, None], ramp[None, :]), np.zeros((128, 128))], axis=-1).astype(np.uint8)
    size = rng.integers(60, 120, (1, 3, 2))
    box = np.concatenate([rng.integers(0, 128 - size), size], axis=-1).astype(np.float32)
    flip = np.array([[True, False, True]])
    pixels = quick(jax.vmap(lambda box, flip: resized_crop(picture, box, flip, patch * side)))(box[0], flip[0])
    shown = jnp.mean(pixels.reshape(3, side, patch, side, patch, 3), axis=(2, 4)).reshape(3, side * side, 3)[..., :2]
    student, teacher = (Places(box[:, views], flip[:, views], 1 / side) for views in (slice(2, 3), slice(0, 2)))
    match, seen = match_by_location(student, teacher, side * side, side * side)
    for q in range(2):
        apart = np.abs(np.asarray(shown[2] - shown[q][match[0, q, 0]]))
        half = box[0, q, 2:] / side / 2
        assert np.mean(seen[0, q, 0]) > 0.3
        # half a patch, and what the filter and the rounding to levels blur
        assert np.all(apart[seen[0, q, 0]] <= half + 1.5)
        assert np.any(apart[~seen[0, q, 0]] > half + 1.5)
