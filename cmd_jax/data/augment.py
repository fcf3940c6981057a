"""Multi-crop augmentation of DINO on the device: uint8 images in, normalised float views out, inside the jitted step.

The recipe is the one of DINO, EsViT and CMD (random resized crop, flip, colour jitter in random order, grayscale, blur,
solarize, normalise). A crop is two interpolation products, so nothing gathers. Every image has its own key, a function of
(seed, step, image index). Images are a canvas [C, C, 3] whose top left [height, width] corner holds the image.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cmd_jax.normalization import statistics_of

Array = jax.Array
MEAN, STD = statistics_of("imagenet")
LUMA = (0.299, 0.587, 0.114)
NEIGHBOURHOOD = 0.08  # standard deviation of a pixel's neighbourhood, as a share of the view's side
FLAT_CONTRAST = 0.2  # of 0..1; a neighbourhood of less contrast is not blown up to that of an outline
CROP_ATTEMPTS = 10
BOX_NUMBERS = 2 * CROP_ATTEMPTS + 2  # random numbers that a box takes
ASPECT_RATIO = (3 / 4, 4 / 3)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))


class ViewParams(NamedTuple):
    """Random parameters of one view of one image.

    Attributes:
        box: [4] float32, (top, left, height, width) in pixels of the canvas, whole numbers.
        flip: [] bool.
        jitter: [] bool, whether the colour jitter applies.
        factors: [4] float32, brightness, contrast, saturation factors and the hue shift in turns of the circle.
        order: [4] int32, the order of the four colour operations.
        grayscale: [] bool.
        sigma: [] float32, of the Gaussian blur in pixels of the view; 0 for none.
        solarize: [] bool.
    """

    box: Array
    flip: Array
    jitter: Array
    factors: Array
    order: Array
    grayscale: Array
    sigma: Array
    solarize: Array


def normalize(pixels: Array, normalization: str) -> Array:
    """Normalizes pixels for the network.

    Args:
        pixels: [H, W, 3] in 0..255.
        normalization: "imagenet" subtracts ImageNet's mean of each channel and divides by its standard deviation; MEAN/STD
            such as "0.5,0.5,0.5/0.5,0.5,0.5" uses others (see `cmd_jax.normalization`). "local_contrast" subtracts the mean
            of each pixel's neighbourhood and divides by its contrast (Jarrett et al., ICCV 2009), so that edges are a cue, but
            not colour casts, lighting and smooth backgrounds.

    Returns:
        [H, W, 3] float32.
    """
    pixels = pixels.astype(jnp.float32) / 255
    statistics = statistics_of(normalization)
    if statistics:
        mean, std = map(jnp.array, statistics)
        return (pixels - mean) / std
    sigma = jnp.float32(NEIGHBOURHOOD * pixels.shape[0])
    detail = pixels - gaussian_blur(pixels, sigma, NEIGHBOURHOOD * pixels.shape[0])
    energy = jnp.mean(jnp.square(detail), axis=-1, keepdims=True)
    contrast = jnp.sqrt(gaussian_blur(energy, sigma, NEIGHBOURHOOD * pixels.shape[0]))
    return detail / jnp.maximum(contrast, FLAT_CONTRAST)


def sample_box(uniform: Array, size: Array, scale: tuple[float, float]) -> Array:
    """Samples the box of a random resized crop: the first of ten that fits, else a central crop of a clamped aspect ratio.

    Args:
        uniform: [BOX_NUMBERS] in 0..1, independent.
        size: [2] (height, width) of the image in pixels.
        scale: range of the area as a share of the image's.

    Returns:
        [4] float32 (top, left, height, width), whole numbers.
    """
    height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    areas, ratios = uniform[:CROP_ATTEMPTS], uniform[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
    low, high = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])
    ratio = jnp.exp(low + (high - low) * ratios)
    box_width, box_height = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (box_width >= 1) & (box_height >= 1) & (box_width <= width) & (box_height <= height)
    first = jnp.argmax(fits)

    image_ratio = width / height
    central_width = jnp.where(image_ratio > ASPECT_RATIO[1], jnp.round(height * ASPECT_RATIO[1]), width)
    central_height = jnp.where(image_ratio < ASPECT_RATIO[0], jnp.round(width / ASPECT_RATIO[0]), height)
    found = jnp.any(fits)
    box_width = jnp.where(found, box_width[first], central_width)
    box_height = jnp.where(found, box_height[first], central_height)
    spare_y, spare_x = height - box_height, width - box_width
    top = jnp.where(found, jnp.floor(uniform[-2] * (spare_y + 1)), jnp.round(spare_y / 2))
    left = jnp.where(found, jnp.floor(uniform[-1] * (spare_x + 1)), jnp.round(spare_x / 2))
    return jnp.stack([top, left, box_height, box_width])


def sample_params(
    key: Array,
    size: Array,
    scale: tuple[float, float],
    blur_prob: Array,
    solarize_prob: Array,
    views: ConfigDict,
) -> ViewParams:
    """Samples the parameters of one view; `views` is the config's section of that name."""
    # All numbers at once: every call of the generator is compiled for itself.
    coin, spread, (order, sigma), box = jnp.split(jax.random.uniform(key, (11 + BOX_NUMBERS,)), (5, 9, 11))
    strength = jnp.array([views.brightness, views.contrast, views.saturation, views.hue])
    low, high = views.blur_sigma
    return ViewParams(
        box=sample_box(box, size, scale),
        flip=coin[0] < 0.5,
        jitter=coin[1] < views.jitter_prob,
        factors=(2 * spread - 1) * strength + jnp.array([1.0, 1.0, 1.0, 0.0]),
        order=jnp.array(ORDERS)[jnp.floor(order * len(ORDERS)).astype(jnp.int32)],
        grayscale=coin[2] < views.grayscale_prob,
        sigma=jnp.where(coin[3] < blur_prob, low + (high - low) * sigma, 0.0),
        solarize=coin[4] < solarize_prob,
    )


