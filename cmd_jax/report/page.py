"""The report of a run: one page, `report/index.html`, about a teacher and what it has learned."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import Source
from cmd_jax.evaluation.evaluate import Evaluation, load_metrics
from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.patches import Patches, inspect_patches, make_inspector
from cmd_jax.evaluation.splits import Splits, spread
from cmd_jax.models.network import Network
from cmd_jax.report import curves as curves_lib
from cmd_jax.report import explorer as explorer_lib
from cmd_jax.report import facts, overlays, projections
from cmd_jax.report.pictures import overlay_sheet
from cmd_jax.report.render import render
from cmd_jax.training.state import Params

# Limits, stated on the page: it stays below about 10 MB, 5 of which are the charting library.
OVERLAYS, QUERIES, POINTS, PAIRS, EXAMPLES = 12, 24, 1000, 8, 3
STRIP_PX, EXPLORER_PX, THUMB_PX, SPRITE_COLUMNS = 192, 160, 64, 32
JPEG_QUALITY, SPRITE_QUALITY = 82, 70


class Shown(NamedTuple):
    """The images of an evaluation that the page shows: test images, or training images where there are no others.

    Attributes:
        source: their split.
        features: of them.
        kind: "test" or "training".
        itself: whether they are the gallery, in which each then finds itself.
    """

    source: Source
    features: Features
    kind: str
    itself: bool


def write_report(
    evaluation: Evaluation, config: ConfigDict, network: Network, teacher: Params, splits: Splits, workdir: str
) -> list[str]:
    """Writes `report/index.html` and `report/mil_overlays.png` and returns their paths.

    Args:
        evaluation: of the teacher.
        config: resolved.
        network: of the teacher.
        teacher: parameters, on every device of this process.
        splits: that were evaluated.
        workdir: of the run; `config.json`, `metrics.jsonl` and the untrained teacher's numbers are read there.
    """
    directory = os.path.join(workdir, "report")
    files.make_directory(directory)
    shown = shown_images(evaluation, splits)
    inspect = make_inspector(config, network)
    look = lambda source, rows: inspect_patches(inspect, teacher, source, config, rows)

    overlay_rows = spread(len(shown.features.names), OVERLAYS)
    overlay_patches = look(shown.source, overlay_rows)
    sheet = os.path.join(directory, "mil_overlays.png")
    files.write(sheet, overlay_sheet(evaluation.step, shown, overlay_rows, overlay_patches, class_namer(splits), config))

    chosen, found, patches = retrieve(shown, splits.train, evaluation.gallery, look)
    page = os.path.join(directory, "index.html")
    text = run_page(evaluation, config, splits, shown, workdir, (overlay_rows, overlay_patches), (chosen, found, patches))
    files.write(page, text)
    return [page, sheet]


def run_page(
    evaluation: Evaluation,
    config: ConfigDict,
    splits: Splits,
    shown: Shown,
    workdir: str,
    looked: tuple[np.ndarray, Patches],
    retrieved: tuple[np.ndarray, np.ndarray, tuple[Patches, Patches]],
) -> str:
    """The HTML of a run's page; `looked` are rows and patches of the overlays, `retrieved` is of `retrieve`."""
    name, curves = class_namer(splits), curves_lib.read_curves(workdir)
    stored = facts.read_config(workdir)  # an evaluation may have been asked for other protocols than the run's
    # Protocols that were measured earlier are on disk; in memory is what was measured now, which may not be on disk yet.
    content = facts.evaluations(workdir).get(evaluation.step, {})
    content = {part: content.get(part, {}) | numbers for part, numbers in evaluation_content(evaluation).items()}
    found = facts.numbers(content, load_metrics(workdir, 0) if evaluation.step else None)
    strips, shares = overlay_strips(shown, *looked, name, config)
    chosen, neighbours, patches = retrieved
    places, how = projections.feature_map(shown.features.features[spread(len(shown.features.names), POINTS)], config.seed)
    charts = curves_lib.charts([("", curves)])
    queries = explorer_lib.explorer(shown.features, evaluation.gallery, chosen, neighbours, patches, name)
    of_gallery = {row: picture(splits.train, row, config) for row in np.unique(neighbours).tolist()}
    points = map_points(shown, evaluation.gallery, places, name)
    return render(
        "run.html",
        title=os.path.basename(os.path.abspath(workdir)),
        step=evaluation.step,
        kind=shown.kind,
        labelled=bool(splits.train.class_names),
        headlines=facts.headlines(found),
        numbers=found,
        facts=facts.run_facts(config, curves, evaluation.step),
        versions=facts.versions(),
        charts=charts,
        strips=strips,
        shares=[f"{100 * share:.0f} %" for share in shares],
        attention=looked[1].attention is not None,
        map_how=how,
        points=points,
        total=len(shown.features.names),
        classes=[class_name for class_name in splits.train.class_names if class_name in set(points["class"])],
        queries=[row | {"picture": picture(shown.source, row["row"], config)} for row in queries],
        confusions=confusion_pairs(evaluation, splits, shown, config),
        per_class=sorted(evaluation.per_class.items(), key=lambda item: (item[1], item[0])),
        changed=facts.changed(stored),
        config=facts.sections(stored),
        data={
            "charts": [{key: chart[key] for key in ("id", "unit", "traces")} for chart in charts],
            "map": points | {"sprite": map_sprite(shown, config), "columns": SPRITE_COLUMNS},
            "explorer": {
                "queries": queries,
                "pictures": of_gallery,
                "cell": overlays.cell(config),
                "side": round(looked[1].mil_weights.shape[1] ** 0.5),
            },
        },
    )


def evaluation_content(evaluation: Evaluation) -> dict[str, Any]:
    """What `facts.numbers` reads of an evaluation that is not on disk yet."""
    rows = evaluation.rows
    return {
        "metrics": {row.key: row.value for row in rows},
        "title": {row.key: row.title for row in rows},
        "unit": {row.key: row.unit for row in rows},
        "protocol": {row.key: row.protocol for row in rows},
        "interval": {row.key: [row.low, row.high] for row in rows if row.low is not None},
    }


def shown_images(evaluation: Evaluation, splits: Splits) -> Shown:
    """The test images of an evaluation, or the training images where it has no others."""
    if evaluation.queries is None:
        return Shown(splits.train, evaluation.gallery, "training", True)
    return Shown(splits.test, evaluation.queries, "test", False)


def class_namer(splits: Splits) -> Any:
    """label -> name of the class, "" of an image without one."""
    names = splits.train.class_names
    return lambda label: names[label] if 0 <= label < len(names) else ""


def retrieve(
    shown: Shown, train: Source, gallery: Features, look: Any
) -> tuple[np.ndarray, np.ndarray, tuple[Patches, Patches]]:
    """Queries [Q] spread over the images shown, their nearest gallery images [Q, K], the patches of both (`explorer`)."""
    chosen = spread(len(shown.features.names), QUERIES)
    features = shown.features.features[chosen]
    found = explorer_lib.nearest(features, gallery.features, explorer_lib.NEIGHBOURS, chosen if shown.itself else None)
    of_found = np.unique(found)
    of_queries = look(shown.source, chosen)
    return chosen, found, (of_queries, look(train, of_found) if len(of_found) else of_queries)


def overlay_strips(
    shown: Shown, rows: np.ndarray, patches: Patches, name: Any, config: ConfigDict
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """For each image its pictures, marks and words, and the shares of the variance that the patches' colours show."""
    cell = overlays.cell(config)
    colours, shares = projections.patch_colours(patches.tokens)
    strips = []
    for number, row in enumerate(rows.tolist()):
        pixels = overlays.shown_crop(shown.source, row, config, STRIP_PX)
        weights = patches.mil_weights[number]
        side = round(len(weights) ** 0.5)
        top, left = divmod(int(np.argmax(weights)), side)
        pictures = [("Image", pixels), ("MIL weights", overlays.heat_overlay(pixels, weights, cell))]
        if patches.attention is not None:
            pictures.append(("Attention", overlays.heat_overlay(pixels, patches.attention[number], cell)))
        pictures.append(("Patch PCA", overlays.colour_patches(colours[number], cell, STRIP_PX)))
        boxes = [box for box in (100 * shown.features.boxes[row]).tolist() if box[2] > box[0] and box[3] > box[1]]
        strips.append(
            {
                "title": explorer_lib.short(shown.features.names[row]),
                "class": name(shown.features.labels[row]),
                "pictures": [(title, overlays.jpeg_uri(image, JPEG_QUALITY)) for title, image in pictures],
                "boxes": boxes,
                "ring": (100 * cell * (left + 0.5), 100 * cell * (top + 0.5)),
                "peak": f"{weights.max() * len(weights):.1f}",
                "place": f"row {top + 1}, column {left + 1} of {side}",
            }
        )
    return strips, shares


def picture(source: Source, row: int, config: ConfigDict) -> str:
    """An image at the size of the explorer, as a data URI."""
    return overlays.jpeg_uri(overlays.shown_crop(source, row, config, EXPLORER_PX), JPEG_QUALITY)


def map_points(shown: Shown, gallery: Features, places: np.ndarray, name: Any) -> dict[str, list]:
    """Columns of the map's points: x, y, name, class, label, and the nearest gallery image."""
    rows = spread(len(shown.features.names), POINTS)
    skip = rows if shown.itself else None
    near = explorer_lib.nearest(shown.features.features[rows], gallery.features, 1, skip)
    near_of = [row[0] if len(row) else None for row in near.tolist()]
    return {
        "x": np.round(places[:, 0].astype(float), 4).tolist(),
        "y": np.round(places[:, 1].astype(float), 4).tolist(),
        "name": [explorer_lib.short(shown.features.names[row]) for row in rows],
        "class": [name(shown.features.labels[row]) for row in rows],
        "label": [int(shown.features.labels[row]) for row in rows],
        "near": ["" if row is None else explorer_lib.short(gallery.names[row]) for row in near_of],
        "near_class": ["" if row is None else name(gallery.labels[row]) for row in near_of],
    }


def map_sprite(shown: Shown, config: ConfigDict) -> str:
    """Thumbnails of the map's points in one picture, as a data URI."""
    rows = spread(len(shown.features.names), POINTS).tolist()
    thumb = lambda row: overlays.shown_crop(shown.source, row, config, THUMB_PX)
    with ThreadPoolExecutor(config.data.decode_threads) as pool:
        thumbs = list(pool.map(thumb, rows))
    return overlays.jpeg_uri(overlays.sprite(thumbs, SPRITE_COLUMNS), SPRITE_QUALITY)


def confusion_pairs(evaluation: Evaluation, splits: Splits, shown: Shown, config: ConfigDict) -> list[dict[str, Any]]:
    """The most confused pairs, each with examples: test images, and the image of the wrong class that each is nearest to."""
    pairs = []
    for pair in evaluation.confusions[:PAIRS]:
        true, predicted = (splits.train.class_names.index(name) for name in (pair.true, pair.predicted))
        wrong = np.flatnonzero((shown.features.labels == true) & (evaluation.predictions == predicted))[:EXAMPLES]
        of_class = np.flatnonzero(evaluation.gallery.labels == predicted)
        near = explorer_lib.nearest(shown.features.features[wrong], evaluation.gallery.features[of_class], 1)[:, 0]
        examples = [
            {
                "query": picture(shown.source, row, config),
                "query_title": explorer_lib.short(shown.features.names[row]),
                "near": picture(splits.train, of_class[other], config),
                "near_title": explorer_lib.short(evaluation.gallery.names[of_class[other]]),
            }
            for row, other in zip(wrong.tolist(), near.tolist(), strict=True)
        ]
        pairs.append(
            {
                "true": pair.true,
                "predicted": pair.predicted,
                "count": pair.count,
                "percent": facts.text(pair.percent),
                "examples": examples,
            }
        )
    return pairs
