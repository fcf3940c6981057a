"""A sheet of images beside the teacher's MIL weights, as a PNG for documents."""

import io
from typing import Any

import numpy as np

from cmd_jax.evaluation.patches import Patches
from cmd_jax.report.exhibit import Exhibit
from cmd_jax.report.overlays import cell, heat_overlay, shown_crop

PANEL_PX = 192
IMAGES_A_ROW = 3


def overlay_sheet(step: int, exhibit: Exhibit, rows: np.ndarray, patches: Patches) -> bytes:
    """Images, each beside its MIL weights; boxes are the discriminative parts, the ring is the most weighted patch.

    Args:
        step: of the teacher.
        exhibit: of the run.
        rows: [N] of its images.
        patches: of these images.

    Returns:
        A PNG.
    """
    patch_side = cell(exhibit.config)
    count = -(-len(rows) // IMAGES_A_ROW)
    figure, axes = grid(count, 2 * IMAGES_A_ROW, (1.7 * 2 * IMAGES_A_ROW, 1.85 * count + 0.5))
    figure.suptitle(f"MIL weights of the teacher, step {step}: bright is a large weight, the ring the largest")
    for number, row in enumerate(rows.tolist()):
        plain, overlay = axes.flat[2 * number], axes.flat[2 * number + 1]
        pixels, weights = shown_crop(exhibit.source, row, exhibit.config, PANEL_PX), patches.mil_weights[number]
        side, patch = round(len(weights) ** 0.5), patch_side * PANEL_PX
        plain.imshow(pixels)
        plain.set_title(caption(exhibit.name(exhibit.features.labels[row])), fontsize=8)
        overlay.imshow(heat_overlay(pixels, weights, patch_side))
        overlay.set(xlim=(0, PANEL_PX), ylim=(PANEL_PX, 0))  # the last patches of a Swin may reach beyond the crop
        outline_parts(overlay, exhibit.features.boxes[row])
        top, left = divmod(int(np.argmax(weights)), side)
        overlay.plot((left + 0.5) * patch, (top + 0.5) * patch, "o", markersize=9, markerfacecolor="none", color="lime")
        overlay.set_title(f"max {weights.max() * len(weights):.1f} x uniform", fontsize=8)
    return png(figure)


def caption(name: str) -> str:
    """A class's name as a title: "$" would start mathematics there."""
    return name.replace("_", " ").replace("$", r"\$")[:24]


def outline_parts(axis: Any, boxes: np.ndarray) -> None:
    """Draws the parts on a panel of PANEL_PX pixels; boxes: [P, 4] fractions of the crop, those without area are left out."""
    from matplotlib.patches import Rectangle  # imported here, see `heat_overlay`

    for ymin, xmin, ymax, xmax in boxes * PANEL_PX:
        if ymax > ymin and xmax > xmin:
            axis.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, edgecolor="white", linewidth=1))


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


def grid(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """A figure of that width and height with cells without ticks; needs no display."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes
