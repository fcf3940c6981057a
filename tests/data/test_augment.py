"""Device augmentation against Pillow, operation by operation, and the distributions of its random parameters.

Tolerances are in 8-bit levels: Pillow rounds to whole levels after every pass, the device does not.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from cmd_jax.config import default
from cmd_jax.data import augment
from cmd_jax.data.decode import eval_corner, eval_crop, eval_size
from cmd_jax.datasets.bird_renderer import render


def _photo():
    """A photograph of 512 x 600 px, a public-domain portrait that matplotlib carries."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file).convert("RGB"))


@pytest.fixture(scope="module", params=["bird", "cloth"])
def image(request):
    """128 x 128 px: a drawing, and a part of a photograph."""
    if request.param == "bird":
        return render((0, 1, 2, 3, 1), np.random.default_rng(5), 128).image
    return _photo()[420:548, 20:148]


@pytest.fixture(scope="module")
def photo():
    return _photo()


def _close(actual, expected, mean, largest):
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert difference.mean() <= mean
    assert difference.max() <= largest


@pytest.mark.parametrize(("dtype", "mean", "largest"), [("float32", 0.01, 1.0), ("bfloat16", 0.35, 2.0)])
def test_resized_crop_equals_pillows_bicubic(photo, dtype, mean, largest):
    crop = jax.jit(augment.resized_crop, static_argnums=(3, 4))
    boxes = ((0, 0, 600, 512), 224), ((101, 7, 300, 401), 224), ((250, 200, 60, 50), 96), ((31, 40, 199, 170), 96)
    for flip, (box, out) in itertools.product((False, True), boxes):
        top, left, height, width = box
        cropped = Image.fromarray(photo).crop((left, top, left + width, top + height))
        turned = ImageOps.mirror(cropped) if flip else cropped
        # Along x, then along y: in one call Pillow chooses the order by the shape, and rounds and cuts in between.
        expected = turned.resize((out, height), Image.Resampling.BICUBIC).resize((out, out), Image.Resampling.BICUBIC)
        actual = crop(photo, jnp.array(box, jnp.float32), jnp.array(flip), out, dtype)
        _close(actual, expected, mean, largest)
        # Torchvision's call, in which Pillow chooses the order of the axes: a whole level at most here and there.
        _close(actual, turned.resize((out, out), Image.Resampling.BICUBIC), mean + 0.1, largest + 1)


def test_crop_ignores_canvas_outside_the_image(image):
    canvas = np.full((160, 160, 3), 255, np.uint8)
    canvas[:128, :128] = image
    box = jnp.array([0.0, 0.0, 128.0, 128.0])
    inside, padded = (augment.resized_crop(jnp.asarray(x), box, jnp.array(False), 48) for x in (image, canvas))
    np.testing.assert_allclose(padded, inside, atol=1e-3)


@pytest.mark.parametrize(
    ("operation", "factor", "enhance"),
    [
        (augment.BRIGHTNESS, 1.35, ImageEnhance.Brightness),
        (augment.CONTRAST, 0.65, ImageEnhance.Contrast),
        (augment.SATURATION, 1.2, ImageEnhance.Color),
    ],
)
def test_color_operations_equal_pillows(image, operation, factor, enhance):
    # the other three operations are neutral: factor 1, or no shift of the hue
    factors = jnp.array([1.0, 1.0, 1.0, 0.0]).at[operation].set(factor)
    order = jnp.roll(jnp.arange(4), 1)
    actual = augment.color_jitter(jnp.asarray(image, jnp.float32), factors, order)
    _close(actual, enhance(Image.fromarray(image)).enhance(factor), mean=0.7, largest=2.5)


@pytest.mark.parametrize("shift", [-0.1, 0.1, 0.5])
def test_hue_shift_equals_exact_hsv(image, shift):
    import colorsys

    pixels = image.reshape(-1, 3)[::37]
    expected = []
    for r, g, b in pixels / 255:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
    _close(augment.shift_hue(jnp.asarray(pixels, jnp.float32), jnp.array(shift)), 255 * np.array(expected), 0.01, 0.1)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0])
def test_blur_is_near_pillows_gaussian(image, sigma):
    expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
    # Pillow's filter is three box blurs, which differ from a Gaussian most at the sharp edges of a large radius.
    _close(augment.gaussian_blur(jnp.asarray(image, jnp.float32), jnp.array(sigma), 2.0), expected, mean=1.3, largest=25.0)


def test_zero_blur_grayscale_and_solarize(image):
    pixels = jnp.asarray(image, jnp.float32)
    np.testing.assert_array_equal(augment.gaussian_blur(pixels, jnp.array(0.0), 2.0), pixels)
    _close(augment.luma(pixels)[..., 0], Image.fromarray(image).convert("L"), mean=0.6, largest=1.0)
    np.testing.assert_array_equal(augment.solarize(pixels), np.asarray(ImageOps.solarize(Image.fromarray(image), 128)))


