"""Exact and near doubles: copies that were rescaled, recompressed or cropped, found by pixels and proved by registration.

Neighbours in features and neighbours in coarse colours are candidates. A pair is a double if a shift and a stretch of either
axis lay one picture on the other so that also their fine detail agrees: copies, and frames of a series that hardly differ.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from cmd_jax.labelling.features import nearest, unit

SIDE = 64  # of the grey pictures that are compared
COARSE = 8  # of the colours that propose candidates
NEIGHBOURS = 5  # of either kind that are compared with an image
STAGES = ((8, 3, 0.4), (16, 4, 0.7), (32, 4, 0.8), (64, 4, 0.9))  # side, steps of Gauss and Newton, correlation that goes on
CROP = 0.9  # of each axis that a crop is supposed to keep where the steps begin
STARTED = 16  # side at which the starts are compared
FINE = (0.7, 2.0)  # deviations of Gaussians in pixels, between which fine detail lies: a small copy has no finer
DETAIL = 0.88  # correlation of the fine detail of a double: 4,799 of 4,800 copies have 0.89 and more, different cars up to 0.86
MIN_OVERLAP = 0.6  # of the one picture that has to lie in the other
AT_ONCE = 512  # pairs


class Look(NamedTuple):
    """What doubles are found by, of one image.

    Attributes:
        grey: [SIDE, SIDE] uint8, the whole picture, squashed.
        colours: [COARSE, COARSE, 3] uint8, the same.
    """

    grey: np.ndarray
    colours: np.ndarray


class Double(NamedTuple):
    """Two images that are one picture.

    Attributes:
        one, other: rows, the smaller first.
        detail: correlation of their fine detail, 1 of equal pictures.
    """

    one: int
    other: int
    detail: float


def look_of(image: Image.Image) -> Look:
    """Of an RGB picture of any size."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BICUBIC)
    return Look(np.asarray(small.convert("L")), np.asarray(small.resize((COARSE, COARSE), Image.Resampling.BOX)))


def find_doubles(features: np.ndarray, grey: np.ndarray, colours: np.ndarray) -> list[Double]:
    """Finds all pairs of images that are one picture, exact copies among them.

    Args:
        features: [N, F], l2-normalised.
        grey: [N, SIDE, SIDE] uint8.
        colours: [N, COARSE, COARSE, 3] uint8.

    Returns:
        Sorted by rows. Of more than NEIGHBOURS copies of one picture not every pair is listed, but each copy is in one.
    """
    if len(features) < 2:
        return []
    pairs = candidates(features, colours)
    detail = np.concatenate([registered(grey, pairs[start : start + AT_ONCE]) for start in range(0, len(pairs), AT_ONCE)])
    return [
        Double(int(one), int(other), float(value)) for (one, other), value in zip(pairs, detail, strict=True) if value >= DETAIL
    ]


