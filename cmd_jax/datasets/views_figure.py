"""A figure of the views that training makes of one image, beside the image with their boxes."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import multi_crop, sample_params
from cmd_jax.data.decode import decode_record, to_canvas
from cmd_jax.data.sources import Source

GAP_PX = 6
PIXELS = "0,0,0/1,1,1"  # normalization that leaves 0..1
GLOBAL_COLOR, LOCAL_COLOR = "red", "yellow"


def views_figure(source: Source, config: ConfigDict, index: int = 0) -> Image.Image:
    """Draws an image with the boxes of its views (red global, yellow local), the global views, and below the local ones.

    Args:
        source: the image's split.
        config: the whole configuration; its section `views` is the recipe, `seed` the randomness.
        index: of the image.
    """
    views, key = config.views, jax.random.key(config.seed)
    canvas, size = to_canvas(decode_record(source[index], grayscale=config.data.grayscale), config.data.canvas_px)
    batch = (jnp.asarray(canvas)[None], jnp.asarray(size)[None], jnp.array([index]))
    produced = jax.jit(lambda *batch: multi_crop(key, *batch, views=views, normalization=PIXELS))(*batch)
    globals_, locals_ = (_levels(view[0]) if view is not None else [] for view in produced)
    columns = max(1, -(-2 * views.global_px // (views.local_px + GAP_PX)))
    height, width = (int(side) for side in size)
    original = Image.fromarray(canvas[:height, :width])
    draw = ImageDraw.Draw(original)

    @jax.jit
    def box(number: jax.Array) -> jax.Array:
        view_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
        of_scale = lambda scale: sample_params(view_key, batch[1][0], scale, 0.0, 0.0, views).box
        return jnp.where(number < 2, of_scale(views.global_scale), of_scale(views.local_scale))

    for number in range(2 + len(locals_)):
        top, left, tall, wide = np.asarray(box(number))
        color = GLOBAL_COLOR if number < 2 else LOCAL_COLOR
        draw.rectangle((left, top, left + wide - 1, top + tall - 1), outline=color, width=2)
    original = original.resize((max(1, round(width * views.global_px / height)), views.global_px))
    rows = [[original, *globals_]] + [locals_[start : start + columns] for start in range(0, len(locals_), columns)]
    return _stack([_stack(row, across=True) for row in rows], across=False)


def _levels(view: jax.Array) -> list[Image.Image]:
    pixels = np.clip(np.asarray(view, np.float64) * 255, 0, 255)
    return [Image.fromarray(image) for image in np.round(pixels).astype(np.uint8)]


def _stack(images: list[Image.Image], across: bool) -> Image.Image:
    """Images in a row or a column, on white."""
    axis = 0 if across else 1
    size = [max(image.size[side] for image in images) for side in range(2)]
    size[axis] = sum(image.size[axis] + GAP_PX for image in images)
    whole, at = Image.new("RGB", tuple(size), "white"), 0
    for image in images:
        whole.paste(image, (at, 0) if across else (0, at))
        at += image.size[axis] + GAP_PX
    return whole
