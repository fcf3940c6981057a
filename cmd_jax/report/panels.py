"""The parts of a report about single images: where the teacher looks, the map, retrieval, and confused classes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cmd_jax.evaluation.splits import spread
from cmd_jax.inference.patches import Patches
from cmd_jax.metrics import Confusion
from cmd_jax.report import facts
from cmd_jax.report.curves import COLOURS, colour, layout
from cmd_jax.report.images import (
    QUALITY,
    ReportImages,
    heat_overlay,
    jpeg_uri,
    largest_patch,
    patch_fraction,
    patch_mosaic,
    short,
    shown_crop,
    tile,
)
from cmd_jax.report.similarity import feature_map, matches, nearest, patch_colours

# Limits, stated on the page: it stays below about 10 MB, 5 of which are the charting library.
QUERIES, NEIGHBOURS = 24, 6
POINTS = 1000  # of the map
PAIRS, EXAMPLES = 8, 3  # of confused classes
STRIP_PX = 192
THUMB_PX, SPRITE_COLUMNS, SPRITE_QUALITY = 64, 32, 70
SIGNS = ("circle", "square", "diamond", "triangle-up", "cross")  # where the colours repeat


def looks(images: ReportImages, rows: np.ndarray, patches: Patches) -> dict[str, Any]:
    """Shows where the teacher looks in some images.

    Args:
        images: of the run.
        rows: [N] of its images.
        patches: of them.

    Returns:
        strips: for each image title, class, images (name, data URI), boxes of its parts and the place of the largest weight
        in percent of the image, and words about it; shares: of the variance in the three colours, in percent.
    """
    fraction, strips = patch_fraction(images.config), []
    colours, shares = patch_colours(patches.tokens)
    for number, row in enumerate(rows.tolist()):
        pixels = shown_crop(images.source, row, images.config, STRIP_PX)
        weights = patches.mil_weights[number]
        top, left, *ring = largest_patch(weights, fraction)
        shown = [("Image", pixels), ("MIL weights", heat_overlay(pixels, weights, fraction))]
        if patches.attention is not None:
            shown.append(("Attention", heat_overlay(pixels, patches.attention[number], fraction)))
        shown.append(("Patch PCA", patch_mosaic(colours[number], fraction, STRIP_PX)))
        boxes = (100 * images.features.boxes[row]).tolist()
        strips.append(
            {
                "title": short(images.features.names[row]),
                "class": images.class_name(images.features.labels[row]),
                "images": [(title, jpeg_uri(image, QUALITY)) for title, image in shown],
                "boxes": [box for box in boxes if box[2] > box[0] and box[3] > box[1]],
                "ring": [100 * place for place in ring],
                "peak": f"{weights.max() * len(weights):.1f}",
                "place": f"row {top + 1}, column {left + 1} of {round(len(weights) ** 0.5)}",
            }
        )
    return {"strips": strips, "shares": [f"{100 * share:.0f} %" for share in shares]}


def feature_map_panel(images: ReportImages) -> dict[str, Any]:
    """Draws the map of the images by their features.

    Returns:
        how: it was made; figure: of plotly, whose second trace is the ring around the chosen point; points: columns name,
        class, label, and name and class of the nearest training image; table: of the points (head, rows); sprite: their
        thumbnails, `columns` in a row, as a data URI.
    """
    rows, features, gallery = spread(images.count(), POINTS), images.features, images.gallery
    places, how = feature_map(features.features[rows], images.config.seed)
    near = nearest(features.features[rows], gallery.features, 1, rows if images.in_gallery() else None)
    near = near[:, 0].tolist() if near.size else [None] * len(rows)
    labels = np.maximum(features.labels[rows], 0).tolist()
    marker = {
        "color": [colour(label) for label in labels],
        "symbol": [SIGNS[label // len(COLOURS) % len(SIGNS)] for label in labels],
        "size": 8,
        "opacity": 0.9,
    }
    ring = {"color": "rgba(0,0,0,0)", "size": 18, "line": {"color": "#e5383b", "width": 2.5}}
    scatter = {"type": "scatter", "mode": "markers"}
    x, y = np.round(places.T.astype(float), 4).tolist()
    traces = [
        {**scatter, "x": x, "y": y, "hoverinfo": "none", "marker": marker},
        {**scatter, "x": [], "y": [], "hoverinfo": "skip", "marker": ring},
    ]
    hidden = {"visible": False, "fixedrange": True, "range": [-1.06, 1.06]}
    no_margin = dict.fromkeys("lrtb", 4)
    points = {
        "name": [short(features.names[row]) for row in rows],
        "class": [images.class_name(features.labels[row]) for row in rows],
        "label": features.labels[rows].tolist(),
        "near": ["" if row is None else short(gallery.names[row]) for row in near],
        "near_class": ["" if row is None else images.class_name(gallery.labels[row]) for row in near],
    }
    heads = {"name": "Image", "class": "Class", "near": "Nearest training image", "near_class": "Its class"}
    columns = [key for key in heads if images.train.class_names or "class" not in key]
    thumb = lambda row: shown_crop(images.source, row, images.config, THUMB_PX)
    with ThreadPoolExecutor(images.config.data.decode_threads) as pool:
        thumbs = list(pool.map(thumb, rows.tolist()))
    return {
        "how": how,
        "figure": {"data": traces, "layout": layout(margin=no_margin, hovermode="closest", xaxis=hidden, yaxis=hidden)},
        "points": points,
        "table": {
            "head": [heads[key] for key in columns],
            "rows": list(zip(*(points[key] for key in columns), strict=True)),
        },
        "sprite": jpeg_uri(tile(thumbs, SPRITE_COLUMNS), SPRITE_QUALITY),
        "columns": SPRITE_COLUMNS,
    }


def retrieval(images: ReportImages) -> dict[str, Any]:
    """Finds the neighbours of some images, and the patches that match.

    Returns:
        queries: for each its row, title, class, image, whether the first neighbour's class is right (None without labels),
        and neighbours with row, title, class, similarity, right and matches; images: of the neighbours, by row of the
        gallery; side: of the grid of patches; cell: side of a patch as a fraction of the image; table: of the neighbours
        (head, rows).
    """
    chosen, features, gallery = spread(images.count(), QUERIES), images.features, images.gallery
    found = nearest(features.features[chosen], gallery.features, NEIGHBOURS, chosen if images.in_gallery() else None)
    ours = images.inspect(images.source, chosen)
    gallery_rows = np.unique(found)
    theirs = images.inspect(images.train, gallery_rows) if len(gallery_rows) else ours
    queries = []
    for number, row in enumerate(chosen.tolist()):
        neighbours = []
        for other, place in zip(found[number].tolist(), np.searchsorted(gallery_rows, found[number]), strict=True):
            pairs = matches(ours.tokens[number], ours.mil_weights[number], theirs.tokens[place], theirs.mil_weights[place])
            label, other_label = features.labels[row], gallery.labels[other]
            neighbours.append(
                {
                    "row": other,
                    "title": short(gallery.names[other]),
                    "class": images.class_name(other_label),
                    "similarity": float(gallery.features[other] @ features.features[row]),
                    "right": None if label < 0 else bool(label == other_label),
                    "matches": [match._asdict() for match in pairs],
                }
            )
        queries.append(
            {
                "row": row,
                "title": short(features.names[row]),
                "class": images.class_name(features.labels[row]),
                "image": images.uri(images.source, row),
                "right": neighbours[0]["right"] if neighbours else None,
                "neighbours": neighbours,
            }
        )
    shown = lambda near: f"{near['class'] or near['title']} {near['similarity']:.3f}{' ✓' if near['right'] else ''}"
    columns = ["title", "class"] if images.train.class_names else ["title"]
    rows = [[*(query[key] for key in columns), "; ".join(shown(near) for near in query["neighbours"])] for query in queries]
    return {
        "queries": queries,
        "table": {"head": ["Query", "Class"][: len(columns)] + ["Neighbours, nearest first, with cosine"], "rows": rows},
        "images": {row: images.uri(images.train, row) for row in gallery_rows.tolist()},
        "side": round(ours.mil_weights.shape[1] ** 0.5),
        "cell": patch_fraction(images.config),
    }


def confusion_pairs(images: ReportImages, confusions: list[Confusion], predictions: np.ndarray | None) -> list[dict[str, Any]]:
    """Lists the most confused pairs with examples: test images, and the image of the wrong class that each is nearest to.

    Args:
        images: of the run.
        confusions: most confused first.
        predictions: [Q] int, the class given to every image shown; None without confusions.
    """
    pairs, names = [], images.train.class_names
    for pair in confusions[:PAIRS]:
        true, predicted = names.index(pair.true), names.index(pair.predicted)
        wrong = np.flatnonzero((images.features.labels == true) & (predictions == predicted))[:EXAMPLES]
        of_class = np.flatnonzero(images.gallery.labels == predicted)
        near = of_class[nearest(images.features.features[wrong], images.gallery.features[of_class], 1)[:, 0]]
        examples = [
            {
                "query": images.uri(images.source, row),
                "query_title": short(images.features.names[row]),
                "near": images.uri(images.train, other),
                "near_title": short(images.gallery.names[other]),
            }
            for row, other in zip(wrong.tolist(), near.tolist(), strict=True)
        ]
        words = {"true": pair.true, "predicted": pair.predicted, "count": pair.count, "percent": facts.text(pair.percent)}
        pairs.append({**words, "examples": examples})
    return pairs
