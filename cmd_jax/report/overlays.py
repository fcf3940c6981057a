"""Images and what the teacher says of their patches, as pixels and data URIs."""

import base64
import io

import numpy as np
from PIL import Image

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.decode import decode_record, eval_crop
from cmd_jax.data.record import Source

HEAT, STRENGTH = "inferno", 0.6  # colours of weights, and how much of the picture they cover


def shown_crop(source: Source, index: int, config: ConfigDict, side_px: int | None = None) -> np.ndarray:
    """An image as the evaluation crops it, but always in colour.

    Args:
        source: its split.
        index: in the split.
        config: resolved.
        side_px: scale it to this; None: `eval.crop_px`.

    Returns:
        [side, side, 3] uint8.
    """
    pixels = eval_crop(decode_record(source[int(index)]), config.eval.resize_px, config.eval.crop_px)
    if side_px in (None, len(pixels)):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.BICUBIC))


def cell(config: ConfigDict) -> float:
    """Side of a patch as a fraction of the crop; the last patches of a Swin may reach beyond it."""
    return token_px(config) / config.eval.crop_px


def heat_overlay(pixels: np.ndarray, weights: np.ndarray, cell: float) -> np.ndarray:
    """Weights of patches as colours over the grey image.

    The scale runs from 0 to the largest weight, and at least to twice the uniform weight, so that equal weights look dull.

    Args:
        pixels: [S, S, 3] uint8.
        weights: [P] at least 0, row-major, P a square number.
        cell: side of a patch, a fraction of S.

    Returns:
        [S, S, 3] uint8.
    """
    from matplotlib import colormaps  # imported here: half a second of every start, and only its end draws

    colours = colormaps[HEAT](stretch(weights / max(weights.max(), 2 * weights.mean(), 1e-12), cell, len(pixels)))[..., :3]
    grey = pixels.mean(axis=-1, keepdims=True) / 255
    return np.round(255 * ((1 - STRENGTH) * grey + STRENGTH * colours)).astype(np.uint8)


def stretch(values: np.ndarray, cell: float, side_px: int, smooth: bool = True) -> np.ndarray:
    """Values of patches [P], or [P, C], over the pixels of their crop: [side, side] or [side, side, C] float32."""
    side = round(len(values) ** 0.5)
    whole = max(1, round(side * cell * side_px))
    rule = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    planes = np.atleast_3d(values.reshape(side, side, -1)).astype(np.float32)
    spread = [np.asarray(Image.fromarray(planes[..., c]).resize((whole, whole), rule)) for c in range(planes.shape[-1])]
    padded = np.pad(np.stack(spread, -1), ((0, max(0, side_px - whole)),) * 2 + ((0, 0),), mode="edge")[:side_px, :side_px]
    return padded[..., 0] if values.ndim == 1 else padded


def colour_patches(colours: np.ndarray, cell: float, side_px: int) -> np.ndarray:
    """Colours of patches [P, 3] in 0..1 as a picture [side, side, 3] uint8."""
    return np.round(255 * stretch(colours, cell, side_px, smooth=False)).astype(np.uint8)


def jpeg_uri(pixels: np.ndarray, quality: int = 80) -> str:
    """A picture [H, W, 3] uint8 as a data URI."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def sprite(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures [S, S, 3] uint8 of one size, side by side in rows of `columns`: one picture."""
    side = len(pictures[0])
    sheet = np.zeros((-(-len(pictures) // columns) * side, min(columns, len(pictures)) * side, 3), np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = picture
    return sheet
