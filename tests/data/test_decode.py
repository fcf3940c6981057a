"""Every kind of image becomes the right pixels or a BadImage that starts with its name."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from cmd_jax.data.decode import ENDINGS, FORMATS, decode_rgb, eval_boxes, eval_crop, to_canvas
from cmd_jax.errors import BadImage


def _encode(image, kind="png", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _png(rows, width, depth, colour, chunks=()):
    """A PNG of any depth and kind of colour, which Pillow cannot write; rows are packed bytes."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


GRAY, RGB, GRAY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # PNG's kinds of colour
WHITE = (255, 255, 255)
DEEP = np.array([[0, 257, 25700, 65535]], np.uint16)
CHECKERS = Image.fromarray(np.array([[[250, 10, 30], [0, 200, 5]]], np.uint8))


def _palette(colours):
    image = Image.new("P", (2, 1))
    image.putpalette([level for colour in colours for level in colour])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    ("encoded", "pixels"),
    [
        pytest.param(_encode(CHECKERS), [(250, 10, 30), (0, 200, 5)], id="RGB"),
        pytest.param(_encode(CHECKERS, "bmp"), [(250, 10, 30), (0, 200, 5)], id="BMP"),
        pytest.param(_encode(CHECKERS, "tiff"), [(250, 10, 30), (0, 200, 5)], id="TIFF"),
        pytest.param(_encode(CHECKERS, "webp", lossless=True), [(250, 10, 30), (0, 200, 5)], id="WebP"),
        pytest.param(_encode(Image.new("L", (1, 1), 77)), [(77, 77, 77)], id="one grey pixel"),
        pytest.param(_encode(Image.new("1", (2, 1), 1)), [WHITE, WHITE], id="one bit"),
        pytest.param(_png([bytes([0x1F])], 2, 4, GRAY), [(17, 17, 17), WHITE], id="four bits of grey"),
        # 16 bits are scaled, not clipped: 257 is level 1
        pytest.param(_encode(Image.fromarray(DEEP)), [(0,) * 3, (1,) * 3, (100,) * 3, WHITE], id="16-bit grey PNG"),
        pytest.param(_encode(Image.fromarray(DEEP), "tiff"), [(0,) * 3, (1,) * 3, (100,) * 3, WHITE], id="16-bit grey TIFF"),
        pytest.param(
            _encode(Image.fromarray(DEEP.astype(np.int32)), "tiff"),
            [(0,) * 3, (1,) * 3, (100,) * 3, WHITE],
            id="32-bit grey TIFF",
        ),
        pytest.param(
            _png([struct.pack(">2H", 257, 25700)], 2, 16, GRAY, [(b"tRNS", struct.pack(">H", 25700))]),
            [(1, 1, 1), WHITE],
            id="16-bit grey with a transparent level",
        ),
        pytest.param(
            _png([struct.pack(">6H", 0, 257, 65535, 25700, 0, 0)], 2, 16, RGB), [(0, 1, 255), (100, 0, 0)], id="16-bit RGB"
        ),
        pytest.param(
            _png([struct.pack(">4H", 25700, 0, 25700, 65535)], 2, 16, GRAY_ALPHA),
            [WHITE, (100,) * 3],
            id="16-bit grey and alpha",
        ),
        pytest.param(
            _png([struct.pack(">8H", 0, 257, 0, 0, 0, 257, 65535, 65535)], 2, 16, RGB_ALPHA),
            [WHITE, (0, 1, 255)],
            id="16-bit RGBA",
        ),
        # on white: 0.2 of the colour and 0.8 of white; a hidden colour stays hidden
        pytest.param(_encode(Image.new("RGBA", (1, 1), (100, 0, 200, 51))), [(224, 204, 244)], id="half transparent"),
        pytest.param(_encode(Image.new("RGBA", (1, 1), (9, 9, 9, 0))), [WHITE], id="hidden colour"),
        pytest.param(_encode(Image.new("LA", (1, 1), (0, 51))), [(204, 204, 204)], id="grey and alpha"),
        pytest.param(_encode(Image.new("L", (1, 1), 7), transparency=7), [WHITE], id="transparent level"),
        pytest.param(_encode(Image.new("RGB", (1, 1), (7, 8, 9)), transparency=(7, 8, 9)), [WHITE], id="transparent colour"),
        pytest.param(_encode(_palette([(9, 8, 7), (200, 10, 30)])), [(9, 8, 7), (200, 10, 30)], id="palette"),
        pytest.param(
            _encode(_palette([(9, 8, 7), (100, 0, 200)]), transparency=bytes([0, 51])),
            [WHITE, (224, 204, 244)],
            id="palette, alpha",
        ),
        pytest.param(_encode(_palette([(9, 8, 7), (200, 10, 30)]), "gif", transparency=0), [WHITE, (200, 10, 30)], id="GIF"),
        # the pixels of a stereo camera's first image, by the ending .mpo or .jpg
        pytest.param(
            _encode(Image.new("L", (1, 1), 77), "mpo", save_all=True, append_images=[Image.new("L", (1, 1), 200)]),
            [(77, 77, 77)],
            id="MPO",
        ),
        # ink as Adobe stores it (inverted) in JPEG, and as it is in TIFF: (255 - ink)(255 - black) / 255
        pytest.param(
            _encode(Image.new("CMYK", (1, 1), (10, 20, 30, 40)), "jpeg", quality=100), [(207, 198, 190)], id="CMYK JPEG"
        ),
        pytest.param(_encode(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "jpeg"), [WHITE], id="CMYK JPEG without ink"),
        pytest.param(_encode(Image.new("CMYK", (1, 1), (10, 20, 30, 40)), "tiff"), [(207, 198, 190)], id="CMYK TIFF"),
    ],
)
def test_every_kind_of_pixel(encoded, pixels):
    decoded = decode_rgb(encoded, "x")
    assert (decoded.dtype, decoded.shape) == (np.uint8, (1, len(pixels), 3))
    assert [tuple(pixel) for pixel in decoded[0].tolist()] == pixels


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("turn", [1, 6])
def test_avif(turn):
    """Grey, which its colour space keeps; half transparent on white; turned once."""
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = np.full((16, 32, 4), (90, 90, 90, 255), np.uint8)
    stored[:, 16:] = (0, 0, 0, 51)
    found = decode_rgb(_encode(Image.fromarray(stored), "avif", quality=100, exif=exif, subsampling="4:4:4"), "x")
    expected = np.repeat(np.where(stored[..., 3:] == 255, 90, 204), 3, axis=-1)
    np.testing.assert_array_equal(found, expected if turn == 1 else np.rot90(expected, -1))


