"""What a report shows of single images: where the teacher looks, the map, queries, and confused classes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cmd_jax.evaluation.breakdown import Confusion
from cmd_jax.evaluation.patches import Patches
from cmd_jax.evaluation.splits import spread
from cmd_jax.report import facts, overlays
from cmd_jax.report.exhibit import QUALITY, Exhibit, short
from cmd_jax.report.matching import matches, nearest
from cmd_jax.report.projections import feature_map, patch_colours

# Limits, stated on the page: it stays below about 10 MB, 5 of which are the charting library.
QUERIES, NEIGHBOURS = 24, 6
POINTS = 1000  # of the map
PAIRS, EXAMPLES = 8, 3  # of confused classes
STRIP_PX = 192
THUMB_PX, SPRITE_COLUMNS, SPRITE_QUALITY = 64, 32, 70


def looks(exhibit: Exhibit, rows: np.ndarray, patches: Patches) -> dict[str, Any]:
    """Where the teacher looks in some images.

    Args:
        exhibit: of the run.
        rows: [N] of its images.
        patches: of them.

    Returns:
        strips: for each image title, class, pictures (name, data URI), boxes of its parts and the place of the largest weight
        in percent of the picture, and words about it; shares: of the variance in the three colours, in percent.
    """
    cell, strips = overlays.cell(exhibit.config), []
    colours, shares = patch_colours(patches.tokens)
    for number, row in enumerate(rows.tolist()):
        pixels = overlays.shown_crop(exhibit.source, row, exhibit.config, STRIP_PX)
        weights = patches.mil_weights[number]
        side = round(len(weights) ** 0.5)
        top, left = divmod(int(np.argmax(weights)), side)
        pictures = [("Image", pixels), ("MIL weights", overlays.heat_overlay(pixels, weights, cell))]
        if patches.attention is not None:
            pictures.append(("Attention", overlays.heat_overlay(pixels, patches.attention[number], cell)))
        pictures.append(("Patch PCA", overlays.colour_patches(colours[number], cell, STRIP_PX)))
        boxes = (100 * exhibit.features.boxes[row]).tolist()
        strips.append(
            {
                "title": short(exhibit.features.names[row]),
                "class": exhibit.name(exhibit.features.labels[row]),
                "pictures": [(title, overlays.jpeg_uri(image, QUALITY)) for title, image in pictures],
                "boxes": [box for box in boxes if box[2] > box[0] and box[3] > box[1]],
                "ring": (100 * cell * (left + 0.5), 100 * cell * (top + 0.5)),
                "peak": f"{weights.max() * len(weights):.1f}",
                "place": f"row {top + 1}, column {left + 1} of {side}",
            }
        )
    return {"strips": strips, "shares": [f"{100 * share:.0f} %" for share in shares]}


def feature_map_panel(exhibit: Exhibit) -> dict[str, Any]:
    """The map.

    Returns:
        how: it was made; points: columns x, y, name, class, label, and name and class of the nearest training image;
        sprite: thumbnails of the points, `columns` in a row, as a data URI.
    """
    rows, features, gallery = spread(exhibit.count(), POINTS), exhibit.features, exhibit.gallery
    places, how = feature_map(features.features[rows], exhibit.config.seed)
    near = nearest(features.features[rows], gallery.features, 1, rows if exhibit.in_gallery() else None)
    near = near[:, 0].tolist() if near.size else [None] * len(rows)
    points = {
        "x": np.round(places[:, 0].astype(float), 4).tolist(),
        "y": np.round(places[:, 1].astype(float), 4).tolist(),
        "name": [short(features.names[row]) for row in rows],
        "class": [exhibit.name(features.labels[row]) for row in rows],
        "label": features.labels[rows].tolist(),
        "near": ["" if row is None else short(gallery.names[row]) for row in near],
        "near_class": ["" if row is None else exhibit.name(gallery.labels[row]) for row in near],
    }
    thumb = lambda row: overlays.shown_crop(exhibit.source, row, exhibit.config, THUMB_PX)
    with ThreadPoolExecutor(exhibit.config.data.decode_threads) as pool:
        thumbs = list(pool.map(thumb, rows.tolist()))
    sprite = overlays.jpeg_uri(overlays.sprite(thumbs, SPRITE_COLUMNS), SPRITE_QUALITY)
    return {"how": how, "points": points, "sprite": sprite, "columns": SPRITE_COLUMNS}


def retrieval(exhibit: Exhibit) -> dict[str, Any]:
    """The retrieval explorer.

    Returns:
        queries: for each its row, title, class, picture, whether the first neighbour's class is right (None without labels),
        and neighbours with row, title, class, similarity, right and matches; pictures: of the neighbours, by row of the
        gallery; side: of the grid of patches; cell: side of a patch as a fraction of the picture.
    """
    chosen, features, gallery = spread(exhibit.count(), QUERIES), exhibit.features, exhibit.gallery
    found = nearest(features.features[chosen], gallery.features, NEIGHBOURS, chosen if exhibit.in_gallery() else None)
    of_queries = exhibit.look(exhibit.source, chosen)
    gallery_rows = np.unique(found)
    of_gallery = exhibit.look(exhibit.train, gallery_rows) if len(gallery_rows) else of_queries
    queries = []
    for number, row in enumerate(chosen.tolist()):
        neighbours = []
        for other, place in zip(found[number].tolist(), np.searchsorted(gallery_rows, found[number]), strict=True):
            pairs = matches(of_queries.take([number]), of_gallery.take([place]))
            label, other_label = features.labels[row], gallery.labels[other]
            neighbours.append(
                {
                    "row": other,
                    "title": short(gallery.names[other]),
                    "class": exhibit.name(other_label),
                    "similarity": float(gallery.features[other] @ features.features[row]),
                    "right": None if label < 0 else bool(label == other_label),
                    "matches": [match._asdict() for match in pairs],
                }
            )
        queries.append(
            {
                "row": row,
                "title": short(features.names[row]),
                "class": exhibit.name(features.labels[row]),
                "picture": exhibit.picture(exhibit.source, row),
                "right": neighbours[0]["right"] if neighbours else None,
                "neighbours": neighbours,
            }
        )
    return {
        "queries": queries,
        "pictures": {row: exhibit.picture(exhibit.train, row) for row in gallery_rows.tolist()},
        "side": round(of_queries.mil_weights.shape[1] ** 0.5),
        "cell": overlays.cell(exhibit.config),
    }


def confusion_pairs(exhibit: Exhibit, confusions: list[Confusion], predictions: np.ndarray | None) -> list[dict[str, Any]]:
    """The most confused pairs with examples: test images, and the image of the wrong class that each is nearest to.

    Args:
        exhibit: of the run.
        confusions: most confused first.
        predictions: [Q] int, the class given to every image shown; None without confusions.
    """
    pairs, names = [], exhibit.train.class_names
    for pair in confusions[:PAIRS]:
        true, predicted = names.index(pair.true), names.index(pair.predicted)
        wrong = np.flatnonzero((exhibit.features.labels == true) & (predictions == predicted))[:EXAMPLES]
        of_class = np.flatnonzero(exhibit.gallery.labels == predicted)
        near = of_class[nearest(exhibit.features.features[wrong], exhibit.gallery.features[of_class], 1)[:, 0]]
        examples = [
            {
                "query": exhibit.picture(exhibit.source, row),
                "query_title": short(exhibit.features.names[row]),
                "near": exhibit.picture(exhibit.train, other),
                "near_title": short(exhibit.gallery.names[other]),
            }
            for row, other in zip(wrong.tolist(), near.tolist(), strict=True)
        ]
        words = {"true": pair.true, "predicted": pair.predicted, "count": pair.count, "percent": facts.text(pair.percent)}
        pairs.append({**words, "examples": examples})
    return pairs