def _reference_box(rng, height=100, width=150):
    """RandomResizedCrop as its documentation words it: ten attempts, one after the other (no fallback needed here)."""
    while True:
        area, ratio = height * width * rng.uniform(0.4, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return h, w


def test_random_parameters_have_their_distributions():
    views = default().views
    draw = lambda key: augment.sample_params(key, jnp.array([100, 150]), (0.4, 1.0), 0.1, 0.2, views)
    params = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
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
    _, counts = np.unique(np.asarray(params.order), axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum(np.square(counts - 4000 / 24)) / (4000 / 24) < 49.7  # chi-square of 23 degrees, p 0.001
    for value, lowest, highest in (*zip(factors.T, low, high, strict=True), (np.asarray(_sigma(views)), 0.1, 2.0)):
        assert stats.kstest(value, stats.uniform(lowest, highest - lowest).cdf).pvalue > 1e-3
    top, left, height, width = np.asarray(params.box).T
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 150))
    assert np.all((width / height > 0.73) & (width / height < 1.36))
    expected = np.array([_reference_box(np.random.default_rng(seed)) for seed in range(4000)])
    for actual, reference in ((height, expected[:, 0]), (width, expected[:, 1])):
        error = np.sqrt((actual.var() + reference.var()) / 4000)
        assert actual.mean() == pytest.approx(reference.mean(), abs=4 * error)
        np.testing.assert_allclose(np.quantile(actual, [0.1, 0.5, 0.9]), np.quantile(reference, [0.1, 0.5, 0.9]), atol=3)


def _sigma(views):
    draw = lambda key: augment.sample_params(key, jnp.array([100, 150]), (0.05, 0.4), 1.0, 0.0, views).sigma
    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 2000))


def test_local_boxes_have_their_distributions():
    uniform = jax.random.uniform(jax.random.key(2), (4000, augment.BOX_NUMBERS))
    boxes = np.asarray(jax.vmap(lambda u: augment.sample_box(u, jnp.array([375, 500]), (0.05, 0.4)))(uniform))
    share = boxes[:, 2] * boxes[:, 3] / (375 * 500)
    assert stats.kstest(share, stats.uniform(0.05, 0.35).cdf).pvalue > 1e-3
    log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
    assert stats.kstest(log_ratio, stats.uniform(np.log(3 / 4), 2 * np.log(4 / 3)).cdf).pvalue > 1e-3
    top = boxes[:, 0] / (375 - boxes[:, 2] + 1)
    assert stats.kstest(top, stats.uniform(0, 1).cdf).pvalue > 1e-3


def _on_pillow(photo, params, out):
    """The same view by Pillow's operations, as torchvision calls them."""
    top, left, height, width = (int(value) for value in params.box)
    image = Image.fromarray(photo).crop((left, top, left + width, top + height)).resize((out, out), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if params.flip else image
    if params.jitter:
        for operation in np.asarray(params.order):
            factor = float(params.factors[operation])
            if operation == augment.HUE:
                h, s, v = image.convert("HSV").split()
                turned = (np.asarray(h).astype(np.int16) + int(factor * 255)).astype(np.uint8)
                image = Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
            else:
                image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation](image).enhance(factor)
    image = image.convert("L").convert("RGB") if params.grayscale else image
    image = image.filter(ImageFilter.GaussianBlur(float(params.sigma))) if params.sigma else image
    return np.asarray(ImageOps.solarize(image, 128) if params.solarize else image, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_views_are_near_pillows(photo, dtype):
    views = default().views
    views.update(global_px=224, local_px=96, dtype=dtype)
    canvas = np.zeros((2, 640, 640, 3), np.uint8)
    canvas[:, :600, :512] = photo
    size, index = np.tile([600, 512], (2, 1)), np.array([3, 4])
    key = jax.random.key(5)
    produced = jax.jit(lambda *batch: augment.multi_crop(key, *batch, views=views, normalization="imagenet"))(
        canvas, size, index
    )
    shapes = [(2, 2, 224, 224, 3), (2, 8, 96, 96, 3)]
    assert [view.shape for view in produced] == shapes
    # float64 sums would differ by less: in these levels the distance is Pillow's rounding after every operation
    means = []
    for row in range(2):
        for number in range(10):
            local = number > 1
            scale = views.local_scale if local else views.global_scale
            blur = views.local_blur_prob if local else views.global_blur_prob[number]
            solarize = 0.0 if local else views.global_solarize_prob[number]
            view_key = jax.random.fold_in(jax.random.fold_in(key, int(index[row])), number)
            params = jax.device_get(augment.sample_params(view_key, jnp.array(size[row]), scale, blur, solarize, views))
            actual = produced[1][row, number - 2] if local else produced[0][row, number]
            pixels = (np.asarray(actual) * augment.STD + augment.MEAN) * 255
            difference = np.abs(pixels - _on_pillow(photo, params, actual.shape[0]))
            if params.solarize:  # a rounding across the threshold of 128 inverts a pixel
                difference = difference[difference < 100]
            means.append(difference.mean())
            assert np.quantile(difference, 0.99) < 10
    assert np.mean(means) < 1.5
    assert np.max(means) < 3.0


@pytest.mark.parametrize("size", [(600, 512), (257, 1000)])
def test_evaluation_crop_equals_torchvision(photo, size):
    pixels = np.asarray(Image.fromarray(photo).resize(size[::-1]))
    height, width = size
    # torchvision: Resize(256) cuts the longer side to a whole number, CenterCrop(224) rounds half the margin
    new = (256, int(256 * width / height)) if height <= width else (int(256 * height / width), 256)
    whole = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BICUBIC)
    top, left = round((new[0] - 224) / 2.0), round((new[1] - 224) / 2.0)
    expected = np.asarray(whole)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(eval_crop(pixels, 256, 224), expected)
    assert (eval_size(size, 256), eval_corner(new, 224)) == (new, (top, left))
    rows, columns = (augment.interpolation_matrix(0, old, out, old) for old, out in zip(size, new, strict=True))
    device = jnp.einsum("xj,ijc->ixc", columns, pixels.astype(np.float32), precision="highest")
    device = jnp.einsum("yi,ixc->yxc", rows, jnp.clip(jnp.round(device), 0, 255), precision="highest")
    _close(jnp.clip(jnp.round(device), 0, 255)[top : top + 224, left : left + 224], expected, mean=0.3, largest=1.0)