def candidates(features: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Pairs of rows, the smaller first, that are near in features or in colours: [P, 2] int64, sorted."""
    flat = colours.reshape(len(colours), -1).astype(np.float32)
    flat = unit(flat - flat.mean(axis=1, keepdims=True))
    near = np.concatenate([nearest(vectors, NEIGHBOURS + 1)[0] for vectors in (features, flat)], axis=1)
    pairs = np.stack([np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()], axis=1)
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def registered(grey: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Correlation of the fine detail of pairs [P, 2] after registration, [P] float64; -1 where the pictures do not fit.

    A point u of the first picture, in 0..1 along each axis, lies at s u + t in the second. Gauss-Newton steps from s = 1, t = 0
    make the sum of squared differences of the standardised grey values smallest, from coarse to fine.
    """
    stretch, shift = np.ones((len(pairs), 2)), np.zeros((len(pairs), 2))
    left, detail = np.arange(len(pairs)), np.full(len(pairs), -1.0)
    for side, steps, enough in STAGES:
        first, second = (_shrunk(grey[pairs[left, place]], side) for place in (0, 1))
        s, t = stretch[left], shift[left]
        if side == STARTED:
            s, t = _best_start(first, second, s, t)
        for _ in range(steps):
            s, t = _step(first, second, s, t)
        stretch[left], shift[left] = s, t
        there, inside = _sampled(second, s, t)
        fits = _correlation(first, there, inside) >= enough
        left = left[fits]
        if not len(left):
            return detail
        if side == SIDE:
            fine = _fine(first[fits])
            moved, inside = _sampled(_fine(second[fits]), s[fits], t[fits])
            overlaps = inside.mean(axis=(1, 2)) >= MIN_OVERLAP  # coarser steps may overshoot
            detail[left[overlaps]] = _correlation(fine, moved, inside)[overlaps]
    return detail


def _shrunk(grey: np.ndarray, side: int) -> np.ndarray:
    """[P, SIDE, SIDE] -> [P, side, side] float32, means of blocks."""
    block = SIDE // side
    return grey.reshape(len(grey), side, block, side, block).astype(np.float32).mean(axis=(2, 4))


def _fine(pictures: np.ndarray) -> np.ndarray:
    finest, rest = (ndimage.gaussian_filter(pictures, (0, deviation, deviation)) for deviation in FINE)
    return finest - rest


def _sampled(pictures: np.ndarray, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [P, S, S] at s u + t, bilinear, and whether that lies inside: both [P, S, S]."""
    side = pictures.shape[1]
    u, cells = ((np.arange(side) + 0.5) / side).astype(np.float32), np.arange(side, dtype=np.float32)
    place = ((s[..., None] * u + t[..., None]) * side - 0.5).astype(np.float32)  # [P, 2, S] rows and columns
    inside = (place >= -0.5) & (place <= side - 0.5)
    weights = np.maximum(1 - np.abs(np.clip(place, 0, side - 1)[..., None] - cells), 0)  # [P, 2, S, S]
    found = weights[:, 0] @ pictures @ weights[:, 1].swapaxes(1, 2)
    return found, inside[:, 0, :, None] & inside[:, 1, None, :]


def _standard(pictures: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Pictures with mean 0 and deviation 1 inside, 0 outside."""
    count = np.maximum(inside.sum(axis=(1, 2), keepdims=True), 1)
    centred = (pictures - (pictures * inside).sum(axis=(1, 2), keepdims=True) / count) * inside
    deviation = np.maximum(np.sqrt((centred**2).sum(axis=(1, 2), keepdims=True) / count), 1e-3)
    return centred / deviation


def _correlation(one: np.ndarray, other: np.ndarray, inside: np.ndarray) -> np.ndarray:
    count = np.maximum(inside.sum(axis=(1, 2)), 1)
    return (_standard(one, inside) * _standard(other, inside)).sum(axis=(1, 2)) / count


def _best_start(first: np.ndarray, second: np.ndarray, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The given s and t, or those of a crop at a corner, an edge or the middle of either picture: what correlates most."""
    best = _correlation(first, *_sampled(second, s, t))
    s, t = s.copy(), t.copy()
    for corner in itertools.product((0.0, 0.5, 1.0), repeat=2):
        start = (1 - CROP) * np.array(corner)
        for scale, offset in ((CROP, start), (1 / CROP, -start / CROP)):
            tried = np.full_like(s, scale), np.broadcast_to(offset, t.shape)
            value = _correlation(first, *_sampled(second, *tried))
            better = value > best
            best[better] = value[better]
            s[better], t[better] = tried[0][better], tried[1][better]
    return s, t


def _step(first: np.ndarray, second: np.ndarray, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of Gauss and Newton for s and t, each [P, 2]."""
    side = first.shape[1]
    there, inside = _sampled(second, s, t)
    wanted, found = _standard(first, inside), _standard(there, inside)
    u = ((np.arange(side) + 0.5) / side).astype(np.float32)
    scale = (side / s[:, :, None, None]).astype(np.float32)
    down, right = (np.gradient(found, axis=axis + 1) * scale[:, axis] * inside for axis in (0, 1))
    jacobian = np.stack([down * u[:, None], down, right * u, right], axis=-1).reshape(len(first), -1, 4)
    products = jacobian.swapaxes(1, 2) @ jacobian + 1e-3 * np.eye(4) * inside.sum(axis=(1, 2))[:, None, None]
    rest = (wanted - found).reshape(len(first), -1, 1)
    change = np.clip(np.linalg.solve(products, jacobian.swapaxes(1, 2) @ rest)[..., 0], -0.1, 0.1)
    return s + change[:, 0::2], t + change[:, 1::2]
