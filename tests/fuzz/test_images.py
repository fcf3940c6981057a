"""Damaged images of every format: an array of the right kind or a BadImage, and nothing else."""

import io
import struct
import zlib
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmd_jax.data.decode import FORMATS, decode_rgb, eval_crop, to_canvas
from cmd_jax.datasets.dataset import Annotation, example
from cmd_jax.errors import BadImage
from tests.fuzz.mutations import cases, changes, mutate, report

CASES, MAX_PIXELS = 2500, 100_000


def _save(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _images():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(pixels), Image.fromarray(pixels[..., :3].copy())
    palette, gray, deep = rgb.quantize(7), rgb.convert("L"), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb]}
    avif = {"avif": _save(rgba, "avif", exif=exif), "avif animated": _save(rgb, "avif", **frames)} if "AVIF" in FORMATS else {}
    return avif | {
        "jpeg": _save(rgb, "jpeg", exif=exif),
        "jpeg progressive": _save(rgb, "jpeg", progressive=True),
        "jpeg grey": _save(gray, "jpeg"),
        "jpeg cmyk": _save(rgb.convert("CMYK"), "jpeg"),
        "png": _save(rgb, "png", exif=exif),
        "png alpha": _save(rgba, "png"),
        "png palette": _save(palette, "png", transparency=bytes(range(0, 210, 30))),
        "png deep": _save(deep, "png", transparency=257),
        "webp": _save(rgb, "webp"),
        "webp lossless": _save(rgba, "webp", lossless=True, exif=exif),
        "webp animated": _save(rgb, "webp", **frames),
        "bmp": _save(rgb, "bmp"),
        "bmp palette": _save(palette, "bmp"),
        "gif": _save(palette, "gif", transparency=1),
        "gif animated": _save(rgb, "gif", **frames),
        "tiff": _save(rgb, "tiff", exif=exif),
        "tiff packed": _save(rgb, "tiff", compression="tiff_lzw"),
        "tiff cmyk": _save(rgb.convert("CMYK"), "tiff", compression="tiff_adobe_deflate"),
        "tiff deep": _save(deep, "tiff"),
        "tiff float": _save(gray.convert("F"), "tiff"),
    }


IMAGES = _images()


def _with_right_checksums(png):
    """A damaged PNG whose chunks pass their check, so that the damage reaches the decoder."""
    out, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        chunk = png[at + 4 : at + 8 + size]
        out += png[at : at + 8 + size] + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return bytes(out)


def test_damaged_images(record_property):
    outcomes, formats, messages = Counter(), Counter(), []
    annotation = Annotation(0, "train", np.array([1.0, 1, 5, 5]), np.ones((2, 3)))

    @cases(CASES)
    @given(st.sampled_from(sorted(IMAGES)), changes, st.booleans(), st.booleans())
    def attempt(kind, changes, grayscale, right_checksums):
        damaged = mutate(IMAGES[kind], changes)
        if kind.startswith("png") and right_checksums:
            damaged = _with_right_checksums(damaged)
        try:
            pixels = decode_rgb(damaged, "photos/a", grayscale=grayscale, max_pixels=MAX_PIXELS)
        except BadImage as error:
            messages.append(str(error))
            outcomes["BadImage"] += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
            assert to_canvas(pixels, 16)[0].shape == (16, 16, 3)
            assert eval_crop(pixels, 8, 7).shape == (7, 7, 3)
            outcomes["arrays"] += 1
        try:  # what preparation does
            _, content = example(damaged, annotation, "photos/a")
        except BadImage as error:
            messages.append(str(error))
        else:
            assert np.all(np.isfinite(content["part_boxes"]))
        formats[kind] += 1

    attempt()
    assert all(message.startswith("photos/a: ") for message in messages)
    assert report(record_property, "damaged images", outcomes) >= 2000
    assert min(outcomes.values()) > 200  # both kinds of outcome are common
    assert min(formats[kind] for kind in IMAGES) > 20
