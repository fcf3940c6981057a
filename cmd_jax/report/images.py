"""The images that a report shows: which they are, their crops, and colours of their patches as pixels and data URIs."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.decode import decode_record
from cmd_jax.data.sources import Source
from cmd_jax.evaluation.evaluate import Evaluation
from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.splits import Splits
from cmd_jax.inference.patches import Patches, read_patches
from cmd_jax.inference.preprocess import prepared
from cmd_jax.inference.run import Encoder
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network

IMAGE_PX, QUALITY = 160, 82  # of single images
SHEET_PX, SHEET_COLUMNS, GAP_PX, TITLE_PX = 192, 6, 4, 20  # of the sheet of overlays
HEAT, STRENGTH = "inferno", 0.6  # colours of weights, and how much of the image they cover


class ReportImages(NamedTuple):
    """Test images, or training images where there are no others, and the training images that they are compared with.

    Attributes:
        config: resolved.
        source: split of the images shown.
        features: of them.
        kind: "test" or "training".
        train: split of the training images.
        gallery: features of them.
        inspect: (split, rows of it) -> the teacher's outputs for the patches of these images.
    """

    config: ConfigDict
    source: Source
    features: Features
    kind: str
    train: Source
    gallery: Features
    inspect: Callable[[Source, Sequence[int]], Patches]

    def count(self) -> int:
        """Number of images that can be shown."""
        return len(self.features.names)

    def in_gallery(self) -> bool:
        """Whether the images shown are the gallery, where each would find itself."""
        return self.source is self.train

    def class_name(self, label: int) -> str:
        """Name of a class; "" of an image without one."""
        names = self.train.class_names
        return names[label] if 0 <= label < len(names) else ""

    def uri(self, source: Source, row: int) -> str:
        """An image of a split as a data URI."""
        return jpeg_uri(shown_crop(source, row, self.config, IMAGE_PX), QUALITY)


def report_images(
    evaluation: Evaluation, config: ConfigDict, network: Network, teacher: Params, splits: Splits
) -> ReportImages:
    """Selects the images of an evaluation that could be read; `teacher` is on every device of this process."""
    queries = evaluation.queries
    splits = splits.select(evaluation.gallery.indices, None if queries is None else queries.indices)
    encoder = Encoder(config, network.backbone, teacher)
    inspect = lambda source, rows: read_patches(encoder, source, rows)
    if queries is None:
        source, features, kind = splits.train, evaluation.gallery, "training"
    else:
        source, features, kind = splits.test, queries, "test"
    return ReportImages(config, source, features, kind, splits.train, evaluation.gallery, inspect)


def short(name: str) -> str:
    """The last two parts of a path: enough to find an image, and nothing about the machine."""
    return "/".join(name.replace("\\", "/").split("/")[-2:])


def shown_crop(source: Source, index: int, config: ConfigDict, side_px: int) -> np.ndarray:
    """Crops an image as the evaluation does, but always in colour.

    Args:
        source: its split.
        index: in the split.
        config: resolved.
        side_px: of the result.

    Returns:
        [side_px, side_px, 3] uint8.
    """
    pixels = prepared(decode_record(source[int(index)]), config)
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC))


def patch_fraction(config: ConfigDict) -> float:
    """Side of a patch as a fraction of the crop; the last patches of a Swin may reach beyond it."""
    return token_px(config) / config.eval.crop_px


def heat_overlay(pixels: np.ndarray, weights: np.ndarray, fraction: float) -> np.ndarray:
    """Lays weights of patches as colours over the grey image.

    The scale runs from 0 to the largest weight, and at least to twice the uniform weight, so that equal weights look dull.

    Args:
        pixels: [S, S, 3] uint8.
        weights: [P] at least 0, row-major, P a square number.
        fraction: side of a patch as a fraction of S.

    Returns:
        [S, S, 3] uint8.
    """
    from matplotlib import colormaps  # imported here: half a second of every start, and only its end draws

    scaled = weights / max(weights.max(), 2 * weights.mean(), 1e-12)
    colours = colormaps[HEAT](upsample(scaled, fraction, len(pixels)))[..., :3]
    grey = pixels.mean(axis=-1, keepdims=True) / 255
    return np.round(255 * ((1 - STRENGTH) * grey + STRENGTH * colours)).astype(np.uint8)


def upsample(values: np.ndarray, fraction: float, side_px: int, smooth: bool = True) -> np.ndarray:
    """Spreads values of patches [P], or [P, C], over the pixels of their crop: [side, side] or [side, side, C] float32."""
    side = round(len(values) ** 0.5)
    whole = max(1, round(side * fraction * side_px))
    rule = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    planes = np.atleast_3d(values.reshape(side, side, -1)).astype(np.float32)
    spread = [np.asarray(Image.fromarray(planes[..., c]).resize((whole, whole), rule)) for c in range(planes.shape[-1])]
    padded = np.pad(np.stack(spread, -1), ((0, max(0, side_px - whole)),) * 2 + ((0, 0),), mode="edge")[:side_px, :side_px]
    return padded[..., 0] if values.ndim == 1 else padded


def patch_mosaic(colours: np.ndarray, fraction: float, side_px: int) -> np.ndarray:
    """Colours of patches [P, 3] in 0..1 as an image [side, side, 3] uint8."""
    return np.round(255 * upsample(colours, fraction, side_px, smooth=False)).astype(np.uint8)


def largest_patch(weights: np.ndarray, fraction: float) -> tuple[int, int, float, float]:
    """Row and column of the patch with the largest of the weights [P], and x and y of its middle as fractions of the crop."""
    row, column = divmod(int(np.argmax(weights)), round(len(weights) ** 0.5))
    return row, column, fraction * (column + 0.5), fraction * (row + 0.5)


def jpeg_uri(pixels: np.ndarray, quality: int) -> str:
    """An image [H, W, 3] uint8 as a data URI."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def tile(images: list[np.ndarray], columns: int, gap_px: int = 0) -> np.ndarray:
    """Puts images [H, W, 3] uint8 of one size side by side in rows of `columns`, with white gaps: one image."""
    height, width = images[0].shape[:2]
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    size = (rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3)
    sheet = np.full(size, 255 if gap_px else 0, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (height + gap_px), column * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet


def titled(pixels: np.ndarray, title: str) -> np.ndarray:
    """[H, W, 3] uint8 -> [H + TITLE_PX, W, 3] with a line of text above, cut off where it is too wide."""
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + TITLE_PX), "white")
    image.paste(Image.fromarray(pixels), (0, TITLE_PX))
    ImageDraw.Draw(image).text((2, TITLE_PX // 2), title, "black", ImageFont.load_default(TITLE_PX - 6), anchor="lm")
    return np.asarray(image)


def overlay_sheet(images: ReportImages, rows: np.ndarray, patches: Patches) -> bytes:
    """Draws images, each beside its MIL weights: boxes are the discriminative parts, the ring is the largest weight.

    Args:
        images: of the run.
        rows: [N] of its images.
        patches: of these images.

    Returns:
        A PNG.
    """
    fraction, tiles = patch_fraction(images.config), []
    for row, weights in zip(rows.tolist(), patches.mil_weights, strict=True):
        pixels = shown_crop(images.source, row, images.config, SHEET_PX)
        overlay = Image.fromarray(heat_overlay(pixels, weights, fraction))
        draw = ImageDraw.Draw(overlay)
        for ymin, xmin, ymax, xmax in SHEET_PX * images.features.boxes[row]:
            if ymax > ymin and xmax > xmin:  # others mark no part
                draw.rectangle((xmin, ymin, xmax, ymax), outline="white")
        *_, x, y = largest_patch(weights, fraction)
        draw.circle((SHEET_PX * x, SHEET_PX * y), 9, outline="lime", width=2)
        name = images.class_name(images.features.labels[row]).replace("_", " ")
        relative = weights.max() * len(weights)
        tiles += [titled(pixels, name), titled(np.asarray(overlay), f"largest {relative:.1f} x uniform")]
    encoded = io.BytesIO()
    Image.fromarray(tile(tiles, SHEET_COLUMNS, GAP_PX)).save(encoded, "PNG")
    return encoded.getvalue()
