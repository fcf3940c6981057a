"""Encoded bytes -> uint8 pixels: one policy for every kind of image, the two shapes that are needed, and bad images."""

import io
import sys
import threading
import warnings

import numpy as np
from PIL import ExifTags, Image, features

from cmd_jax.data.sources import Record
from cmd_jax.errors import BadImage

# Formats of Pillow that are read, with the endings of their files. Pillow reads AVIF from 11.3 on, if it was built with it.
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
if "avif" in features.modules and features.check_module("avif"):
    ENDINGS["AVIF"] = (".avif",)
IMAGE_SUFFIXES = tuple(ending for endings in ENDINGS.values() for ending in endings)
FORMATS = tuple(ENDINGS)
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200  # evaluation enlarges the shorter side to a few hundred pixels, and the longer one with it
MAX_SHARE = 0.001  # of the images; one is allowed however few there are
MAX_IN_A_ROW = 10

# Threads decode: a filter for the time of a call (warnings.catch_warnings) would be of all of them.
warnings.filterwarnings("ignore", module=r"PIL\.")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_record(record: Record, *, grayscale: bool = False) -> np.ndarray:
    """Decodes a record without its banner: [height, width, 3] uint8. Raises BadImage."""
    pixels = decode_rgb(record.encoded, record.name, grayscale=grayscale)
    rows = len(pixels) - record.banner_px
    if rows < 1:
        raise BadImage(f"{record.name}: {len(pixels)} rows are all in the banner of {record.banner_px}; remove the image")
    return pixels[:rows]


