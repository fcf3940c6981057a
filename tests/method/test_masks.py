"""iBOT's masks against loops over rectangles, and what they are a function of."""

import math

import jax
import numpy as np
import pytest

from cmd_jax.method.masks import BLOCK_NUMBERS, block_mask, draw_masks
from tests.conftest import quick


def _rectangles(uniform, share, side):
    """BEiT's rectangles with given random numbers: (mask, their number)."""
    mask, count, kept = np.zeros((side, side), bool), 0, 0
    for of_area, of_ratio, of_row, of_column in uniform:
        left = share * side * side - count
        least = (side // 3) ** 2
        area = least + (left - least) * of_area
        ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * of_ratio)
        height, width = round(math.sqrt(max(area, 0) * ratio)), round(math.sqrt(max(area, 0) / ratio))
        if height >= side or width >= side:
            continue
        top, first = math.floor(of_row * (side - height + 1)), math.floor(of_column * (side - width + 1))
        new = [(y, x) for y in range(top, top + height) for x in range(first, first + width) if not mask[y, x]]
        if 0 < len(new) <= left:
            count, kept = count + len(new), kept + 1
            for place in new:
                mask[place] = True
    return mask, kept


@pytest.mark.parametrize("side", [2, 7, 14])
def test_blocks_equal_loops_over_rectangles(side):
    rng = np.random.default_rng(side)
    uniform = rng.uniform(size=(64, *BLOCK_NUMBERS)).astype(np.float32)
    shares = rng.uniform(0.1, 0.5, 64).astype(np.float32)
    found = np.asarray(quick(jax.vmap(lambda numbers, share: block_mask(numbers, share, side)))(uniform, shares))
    expected, kept = zip(*(_rectangles(*of_view, side) for of_view in zip(uniform, shares, strict=True)), strict=True)
    np.testing.assert_array_equal(found, expected)
    masked = found.mean((1, 2))
    assert np.all(masked <= shares)
    if side > 2:
        assert max(kept) > 2
        assert masked.mean() > shares.mean() - 0.5 / side


def test_masks_follow_from_their_images_alone():
    draw = quick(lambda keys: draw_masks(keys, views=2, side=7, prob=0.5, share=(0.3, 0.4)))
    keys = jax.random.split(jax.random.key(0), 400)
    masks = np.asarray(draw(keys))
    assert masks.shape == (400, 2, 49)
    np.testing.assert_array_equal(masks[::-1], draw(keys[::-1]))
    shares = masks.mean(-1)
    assert abs(np.mean(shares > 0) - 0.5) < 4 * 0.5 / math.sqrt(800)
    assert np.all((shares == 0) | ((shares > 0.15) & (shares <= 0.4)))
    assert np.mean(np.any(masks[:, 0] != masks[:, 1], axis=-1)) > 0.7  # each view has its own
