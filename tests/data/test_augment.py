"""Device augmentation against Pillow, operation by operation, and the distributions of its random parameters.

Tolerances are in 8-bit levels: Pillow rounds to whole levels after every pass, the device does not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cmd_jax.config import default
from cmd_jax.data import augment
from cmd_jax.data.builders.bird_renderer import render


@pytest.fixture(scope="module")
def picture():
    return render((0, 1, 2, 3, 1), np.random.default_rng(5), 128).image


def _close(actual, expected, mean, largest):
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert difference.mean() <= mean
    assert difference.max() <= largest


@pytest.mark.parametrize("box", [(0, 0, 128, 128), (13, 40, 77, 60), (50, 3, 20, 31)])
@pytest.mark.parametrize("flip", [False, True])
def test_resized_crop_is_pillows_bicubic(picture, box, flip):
    top, left, height, width = box
    # Along x, then along y: in one call Pillow chooses the order by the shape, and cuts to 0..255 in between.
    cropped = Image.fromarray(picture).crop((left, top, left + width, top + height))
    expected = cropped.resize((48, height), Image.Resampling.BICUBIC).resize((48, 48), Image.Resampling.BICUBIC)
    expected = ImageOps.mirror(expected) if flip else expected
    actual = augment.resized_crop(jnp.asarray(picture), jnp.array(box, jnp.float32), jnp.array(flip), 48)
    _close(actual, expected, mean=0.4, largest=1.5)


def test_canvas_outside_the_picture_does_not_leak(picture):
    canvas = np.full((160, 160, 3), 255, np.uint8)
    canvas[:128, :128] = picture
    box = jnp.array([0.0, 0.0, 128.0, 128.0])
    inside, padded = (augment.resized_crop(jnp.asarray(x), box, jnp.array(False), 48) for x in (picture, canvas))
    np.testing.assert_allclose(padded, inside, atol=1e-3)


@pytest.mark.parametrize(
    ("operation", "factor", "enhance"),
    [
        (augment.BRIGHTNESS, 1.35, ImageEnhance.Brightness),
        (augment.CONTRAST, 0.65, ImageEnhance.Contrast),
        (augment.SATURATION, 1.2, ImageEnhance.Color),
    ],
)
def test_color_operations_are_pillows(picture, operation, factor, enhance):
    # the other three operations are neutral: factor 1, or no shift of the hue
    factors = jnp.array([1.0, 1.0, 1.0, 0.0]).at[operation].set(factor)
    order = jnp.roll(jnp.arange(4), 1)
    actual = augment.color_jitter(jnp.asarray(picture, jnp.float32), factors, order)
    _close(actual, enhance(Image.fromarray(picture)).enhance(factor), mean=0.7, largest=2.5)


@pytest.mark.parametrize("shift", [-0.1, 0.1, 0.5])
def test_hue_shift_is_that_of_exact_hsv(picture, shift):
    import colorsys

    pixels = picture.reshape(-1, 3)[::37]
    expected = []
    for r, g, b in pixels / 255:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
    _close(augment.shift_hue(jnp.asarray(pixels, jnp.float32), jnp.array(shift)), 255 * np.array(expected), 0.01, 0.1)


def test_the_order_of_the_color_operations_counts(picture):
    factors = jnp.array([1.4, 0.6, 1.2, 0.1])
    pixels = jnp.asarray(picture, jnp.float32)
    forward, backward = (augment.color_jitter(pixels, factors, order) for order in (jnp.arange(4), jnp.arange(4)[::-1]))
    assert float(jnp.mean(jnp.abs(forward - backward))) > 1.0


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0])
def test_blur_is_pillows_gaussian(picture, sigma):
    expected = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma))
    # Pillow's filter is three box blurs, which differ from a Gaussian most at the sharp edges of a large radius.
    _close(augment.gaussian_blur(jnp.asarray(picture, jnp.float32), jnp.array(sigma), 2.0), expected, mean=1.3, largest=20.0)


def test_blur_of_zero_grayscale_and_solarize(picture):
    pixels = jnp.asarray(picture, jnp.float32)
    np.testing.assert_array_equal(augment.gaussian_blur(pixels, jnp.array(0.0), 2.0), pixels)
    _close(augment.luma(pixels)[..., 0], Image.fromarray(picture).convert("L"), mean=0.6, largest=1.0)
    np.testing.assert_array_equal(augment.solarize(pixels), np.asarray(ImageOps.solarize(Image.fromarray(picture), 128)))


def _reference_box(rng, height=100, width=150):
    """RandomResizedCrop as its documentation words it: ten attempts, one after the other (no fallback needed here)."""
    while True:
        area, ratio = height * width * rng.uniform(0.4, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return h, w


def test_random_parameters_have_the_recipes_distributions():
    views = default().views
    draw = lambda key: augment.sample_params(key, jnp.array([100, 150]), (0.4, 1.0), 0.1, 0.2, views)
    params = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    rate = lambda x: float(np.mean(np.asarray(x)))
    # four standard deviations of a mean over 4,000 draws
    for value, expected in (
        (rate(params.flip), 0.5),
        (rate(params.jitter), 0.8),
        (rate(params.grayscale), 0.2),
        (rate(params.sigma > 0), 0.1),
        (rate(params.solarize), 0.2),
    ):
        assert value == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))
    low, high = np.array([0.6, 0.6, 0.8, -0.1]), np.array([1.4, 1.4, 1.2, 0.1])
    factors = np.asarray(params.factors)
    assert np.all((factors >= low) & (factors <= high))
    np.testing.assert_allclose(factors.mean(0), (low + high) / 2, atol=4 * 0.8 / np.sqrt(12 * 4000))
    orders = {tuple(order) for order in np.asarray(params.order)}
    assert len(orders) == 24
    top, left, height, width = np.asarray(params.box).T
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 150))
    assert np.all((width / height > 0.73) & (width / height < 1.36))
    expected = np.array([_reference_box(np.random.default_rng(seed)) for seed in range(4000)])
    for actual, reference in ((height, expected[:, 0]), (width, expected[:, 1])):
        error = np.sqrt((actual.var() + reference.var()) / 4000)
        assert actual.mean() == pytest.approx(reference.mean(), abs=4 * error)
        np.testing.assert_allclose(np.quantile(actual, [0.1, 0.5, 0.9]), np.quantile(reference, [0.1, 0.5, 0.9]), atol=3)


def test_a_very_long_picture_gets_the_central_crop_of_a_clamped_ratio():
    boxes = jax.vmap(lambda key: augment.sample_box(key, jnp.array([10, 400]), (0.9, 1.0)))(
        jax.random.split(jax.random.key(0), 20)
    )
    np.testing.assert_array_equal(np.unique(boxes, axis=0), [[0, 194, 10, 13]])


def test_views_are_a_function_of_key_and_image_index_not_of_the_row(picture):
    views = default().views
    views.global_px, views.local_px, views.local_count = 32, 16, 2
    canvas = jnp.stack([jnp.asarray(picture), jnp.asarray(picture)[::-1]])
    size = jnp.full((2, 2), 128)
    run = lambda key, order: augment.multi_crop(
        jax.random.key(key), canvas[order], size, jnp.array([7, 9])[order], views=views, normalization="imagenet"
    )
    straight, swapped, other = run(0, jnp.array([0, 1])), run(0, jnp.array([1, 0])), run(1, jnp.array([0, 1]))
    assert straight[0].shape == (2, 2, 32, 32, 3)
    assert straight[1].shape == (2, 2, 16, 16, 3)
    for a, b in zip(straight, swapped, strict=True):
        np.testing.assert_array_equal(a, b[::-1])
    assert float(jnp.mean(jnp.abs(straight[0] - other[0]))) > 0.05
    views.local_count = 0
    assert run(0, jnp.array([0, 1]))[1] is None


def test_imagenet_normalization_is_undone_by_its_numbers(picture):
    normal = augment.normalize(jnp.asarray(picture), "imagenet")
    np.testing.assert_allclose((normal * jnp.array(augment.STD) + jnp.array(augment.MEAN)) * 255, picture, atol=1e-3)


def test_local_contrast_ignores_lighting_and_keeps_flat_noise_small(picture):
    ramp = np.linspace(0, 60, 128)[None, :, None]
    dark, lit = (
        augment.normalize(jnp.asarray(x, jnp.float32), "local_contrast") for x in (picture * 0.5, picture * 0.5 + ramp)
    )
    inner = slice(20, -20)  # the ramp bends at the repeated edges
    np.testing.assert_allclose(lit[inner, inner], dark[inner, inner], atol=0.05)
    noise = 128 + np.random.default_rng(0).normal(0, 1, (64, 64, 3))
    assert float(jnp.std(augment.normalize(jnp.asarray(noise), "local_contrast"))) < 0.1
    edge = np.zeros((64, 64, 3)) + 255 * (np.arange(64) >= 32)[None, :, None]
    assert float(jnp.max(augment.normalize(jnp.asarray(edge), "local_contrast"))) > 0.5