def decode_rgb(encoded: bytes, name: str, *, grayscale: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image.

    16-bit grey is scaled (Pillow would clip it), transparency is laid on white, EXIF rotation is applied, the first frame
    of an animation counts. EXIF data that cannot be read turns nothing.

    Args:
        encoded: the file's bytes.
        name: path or id for the error message.
        grayscale: three equal channels of ITU-R 601 luma.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        [height, width, 3] uint8.

    Raises:
        BadImage: the bytes are not an image, are damaged, hold too many pixels or a strip of them.
    """
    if not encoded:
        raise BadImage(f"{name}: the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        return image_rgb(image, name, grayscale=grayscale, max_pixels=max_pixels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, before it says the size
        raise BadImage(f"{name}: over the limit of {max_pixels} pixels ({error}); shrink the image or remove it") from error
    # Pillow's plugins raise many types on damaged files; all of them mean the same to the caller.
    except Exception as error:
        raise BadImage(f"{name}: not a readable image ({type(error).__name__}: {error}); remove or replace it") from error


def image_rgb(image: Image.Image, name: str, *, grayscale: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image that Pillow has opened; arguments and result as of `decode_rgb`.

    Raises:
        BadImage: too many pixels, a strip of them, or numbers of no agreed range; what Pillow raises on damaged files passes.
    """
    _check_size(image.size, name, max_pixels)
    image.load()
    turn = _TURNS.get(orientation(image))
    pixels = _to_rgb(image if turn is None else image.transpose(turn), name)
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")) if grayscale else pixels


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(f"{name}: {width}x{height} pixels are over the limit of {max_pixels}; shrink the image or remove it")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{name}: {width}x{height} pixels: one side is over {MAX_ASPECT} times the other; crop the image")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 (upright) where it has none or its EXIF data is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Pillow raises many types on damaged EXIF data; the pixels may be whole all the same, and viewers show them.
    except Exception:
        return 1


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode == "F":
        raise BadImage(f"{name}: its pixels are floating-point numbers of no agreed range; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise BadImage(
                f"{name}: its levels run from {levels.min()} to {levels.max()}, beyond 16 bits; store it with 8 or 16 bits"
            )
        gray = (levels.astype(np.int32) * 255 // 65535).astype(np.uint8)
        gray[levels == image.info.get("transparency")] = 255
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def to_canvas(pixels: np.ndarray, canvas_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits an image into the top left corner of a square canvas, shrinking it if its longer side is too long.

    Args:
        pixels: [height, width, 3] uint8.
        canvas_px: C.

    Returns:
        [C, C, 3] uint8, the rest black; and [2] int32, the image's height and width inside it.
    """
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer > canvas_px:
        height, width = (max(1, round(side * canvas_px / longer)) for side in (height, width))
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    canvas = np.zeros((canvas_px, canvas_px, 3), np.uint8)
    canvas[:height, :width] = pixels
    return canvas, np.array([height, width], np.int32)


def eval_crop(
    pixels: np.ndarray, resize_px: int, crop_px: int, mode: str = "shorter_side", interpolation: str = "bicubic"
) -> np.ndarray:
    """Evaluation crop of the references: resized by Pillow, which antialiases, then cropped at the centre.

    Args:
        pixels: [height, width, 3] uint8.
        resize_px: side after resizing; an image of that size is not resampled.
        crop_px: side of the crop.
        mode: which side `resize_px` is, see `eval_size`.
        interpolation: "bicubic", "bilinear" or "lanczos".

    Returns:
        [crop_px, crop_px, 3] uint8.
    """
    height, width = eval_size(pixels.shape[:2], resize_px, mode)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling[interpolation.upper()])
    top, left = eval_corner((height, width), crop_px)
    return np.asarray(image.crop((left, top, left + crop_px, top + crop_px)))


def eval_size(size: tuple[int, int], resize_px: int, mode: str = "shorter_side") -> tuple[int, int]:
    """(height, width) after resizing: of mode "squash" both are `resize_px`, whatever the shape; of "shorter_side" the shorter
    one is, and the longer one is cut to a whole number as torchvision does."""
    height, width = size
    if mode == "squash":
        return resize_px, resize_px
    if width <= height:
        return int(resize_px * height / width), resize_px
    return resize_px, int(resize_px * width / height)


def eval_corner(size: tuple[int, int], crop_px: int) -> tuple[int, int]:
    """(top, left) of torchvision's centre crop."""
    return round((size[0] - crop_px) / 2), round((size[1] - crop_px) / 2)


def eval_boxes(
    boxes: np.ndarray, size: tuple[int, int], resize_px: int, crop_px: int, mode: str = "shorter_side"
) -> np.ndarray:
    """Maps boxes of an image to boxes of its evaluation crop.

    Args:
        boxes: [P, 4] (ymin, xmin, ymax, xmax), fractions of the image.
        size: (height, width) of the image.
        resize_px, crop_px, mode: as of `eval_crop`.

    Returns:
        [P, 4] fractions of the crop, clipped to 0..1; a part outside the crop has zero area.
    """
    resized = np.array(eval_size(size, resize_px, mode), np.float64)
    corner = np.array(eval_corner(tuple(resized.astype(int)), crop_px))
    scale, shift = np.tile(resized, 2) / crop_px, np.tile(corner, 2) / crop_px
    return np.clip(boxes * scale - shift, 0, 1).astype(np.float32)


class BadImages:
    """The bad images of a split: each is logged once to the error stream, and counted.

    A share points to a damaged dataset, a row of them to a damaged part of it. One bad image is allowed in
    any folder, so that a single bad photo never ends a small run; two are too many below 2,000 images.

    Args:
        flags: [N], written to: not 0 where an image is bad. It may hold what an earlier process found.
        outcome: what becomes of a bad image, for the message.
    """

    def __init__(self, flags: np.ndarray, outcome: str):
        self._flags, self._logged, self._lock, self.outcome = flags, set(), threading.Lock(), outcome
        self.allowed = max(1, int(len(flags) * MAX_SHARE))

    @property
    def count(self) -> int:
        """Bad images that this process or an earlier one with the same flags has found."""
        return int(np.count_nonzero(self._flags))

    def note(self, index: int, reason: str) -> None:
        """Records that an image is bad.

        Args:
            index: of the image.
            reason: starts with its path or id.

        Raises:
            BadImage: there are too many.
        """
        with self._lock:
            self._flags[index] = 1
            if index not in self._logged:
                self._logged.add(index)
                print(f"bad image, {self.outcome}: {reason}", file=sys.stderr, flush=True)
            images = len(self._flags)
            self.check(reason)
            if self._in_a_row(index) >= min(MAX_IN_A_ROW, images):
                raise BadImage(f"{reason}; {self._in_a_row(index)} images in a row are bad: repair the data")

    def check(self, reason: str) -> None:
        """Raises BadImage, beginning with the reason, if the bad images are more than is allowed."""
        images, count = len(self._flags), self.count
        if count > self.allowed:
            raise BadImage(
                f"{reason}; {count} bad images of {images:,} are over the limit of {self.allowed} (0.1 %): repair the data"
            )

    def _in_a_row(self, index: int) -> int:
        """Number of adjacent bad images around one, counted up to MAX_IN_A_ROW to either side."""
        first = last = index
        while first > max(0, index - MAX_IN_A_ROW) and self._flags[first - 1]:
            first -= 1
        while last < min(len(self._flags) - 1, index + MAX_IN_A_ROW) and self._flags[last + 1]:
            last += 1
        return last - first + 1