def test_looks_are_the_image_and_its_centre(photo):
    height, width = photo.shape[:2]
    canvas = np.zeros((1, 2 * max(height, width), 2 * max(height, width), 3), np.uint8)
    canvas[0, :height, :width] = photo
    looks = augment.crop_looks(jnp.asarray(canvas), jnp.array([[height, width]]), out=32, normalization="0,0,0/1,1,1")
    centre = tuple(round(part * side) for part in (0.25, 0.75) for side in (width, height))
    for look, part in zip(looks[0], (Image.fromarray(photo), Image.fromarray(photo).crop(centre)), strict=True):
        _close(255 * look, part.resize((32, 32), Image.Resampling.BICUBIC), 0.11, 2.0)


def test_long_images_get_a_clamped_central_crop():
    boxes = jax.vmap(lambda uniform: augment.sample_box(uniform, jnp.array([10, 400]), (0.9, 1.0)))(
        jax.random.uniform(jax.random.key(0), (20, augment.BOX_NUMBERS))
    )
    np.testing.assert_array_equal(np.unique(boxes, axis=0), [[0, 194, 10, 13]])


def test_views_depend_on_key_and_index_only(photo):
    image = photo[60:188, 190:318]
    views = default().views
    views.global_px, views.local_px, views.local_count = 32, 16, 2
    canvas = jnp.stack([jnp.asarray(image), jnp.asarray(image)[::-1]])
    size = jnp.full((2, 2), 128)
    compiled = lambda: jax.jit(lambda *batch: augment.multi_crop(*batch, views=views, normalization="imagenet"))
    run = lambda key, order, whole: whole(jax.random.key(key), canvas[order], size, jnp.array([7, 9])[order])
    two = compiled()
    straight, swapped, other = (run(key, jnp.array(order), two) for key, order in ((0, (0, 1)), (0, (1, 0)), (1, (0, 1))))
    assert straight[0].shape == (2, 2, 32, 32, 3)
    assert straight[1].shape == (2, 2, 16, 16, 3)
    for a, b in zip(straight, swapped, strict=True):
        np.testing.assert_array_equal(a, b[::-1])
    assert float(jnp.mean(jnp.abs(straight[0] - other[0]))) > 0.05
    views.local_count = 0
    assert jax.eval_shape(compiled(), jax.random.key(0), canvas, size, jnp.array([7, 9]))[1] is None


def test_local_contrast_ignores_lighting(image):
    ramp = np.linspace(0, 60, 128)[None, :, None]
    dark, lit = (augment.normalize(jnp.asarray(x, jnp.float32), "local_contrast") for x in (image * 0.5, image * 0.5 + ramp))
    inner = slice(20, -20)  # the ramp bends at the repeated edges
    np.testing.assert_allclose(lit[inner, inner], dark[inner, inner], atol=0.05)
    noise = 128 + np.random.default_rng(0).normal(0, 1, (64, 64, 3))
    assert float(jnp.std(augment.normalize(jnp.asarray(noise), "local_contrast"))) < 0.1
    edge = np.zeros((64, 64, 3)) + 255 * (np.arange(64) >= 32)[None, :, None]
    assert float(jnp.max(augment.normalize(jnp.asarray(edge), "local_contrast"))) > 0.5
