"""Pictures of an evaluated teacher: where the MIL weights look, and what retrieval finds."""

import io
import os

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cmd_jax import files
from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.decode import decode_record, eval_crop
from cmd_jax.data.sources import Source
from cmd_jax.evaluation.evaluate import Evaluation
from cmd_jax.evaluation.splits import Splits

OVERLAYS = 12
QUERIES, NEIGHBOURS = 8, 6
RIGHT, WRONG = "#1a9850", "#d73027"


def write_pictures(evaluation: Evaluation, config: ConfigDict, splits: Splits, workdir: str) -> list[str]:
    """Writes `report/mil_overlays.png` and `report/retrieval.png` and returns their paths; none without labels."""
    if evaluation.queries is None:
        return []
    directory = os.path.join(workdir, "report")
    files.make_directory(directory)
    figures = {
        "mil_overlays.png": mil_overlays(evaluation, config, splits),
        "retrieval.png": retrieval_grid(evaluation, config, splits),
    }
    paths = []
    for name, figure in figures.items():
        path = os.path.join(directory, name)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100, format="png")
        files.write(path, picture.getvalue())
        paths.append(path)
    return paths


def mil_overlays(evaluation: Evaluation, config: ConfigDict, splits: Splits) -> Figure:
    """Test images, each beside its MIL weights; boxes are the discriminative parts, the ring is the most weighted patch."""
    queries = evaluation.queries
    chosen = _spread(len(queries.labels), OVERLAYS)
    figure, axes = _grid(rows=-(-len(chosen) // 3), columns=6)
    figure.suptitle(f"MIL weights of the teacher, step {evaluation.step}: dark red is the largest weight of the image")
    for cell, index in enumerate(chosen):
        image = _crop(splits.test, index, config)
        weights = queries.mil_weights[index]
        side = round(len(weights) ** 0.5)
        plain, overlay = axes.flat[2 * cell], axes.flat[2 * cell + 1]
        plain.imshow(image)
        plain.set_title(_class_name(splits, queries.labels[index]), fontsize=8)
        px, patch = image.shape[0], token_px(config)
        overlay.imshow(image.mean(axis=-1), cmap="gray", extent=(0, px, px, 0))
        overlay.imshow(
            weights.reshape(side, side),
            cmap="jet",
            alpha=0.5,
            interpolation="bilinear",
            extent=(0, side * patch, side * patch, 0),
        )
        overlay.set(xlim=(0, px), ylim=(px, 0))  # the last patches of a Swin may reach beyond the crop
        for ymin, xmin, ymax, xmax in queries.boxes[index] * px:
            if ymax > ymin and xmax > xmin:
                overlay.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, fill=False, edgecolor="white", linewidth=1))
        row, column = divmod(int(np.argmax(weights)), side)
        overlay.plot((column + 0.5) * patch, (row + 0.5) * patch, "o", markersize=9, markerfacecolor="none", color="lime")
        overlay.set_title(f"max {weights.max() * len(weights):.1f} x uniform", fontsize=8)
    return figure


def retrieval_grid(evaluation: Evaluation, config: ConfigDict, splits: Splits) -> Figure:
    """Test images with their nearest training images; a green frame has the query's class."""
    queries, gallery = evaluation.queries, evaluation.gallery
    chosen = _spread(len(queries.labels), QUERIES)
    neighbours = min(NEIGHBOURS, len(gallery.labels))
    figure, axes = _grid(rows=len(chosen), columns=1 + neighbours)
    figure.suptitle(f"Nearest training images of test images, step {evaluation.step}")
    for row, index in zip(axes, chosen, strict=True):
        similarity = gallery.features @ queries.features[index]
        order = np.argsort(-similarity, kind="stable")[:neighbours]
        row[0].imshow(_crop(splits.test, index, config))
        row[0].set_title(f"query: {_class_name(splits, queries.labels[index])}", fontsize=8)
        for axis, found in zip(row[1:], order, strict=True):
            axis.imshow(_crop(splits.train, found, config))
            right = gallery.labels[found] == queries.labels[index]
            axis.set_title(
                f"{similarity[found]:.2f} {_class_name(splits, gallery.labels[found])}",
                fontsize=8,
                color=RIGHT if right else WRONG,
            )
            _frame(axis, RIGHT if right else WRONG)
    return figure


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of square cells without ticks; needs no display."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(1.7 * columns, 1.85 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def _frame(axis: Axes, color: str) -> None:
    for spine in axis.spines.values():
        spine.set(visible=True, color=color, linewidth=3)


def _spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` indices spread evenly over 0..count - 1, so over the classes of a sorted split."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))


def _crop(source: Source, index: int, config: ConfigDict) -> np.ndarray:
    return eval_crop(decode_record(source[int(index)]), config.eval.resize_px, config.eval.crop_px)


def _class_name(splits: Splits, label: int) -> str:
    # "$" would start mathematics in a title
    return splits.train.class_names[label].replace("_", " ").replace("$", r"\$")[:24]
