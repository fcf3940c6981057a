"""Masks of iBOT (arXiv 2111.07832): which patches of a view the student does not see.

Blocks of patches as in BEiT (arXiv 2106.08254): rectangles, one after the other, until a share of the view is masked.
Letters: B images, V views, S patches along a side, N = S^2 patches.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
ATTEMPTS = 20  # rectangles that are tried, of which some do not fit; BEiT stops after 10 of those in a row, which masks as much
BLOCK_NUMBERS = (ATTEMPTS, 4)  # random numbers that the blocks of a view take
ASPECT_RATIO = (0.3, 1 / 0.3)


def block_mask(uniform: Array, share: Array | float, side: int) -> Array:
    """Masks rectangles of patches in turn; one that adds none, or more than are left of the share, is left out.

    A rectangle has an area between (S // 3)^2 and what is left of share * N, and is lower and narrower than the view.

    Args:
        uniform: BLOCK_NUMBERS in 0..1, independent: of area, aspect ratio, row and column.
        share: [] of the patches, the most that are masked.
        side: S.

    Returns:
        [S, S] bool.
    """
    budget = share * side * side
    low, high = map(math.log, ASPECT_RATIO)
    place = jnp.arange(side)

    def add(mask: Array, numbers: Array) -> tuple[Array, None]:
        left = budget - jnp.sum(mask)
        least = (side // 3) ** 2
        area, ratio = least + (left - least) * numbers[0], jnp.exp(low + (high - low) * numbers[1])
        height, width = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
        top, first = (jnp.floor(number * (side - size + 1)) for number, size in ((numbers[2], height), (numbers[3], width)))
        rows, columns = (place >= top) & (place < top + height), (place >= first) & (place < first + width)
        new = rows[:, None] & columns[None] & ~mask
        fits = (height < side) & (width < side) & (jnp.sum(new) <= left)
        return mask | (new & fits), None

    return lax.scan(add, jnp.zeros((side, side), bool), uniform)[0]


def draw_masks(keys: Array, *, views: int, side: int, prob: float, share: tuple[float, float]) -> Array:
    """Draws the masks of a batch.

    Args:
        keys: [B] random keys, one for each image.
        views: V.
        side: S.
        prob: that a view is masked at all.
        share: least and greatest share of a masked view's patches.

    Returns:
        [B, V, N] bool, True where the student does not see a patch; patches row-major.
    """
    low, high = share

    def of_view(key: Array) -> Array:
        of_blocks, of_view = jax.random.split(key)
        coin, size = jax.random.uniform(of_view, (2,))
        wanted = jnp.where(coin < prob, low + (high - low) * size, 0.0)
        return block_mask(jax.random.uniform(of_blocks, BLOCK_NUMBERS), wanted, side).reshape(-1)

    numbered = lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(views))
    return jax.vmap(lambda key: jax.vmap(of_view)(numbered(key)))(keys)
