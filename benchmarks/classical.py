"""The classical input pipeline for comparison: Pillow does the multi-crop of DINO in worker processes, as PyTorch loaders do.

Imports no JAX: worker processes start from this module.
"""

import io
import math
import time

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
GLOBAL, LOCAL, LOCALS = (224, (0.4, 1.0)), (96, (0.05, 0.4)), 8
BLUR_PROBS, SOLARIZE_PROBS = (1.0, 0.1), (0.0, 0.2)

_pictures: list[bytes] = []


def start_worker(pictures: list[bytes]) -> None:
    """Gives a worker process the encoded pictures."""
    _pictures[:] = pictures


def make_batch(indices: list[int], seed: int) -> float:
    """Makes the views of a batch, normalised float32 and stacked as a loader does; returns the CPU seconds it took."""
    started = time.process_time()
    rng = np.random.default_rng(seed)
    views = [multi_crop(_pictures[index], rng) for index in indices]
    globals_, locals_ = (np.stack([image[kind] for image in views]) for kind in range(2))
    assert globals_.shape[1:] == (2, 3, 224, 224)
    assert locals_.shape[1:] == (LOCALS, 3, 96, 96)
    return time.process_time() - started


def multi_crop(encoded: bytes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Encoded picture -> [2, 3, 224, 224] and [8, 3, 96, 96] float32."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    globals_ = [_view(image, *GLOBAL, BLUR_PROBS[n], SOLARIZE_PROBS[n], rng) for n in range(2)]
    locals_ = [_view(image, *LOCAL, 0.5, 0.0, rng) for _ in range(LOCALS)]
    return np.stack(globals_), np.stack(locals_)


def _view(image: Image.Image, px: int, scale: tuple, blur_prob: float, solarize_prob: float, rng) -> np.ndarray:
    image = image.resize((px, px), Image.Resampling.BICUBIC, _box(image.size, scale, rng))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.8:
        for operation in rng.permutation(4):
            if operation == 3:
                image = _turn_hue(image, rng.uniform(-0.1, 0.1))
            else:
                enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
                reach = (0.4, 0.4, 0.2)[operation]
                image = enhance(image).enhance(rng.uniform(1 - reach, 1 + reach))
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < solarize_prob:
        image = ImageOps.solarize(image, 128)
    pixels = np.asarray(image, np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def _box(size: tuple[int, int], scale: tuple[float, float], rng) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop; resizing from a box does not copy the crop first."""
    width, height = size
    for _ in range(10):
        area, ratio = width * height * rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), int(left + w), int(top + h)
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def _turn_hue(image: Image.Image, shift: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(np.int16) + int(shift * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")