def cubic(x: Array) -> Array:
    """Pillow's bicubic filter at distances x >= 0 of pixels."""
    return jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, jnp.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def triangle(x: Array) -> Array:
    """Pillow's bilinear filter at distances x >= 0 of pixels."""
    return jnp.maximum(1.0 - x, 0.0)


FILTERS = {"bicubic": (cubic, 2), "bilinear": (triangle, 1)}  # with the distance beyond which they are 0


def interpolation_matrix(start: Array, length: Array, out: int, size: int, interpolation: str = "bicubic") -> Array:
    """Weights of Pillow's antialiased resize of the pixels [start, start + length) of an axis to `out` pixels.

    Returns:
        [out, size] float32, rows sum to 1.
    """
    weigh, support = FILTERS[interpolation]
    scale = length / out
    filter_scale = jnp.maximum(scale, 1.0)
    center = (jnp.arange(out) + 0.5) * scale  # in pixels from `start`
    # Pillow keeps the taps between these whole numbers, clipped to the box.
    first = jnp.maximum(jnp.floor(center - support * filter_scale + 0.5), 0)
    last = jnp.minimum(jnp.floor(center + support * filter_scale + 0.5), length)
    pixel = jnp.arange(size) - start
    x = jnp.abs((pixel + 0.5 - center[:, None]) / filter_scale)
    weights = jnp.where((pixel >= first[:, None]) & (pixel < last[:, None]), weigh(x), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def resized_crop(
    canvas: Array, box: Array, flip: Array, out: int, dtype: str = "float32", interpolation: str = "bicubic"
) -> Array:
    """Crops, resizes and flips: [C, C, 3] uint8, box [4] -> [out, out, 3] float32 whole levels in 0..255.

    Along x, then along y, each rounded to whole levels and cut to 0..255 as Pillow does. Whole levels are exact in bfloat16,
    and what its weights lose is divided out, so with dtype "bfloat16" a pixel is off by about a level at most.
    """
    rows = interpolation_matrix(box[0], box[2], out, canvas.shape[0], interpolation).astype(dtype)
    columns = interpolation_matrix(box[1], box[3], out, canvas.shape[1], interpolation).astype(dtype)
    columns = jnp.where(flip, columns[::-1], columns)

    def levels(equation: str, weights: Array, pixels: Array, gain: Array) -> Array:
        product = jnp.einsum(equation, weights, pixels.astype(dtype), precision="highest", preferred_element_type=jnp.float32)
        return jnp.clip(jnp.round(product / gain), 0, 255)

    gain = lambda weights: jnp.sum(weights.astype(jnp.float32), axis=1)
    pixels = levels("xj,ijc->ixc", columns, canvas, gain(columns)[None, :, None])
    return levels("yi,ixc->yxc", rows, pixels, gain(rows)[:, None, None])


def luma(pixels: Array) -> Array:
    """Grey levels by ITU-R 601 as in Pillow: [..., 3] -> [..., 1]."""
    return jnp.sum(pixels * jnp.array(LUMA), axis=-1, keepdims=True)


def shift_hue(pixels: Array, shift: Array) -> Array:
    """Shifts the hue by `shift` of the circle: [..., 3] in 0..255 -> the same."""
    high, low = jnp.max(pixels, axis=-1), jnp.min(pixels, axis=-1)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    sixth = jnp.where(high == r, (g - b) / safe, jnp.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    # HSV -> RGB in closed form: channel n is V - V S clip(min(k, 4 - k), 0, 1), k = (n + 6 H) mod 6, with V S = chroma.
    k = (jnp.array([5.0, 3.0, 1.0]) + (sixth + 6 * shift)[..., None]) % 6
    return high[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def color_jitter(pixels: Array, factors: Array, order: Array) -> Array:
    """Changes brightness, contrast, saturation and hue in the given order: [H, W, 3] in 0..255 -> the same."""
    for position in range(4):
        operation = order[position]
        gray = luma(pixels)
        # The first three blend with black, with the mean grey level, with the own grey: base + factor (x - base).
        base = jnp.where(operation == CONTRAST, jnp.round(jnp.mean(gray)), gray) * (operation != BRIGHTNESS)
        blended = jnp.clip(base + factors[jnp.minimum(operation, SATURATION)] * (pixels - base), 0, 255)
        pixels = jnp.where(operation == HUE, shift_hue(pixels, factors[HUE]), blended)
    return pixels


def gaussian_blur(pixels: Array, sigma: Array, max_sigma: float) -> Array:
    """Gaussian blur with repeated edges as two products; sigma 0 leaves the image. [H, W, 3] -> [H, W, 3]."""
    radius = math.ceil(3 * max_sigma)

    def matrix(size: int) -> Array:
        offset = jnp.arange(-radius, radius + 1)
        kernel = jnp.exp(-0.5 * jnp.square(offset / jnp.maximum(sigma, 1e-3)))
        kernel = kernel / jnp.sum(kernel)
        # Not sums over the taps beyond an edge: under vmap jaxlib 0.10.2 compiles those wrongly on a CPU from 192 pixels on.
        source = jnp.clip(jnp.arange(size)[:, None] + offset, 0, size - 1)  # [size, taps]
        return jnp.einsum("yt,yti->yi", jnp.broadcast_to(kernel, source.shape), jax.nn.one_hot(source, size))

    blurred = jnp.einsum("yi,ijc->yjc", matrix(pixels.shape[0]), pixels, precision="highest")
    blurred = jnp.einsum("xj,yjc->yxc", matrix(pixels.shape[1]), blurred, precision="highest")
    return jnp.where(sigma > 0, blurred, pixels)


def solarize(pixels: Array) -> Array:
    """Inverts levels of 128 or more, in 0..255."""
    return jnp.where(pixels >= 128, 255 - pixels, pixels)


def apply_params(
    canvas: Array, params: ViewParams, out: int, max_sigma: float, normalization: str, dtype: str = "float32"
) -> Array:
    """Makes one view of one image: [C, C, 3] uint8 -> [out, out, 3] float32, normalised."""
    pixels = resized_crop(canvas, params.box, params.flip, out, dtype)
    pixels = jnp.where(params.jitter, color_jitter(pixels, params.factors, params.order), pixels)
    pixels = jnp.where(params.grayscale, luma(pixels), pixels)
    pixels = gaussian_blur(pixels, params.sigma, max_sigma)
    pixels = jnp.where(params.solarize, solarize(pixels), pixels)
    return normalize(pixels, normalization)


class Placed(NamedTuple):
    """Views of one size and their boxes.

    Attributes:
        pixels: [B, V, S, S, 3] float32, normalised.
        box: [B, V, 4] float32 (top, left, height, width) in pixels of the canvas.
        flip: [B, V] bool.
    """

    pixels: Array
    box: Array
    flip: Array


GLOBAL_VIEWS = 2


def crop_views(
    key: Array,
    canvas: Array,
    size: Array,
    index: Array,
    *,
    local: bool,
    views: ConfigDict,
    normalization: str,
) -> Placed:
    """Makes the global or the local views of a batch, vectorised over images and views.

    Args:
        key: of (seed, step); folded with each image's index, then with the view's number.
        canvas: [B, C, C, 3] uint8.
        size: [B, 2] int32, height and width of the image inside its canvas.
        index: [B] int32, the images' indices in the dataset.
        local: the `views.local_count` local views, else the two global ones.
        views: the config's section of that name.
        normalization: see `normalize`.
    """
    if local:
        first, out, scale = GLOBAL_VIEWS, views.local_px, views.local_scale
        blur_probs, solarize_probs = (views.local_blur_prob,) * views.local_count, (0.0,) * views.local_count
    else:
        first, out, scale = 0, views.global_px, views.global_scale
        blur_probs, solarize_probs = views.global_blur_prob, views.global_solarize_prob

    def one(image_key, image, image_size, number, blur, solarize):
        view_key = jax.random.fold_in(image_key, number)
        params = sample_params(view_key, image_size, tuple(scale), blur, solarize, views)
        pixels = apply_params(image, params, out, views.blur_sigma[1], normalization, views.dtype)
        return Placed(pixels, params.box, params.flip)

    image_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    numbers = first + jnp.arange(len(blur_probs))
    of_image = jax.vmap(one, in_axes=(None, None, None, 0, 0, 0))
    of_batch = jax.vmap(of_image, in_axes=(0, 0, 0, None, None, None))
    return of_batch(image_keys, canvas, size, numbers, jnp.array(blur_probs), jnp.array(solarize_probs))


LOOKS = (1.0, 0.5)  # sides of the whole image and of its centre, as shares of the image's


def crop_looks(canvas: Array, size: Array, *, out: int, normalization: str) -> Array:
    """The whole of every image and its centre, each resized to a square, nothing else changed.

    Args:
        canvas: [B, C, C, 3] uint8.
        size: [B, 2] int32, height and width of the image inside its canvas.
        out: side of a look in pixels.
        normalization: see `normalize`.

    Returns:
        [B, L, out, out, 3] float32, normalised, in the order of LOOKS.
    """
    share = jnp.array(LOOKS)

    def one(image: Array, size: Array, share: Array) -> Array:
        extent = jnp.maximum(jnp.round(share * size), 1)
        box = jnp.concatenate([jnp.floor((size - extent) / 2), extent])
        return normalize(resized_crop(image, box, jnp.bool_(False), out), normalization)

    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(0, 0, None))(canvas, size, share)


def multi_crop(
    key: Array, canvas: Array, size: Array, index: Array, *, views: ConfigDict, normalization: str
) -> tuple[Array, Array | None]:
    """Makes all views of a batch, each placed anywhere in its image; arguments as of `crop_views`.

    Returns:
        Global views [B, 2, G, G, 3] and local views [B, L, l, l, 3] (None when L is 0), float32, normalised.
    """
    crop = lambda local: crop_views(key, canvas, size, index, local=local, views=views, normalization=normalization).pixels
    return crop(False), crop(True) if views.local_count else None
