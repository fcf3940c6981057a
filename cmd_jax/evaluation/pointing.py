"""Does the MIL scorer look at the parts that decide the class?"""

from typing import NamedTuple

import numpy as np

from cmd_jax.config import token_px
from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.metrics import Number


class PointingResult(NamedTuple):
    """Percentages.

    Attributes:
        accuracy: share of images whose most weighted patch lies on a discriminative part.
        chance: the same for a patch drawn at random, mean over the images.
        hits: [images with a part] bool, of the accuracy.
    """

    accuracy: float
    chance: float
    hits: np.ndarray


def patches_on_parts(boxes: np.ndarray, patches: int, patch_side: float) -> np.ndarray:
    """Which patches lie on a part: the patch's centre is inside a part's box, or the box's centre inside the patch.

    The second rule keeps parts that are smaller than a patch.

    Args:
        boxes: [N, parts, 4] (ymin, xmin, ymax, xmax), fractions of the crop; boxes without area do not count.
        patches: P, a square number; row-major.
        patch_side: of a patch, a fraction of the crop; the last row and column may reach beyond it.

    Returns:
        [N, P] bool.
    """
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches do not form a square grid")
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]  # [N, parts, 1, 2] (y, x)
    rows, columns = np.divmod(np.arange(patches), side)
    corner = np.stack([rows, columns], -1) * patch_side  # [P, 2]
    center = corner + 0.5 * patch_side
    box_center = (low + high) / 2
    patch_in_box = np.all((center >= low) & (center <= high), axis=-1)
    box_in_patch = np.all((box_center >= corner) & (box_center < corner + patch_side), axis=-1)
    real = np.all(high > low, axis=-1)
    return np.any((patch_in_box | box_in_patch) & real, axis=1)


def pointing(mil_weights: np.ndarray, boxes: np.ndarray, patch_side: float) -> PointingResult:
    """Pointing accuracy over the images that have a part.

    Args:
        mil_weights: [N, P].
        boxes: [N, parts, 4], see `patches_on_parts`.
        patch_side: of a patch, a fraction of the crop.
    """
    on_part = patches_on_parts(boxes, mil_weights.shape[1], patch_side)
    has_part = on_part.any(axis=1)
    hit = on_part[np.arange(len(on_part)), np.argmax(mil_weights, axis=1)]
    return PointingResult(100 * float(hit[has_part].mean()), 100 * float(on_part[has_part].mean()), hit[has_part])


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`: the weights are there."""
    return Cost(f"{len(inputs.queries.labels):,} test images", 1, "passes", 0.0)


def measure(inputs: EvalInputs) -> list[Number]:
    """Pointing accuracy of the MIL weights beside chance; nothing where no test image has a part."""
    queries, config = inputs.queries, inputs.config
    if not np.any(queries.boxes[..., 2:] > queries.boxes[..., :2]):
        return []
    inputs.poll()
    point = pointing(queries.mil_weights, queries.boxes, token_px(config) / config.eval.crop_px)
    patches = f"{queries.mil_weights.shape[1]} patches, {len(point.hits):,} test images"
    on_part, at_random = f"most weighted patch on a part box, {patches}", f"a patch drawn at random, {patches}"
    return [
        percent_number("pointing_accuracy", "MIL pointing accuracy", point.hits, on_part, config.seed),
        Number("pointing_chance", "MIL pointing chance", point.chance, at_random),
    ]
