"""Every kind of picture becomes the right pixels or a BadImage that starts with its name."""

import io

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.decode import BadImage, decode_rgb, eval_boxes, eval_crop, to_canvas


def _encode(image, kind="png", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _pixel(encoded):
    return decode_rgb(encoded, "x")[0, 0].tolist()


def test_modes():
    red = np.full((2, 3, 3), (200, 10, 30), np.uint8)
    assert _pixel(_encode(Image.fromarray(red))) == [200, 10, 30]
    assert _pixel(_encode(Image.fromarray(red).convert("P", palette=Image.Palette.ADAPTIVE))) == [200, 10, 30]
    assert _pixel(_encode(Image.fromarray(np.full((2, 2), 77, np.uint8)))) == [77, 77, 77]
    assert _pixel(_encode(Image.fromarray(np.full((2, 2), 25700, np.uint16)))) == [100, 100, 100]  # scaled, not clipped
    assert _pixel(_encode(Image.new("RGBA", (2, 2), (9, 9, 9, 0)))) == [255, 255, 255]  # hidden colour stays hidden
    assert _pixel(_encode(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "jpeg")) == [255, 255, 255]
    assert decode_rgb(_encode(Image.new("RGB", (1, 1))), "x").shape == (1, 1, 3)


def test_grayscale_is_pillows_luma():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    gray = decode_rgb(_encode(image), "x", grayscale=True)
    np.testing.assert_array_equal(gray, np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=-1))


def test_exif_rotation_is_applied():
    image = Image.fromarray(np.zeros((2, 5, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    assert decode_rgb(_encode(image, "jpeg", exif=exif), "x").shape == (5, 2, 3)


def test_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    assert _pixel(_encode(frames[0], "gif", save_all=True, append_images=frames[1:])) == [255, 0, 0]


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "photos/a.jpg: the file is empty"),
        (b"<html>not found</html>", "photos/a.jpg: not a readable picture"),
        (_encode(Image.new("RGB", (64, 64)), "jpeg")[:200], "photos/a.jpg: not a readable picture"),
        (_encode(Image.new("RGB", (64, 64))), "photos/a.jpg: 64x64 pixels are over the limit of 1000"),
    ],
)
def test_bad_images_are_named(encoded, message):
    with pytest.raises(BadImage, match=f"^{message}"):
        decode_rgb(encoded, "photos/a.jpg", max_pixels=1000)


def test_canvas_keeps_the_shape_of_the_picture():
    pixels = np.full((10, 40, 3), 9, np.uint8)
    canvas, size = to_canvas(pixels, 20)
    assert size.tolist() == [5, 20]
    assert np.all(canvas[:5] == 9)
    assert np.all(canvas[5:] == 0)
    canvas, size = to_canvas(pixels, 50)  # never enlarged
    assert size.tolist() == [10, 40]


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (64, 64)])
def test_eval_crop_and_its_boxes_agree(size):
    # A white square on black: its box, carried through resize and crop, must cover the white pixels of the crop.
    pixels = np.zeros((*size, 3), np.uint8)
    top, left = size[0] // 2 - 5, size[1] // 2 - 6
    pixels[top : top + 10, left : left + 12] = 255
    box = np.array([[top / size[0], left / size[1], (top + 10) / size[0], (left + 12) / size[1]]])
    crop = eval_crop(pixels, 64, 56)
    assert crop.shape == (56, 56, 3)
    rows, columns = np.nonzero(crop[..., 0] > 127)
    found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    np.testing.assert_allclose(eval_boxes(box, size, 64, 56)[0] * 56, found, atol=1.0)
