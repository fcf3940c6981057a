"""Pictures of `benchmarks.quality`: where the methods look in the same images, and their learning curves."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.quality_plan import Run
from cmd_jax.data.decode import decode_record, eval_boxes
from cmd_jax.data.record import Source
from cmd_jax.evaluation.knn import headline_k
from cmd_jax.report.curves import Curve, read_curves
from cmd_jax.report.overlays import cell, heat_overlay, shown_crop
from cmd_jax.report.pictures import PANEL_PX, caption, grid, outline_parts, png

COLOURS = ("tab:blue", "tab:green", "tab:red")


class Maps(NamedTuple):
    """Where a method looks.

    Attributes:
        title: of its column.
        run: whose configuration says how images are cropped.
        weights: [P] of every image shown.
    """

    title: str
    run: Run
    weights: Sequence[Sequence[float]]


def overlays(source: Source, rows: Sequence[int], columns: Sequence[Maps]) -> bytes:
    """A PNG: a row an image, then a column a method; boxes are parts, the ring is the largest weight.

    Args:
        source: split of the images.
        rows: of it.
        columns: the methods.
    """
    count = 1 + len(columns)
    figure, axes = grid(len(rows), count, (1.75 * count + 0.4, 1.75 * len(rows) + 0.3))
    for line, row in zip(axes, rows, strict=True):
        record = source[int(row)]
        for axis, maps in zip(line, [None, *columns], strict=True):
            config = (maps or columns[0]).run.config
            pixels = shown_crop(source, row, config, PANEL_PX)
            boxes = eval_boxes(record.part_boxes, decode_record(record).shape[:2], config.eval.resize_px, config.eval.crop_px)
            if maps:
                weights = np.asarray(maps.weights[list(rows).index(row)], np.float32)
                side, patch = round(len(weights) ** 0.5), cell(config)
                pixels = heat_overlay(pixels, weights, patch)
                top, left = divmod(int(np.argmax(weights)), side)
                place = ((left + 0.5) * patch * PANEL_PX, (top + 0.5) * patch * PANEL_PX)
                axis.plot(*place, "o", markersize=9, markerfacecolor="none", color="lime")
            axis.imshow(pixels)
            axis.set(xlim=(0, PANEL_PX), ylim=(PANEL_PX, 0))  # the last patches of a Swin may reach beyond the crop
            outline_parts(axis, boxes)
        line[0].set_ylabel(caption(source.class_names[record.label]), fontsize=8)
    for axis, title in zip(axes[0], ["image", *(maps.title for maps in columns)], strict=True):
        axis.set_title(title, fontsize=9)
    return png(figure)


def curves(runs_by_name: dict[str, Sequence[Run]]) -> bytes:
    """A PNG: k-NN top-1 and loss over epochs; thin lines are seeds, thick ones their mean."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
    for (name, runs), colour in zip(runs_by_name.items(), COLOURS, strict=False):
        read = [(run, read_curves(run.workdir)) for run in runs]
        for axis, key_of in zip(panels, (knn_key, lambda run: "loss"), strict=True):
            found = [_over_epochs(run, of_run[key_of(run)]) for run, of_run in read if key_of(run) in of_run]
            for x, y in found:
                axis.plot(x, y, color=colour, linewidth=0.7, alpha=0.5 if len(found) > 1 else 1)
            same = found and all(np.array_equal(x, found[0][0]) for x, _ in found)
            mean = (found[0][0], np.mean([y for _, y in found], axis=0)) if same else ([], [])
            axis.plot(*mean, color=colour, linewidth=2.2, label=f"{name} ({len(found)} seed{'s' * (len(found) != 1)})")
    features = next((run.config.eval.features for runs in runs_by_name.values() for run in runs), "none")
    panels[0].set_title(f"k-NN top-1, percent of the test images\nfeatures: {features}", fontsize=10)
    panels[1].set_title("training loss\n(of different terms: not to be compared)", fontsize=10)
    for axis in panels:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    panels[0].legend()
    return png(figure)


def knn_key(run: Run) -> str:
    """The number of `metrics.jsonl` that the curve is of."""
    return f"eval_knn{headline_k(run.config.eval.knn_k)}_top1"


def _over_epochs(run: Run, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    epochs = np.array(curve.steps) * run.config.train.epochs / run.steps
    return epochs, np.array([np.nan if value is None else value for value in curve.values], float)