def test_endings_match_pillows_formats():
    known = Image.registered_extensions()
    assert all(known[ending] in (kind, "MPO") for kind, endings in ENDINGS.items() for ending in endings)


def test_grayscale_is_pillows_luma():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8))
    gray = decode_rgb(_encode(image), "x", grayscale=True)
    np.testing.assert_array_equal(gray, np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_exif_rotation_is_applied_once(kind):
    """Pixel (0, 0) of the stored image goes where each orientation says."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    corners = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    corners |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    for orientation, corner in corners.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "webp" else {}
        pixels = decode_rgb(_encode(Image.fromarray(stored), kind, exif=exif, **options), "x")
        assert pixels.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3)), orientation
        row, column = (0 if "top" in corner else -1), (0 if "left" in corner else -1)
        assert pixels[row, column].min() > 250, orientation
        assert np.count_nonzero(pixels[..., 0] > 127) == 64


def test_damaged_exif_data_is_ignored():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a"
    whole = _encode(Image.fromarray(np.full((8, 16, 3), 90, np.uint8)), "jpeg", exif=exif)
    start = whole.index(b"Exif\0\0") + 6
    for junk in (b"XX", b"II\x2a\0\xff\xff\xff\xff"):
        damaged = whole[:start] + junk + whole[start + len(junk) :]
        np.testing.assert_array_equal(decode_rgb(damaged, "x"), np.full((8, 16, 3), 90))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    encoded = _encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_rgb(encoded, "x")[0, 0].tolist() == [255, 0, 0]


def _claims(width, height):
    """A PNG of a few bytes that says it has this size."""
    whole = _png([b""], width, 8, RGB)
    whole = whole[:20] + struct.pack(">I", height) + whole[24:]
    return whole[:29] + struct.pack(">I", zlib.crc32(whole[12:29])) + whole[33:]


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (10_001, 10_000, "10001x10000 pixels are over the limit of 100000000; shrink"),
        (50_000, 50_000, r"over the limit of 100000000 pixels \(Image size \(2500000000 pixels\)"),  # Pillow's own limit
        (2**31 - 1, 1, "over the limit of 100000000 pixels"),
        (1, 60_000, "1x60000 pixels: one side is over 200 times the other; crop"),
        (0, 5, "not a readable image"),
    ],
)
def test_size_is_checked_before_anything_is_decoded(width, height, message, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=f"^photos/a.png: .*{message}"):
        decode_rgb(_claims(width, height), "photos/a.png")


def test_pixels_without_a_range_are_refused():
    floats = Image.fromarray(np.array([[0.5, 300.0]], np.float32))
    with pytest.raises(BadImage, match=r"^x: its pixels are floating-point numbers"):
        decode_rgb(_encode(floats, "tiff"), "x")
    large = Image.fromarray(np.array([[0, 70_000]], np.int32))
    with pytest.raises(BadImage, match=r"^x: its levels run from 0 to 70000, beyond 16 bits"):
        decode_rgb(_encode(large, "tiff"), "x")


def test_threads_leave_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    image = _encode(CHECKERS)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: decode_rgb(image, "x"), range(200)))
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "photos/a.jpg: the file is empty"),
        (b"<html>not found</html>", "photos/a.jpg: not a readable image"),
        (_encode(Image.new("RGB", (64, 64)), "jpeg")[:200], "photos/a.jpg: not a readable image"),
        (_encode(Image.new("RGB", (64, 64))), "photos/a.jpg: 64x64 pixels are over the limit of 1000"),
    ],
)
def test_bad_images_are_named(encoded, message):
    with pytest.raises(BadImage, match=f"^{message}"):
        decode_rgb(encoded, "photos/a.jpg", max_pixels=1000)


def test_canvas_keeps_the_shape_of_the_image():
    pixels = np.full((10, 40, 3), 9, np.uint8)
    canvas, size = to_canvas(pixels, 20)
    assert size.tolist() == [5, 20]
    assert np.all(canvas[:5] == 9)
    assert np.all(canvas[5:] == 0)
    canvas, size = to_canvas(pixels, 50)  # never enlarged
    assert size.tolist() == [10, 40]


@pytest.mark.parametrize("mode", ["shorter_side", "squash"])
@pytest.mark.parametrize("size", [(37, 90), (90, 37), (64, 64)])
def test_eval_crop_and_its_boxes_agree(size, mode):
    # A white square on black: its box, carried through resize and crop, must cover the white pixels of the crop.
    pixels = np.zeros((*size, 3), np.uint8)
    top, left = size[0] // 2 - 5, size[1] // 2 - 6
    pixels[top : top + 10, left : left + 12] = 255
    box = np.array([[top / size[0], left / size[1], (top + 10) / size[0], (left + 12) / size[1]]])
    crop = eval_crop(pixels, 64, 56, mode)
    assert crop.shape == (56, 56, 3)
    rows, columns = np.nonzero(crop[..., 0] > 127)
    found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    np.testing.assert_allclose(eval_boxes(box, size, 64, 56, mode)[0] * 56, found, atol=1.0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_squash_and_interpolation_are_pillows(interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels).resize((24, 24), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(eval_crop(pixels, 24, 16, "squash", interpolation), np.asarray(whole)[4:20, 4:20])


@pytest.mark.parametrize("mode", ["shorter_side", "squash"])
def test_an_image_of_the_size_is_not_resampled(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(eval_crop(pixels, 32, 32, mode, "lanczos"), pixels)
