"""What labelling finds and saves on a folder with train/CLASS/* and test/CLASS/*, whose classes are the expert.

  python -m benchmarks.labelling --folder=PHOTOS --checkpoint=runs/photos

Copies of some photographs (half the size; JPEG of quality 30; 90 % of either side, cut at random; all of it) must be found
as doubles, and pairs of different photographs are listed for people to look at. Errors are planted in 5 % of the labels. Then
rounds of labelling are played: the expert goes through the groups as the page sorts them. A group costs one action for its
name, one for each wrong image that is selected, and one for each class that wrong ones are moved to; or, where that is fewer,
one for each image, each named by itself. After every ROUND actions the rest is filled in again, until 95 % of all images, named
or filled in, are right. Labelling one by one is one action an image. The last line is a JSON object.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.metrics import precision_recall_curve

from cmd_jax.api import load
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.inference.load import read_trained
from cmd_jax.labelling.doubles import DETAIL, candidates, registered
from cmd_jax.labelling.groups import group_images, grow
from cmd_jax.labelling.look import look
from cmd_jax.labelling.mislabels import held_out, plant
from cmd_jax.labelling.photos import Photos, read_photos
from cmd_jax.labelling.suggest import suggest
from cmd_jax.labelling.thumbs import read_thumb

CROP = 0.9  # of either side
ROUND = 100  # actions between two fillings in


class Played(NamedTuple):
    """Where rounds of labelling ended: actions, images with a label, and share of right classes after filling in."""

    actions: int
    labelled: int
    accuracy: float


def recompressed(picture: Image.Image, quality: int) -> Image.Image:
    """A picture after JPEG."""
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=quality)
    return Image.open(packed)


def cropped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """CROP of either side, at a random place."""
    width, height = (round(CROP * side) for side in picture.size)
    left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
    return picture.crop((left, top, left + width, top + height))


def shrunk(picture: Image.Image, factor: float) -> Image.Image:
    """A picture with sides of a fraction."""
    return picture.resize(tuple(max(1, round(factor * side)) for side in picture.size), Image.Resampling.BICUBIC)


def copies_found(photos: Photos, embed: Callable, count: int) -> dict[str, list[int]]:
    """[found, made] copies of `count` photographs by kind; each kind is looked for among all photographs."""
    rng, found = np.random.default_rng(0), {}
    chosen = rng.choice(len(photos.paths), count, replace=False)
    kinds = {
        "rescaled": lambda picture: shrunk(picture, 0.5),
        "recompressed": lambda picture: recompressed(picture, 30),
        "cropped": lambda picture: cropped(picture, rng),
        "all": lambda picture: recompressed(shrunk(cropped(picture, rng), 0.7), 50),
    }
    looks = [thumb.look for thumb in photos.thumbs]
    for kind, change in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"{place}.png") for place in range(count)]
            for path, row in zip(paths, chosen, strict=True):
                change(Image.open(os.path.join(photos.folder, photos.paths[row])).convert("RGB")).save(path)
            features = np.concatenate([photos.features, embed(paths)])
            every = looks + [read_thumb(path, 96).look for path in paths]
        pairs = candidates(features, np.stack([seen.colours for seen in every]))
        pairs = pairs[pairs[:, 1] >= len(looks)]  # with a copy in them; the others were looked at before
        agreed = registered(np.stack([seen.grey for seen in every]), pairs) >= DETAIL
        wanted = {(int(row), len(looks) + place) for place, row in enumerate(chosen)}
        found[kind] = [len(wanted & set(map(tuple, pairs[agreed].tolist()))), count]
    return found


def planted_precision(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Precision at recall 0.5 of suspected mislabels, of errors planted in 5 % of the labels [N]."""
    changed, bad = plant(labels, seed)
    precision, recall, _ = precision_recall_curve(bad, -held_out(features, changed, seed)[0])
    return float(precision[recall >= 0.5].max())


def play(features: np.ndarray, truth: np.ndarray, enough: float = 0.95) -> list[Played]:
    """Rounds of labelling until filling in gives a share of right classes: one entry a round.

    Args:
        features: [N, F].
        truth: [N] texts.
        enough: the share.
    """
    tree, labels, actions = grow(features), [None] * len(truth), 0
    rounds: list[Played] = []
    while True:
        suggested = suggest(features, labels) if any(labels) else None
        right = np.zeros(len(truth), bool) if suggested is None else suggested.classes == truth
        done = [row for row, label in enumerate(labels) if label]
        rounds.append(Played(actions, len(done), float(right.mean())))
        if right.mean() >= enough:
            return rounds
        for group in group_images(features, tree, done, suggested):
            actions += actions_for(truth[group.rows])
            right[group.rows] = True
            for row in group.rows:
                labels[row] = str(truth[row])
            if right.mean() >= enough or actions >= rounds[-1].actions + ROUND:
                break


def actions_for(truth: np.ndarray) -> int:
    """What it takes to name the images of a group, [n] texts: by the class that most are of, or one by one."""
    counts = np.unique(truth.astype(str), return_counts=True)[1]
    return min(len(truth), 1 + len(truth) - int(counts.max()) + len(counts) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", required=True, help="with train/CLASS/* and test/CLASS/*")
    add("--checkpoint", required=True, help="as of cmd_jax.embed")
    add("--image_px", type=int, help="side of the crop, for weights of other projects")
    add("--resize_px", type=int, help="what images are resized to before")
    add("--features", help="file of features to keep, .parquet; by default none is kept")
    add("--copies", type=int, default=100, help="photographs that are copied (%(default)s)")
    args = parser.parse_args()
    options = {"image_px": args.image_px, "resize_px": args.resize_px}
    trained = read_trained(args.checkpoint, **options)
    with tempfile.TemporaryDirectory() as scratch:
        path = args.features or os.path.join(scratch, "features.parquet")
        embed_folder(trained, args.folder, path, patch_weights=True)
        started, cpu = time.perf_counter(), time.process_time()
        photos = read_photos(args.folder, path, trained.config, [])
        looked = look(photos)
        group_images(photos.features, grow(photos.features))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print("\n".join(looked.lines))
    for finding in looked.findings:
        if "double" in finding.kind:
            print(f"{finding.kind}: {finding.file} {finding.other}: {finding.note}")
    known = np.nonzero(photos.classes != "")[0]
    features, truth = photos.features[known], photos.classes[known].astype(str)
    labels = np.unique(truth, return_inverse=True)[1]
    rounds = play(features, truth)
    for number, round_ in enumerate(rounds):
        print(f"round {number}: {round_.actions:,} actions, {round_.labelled:,} labelled, {100 * round_.accuracy:.1f} % right")
    ratios = {
        "precision_at_recall_half": [round(planted_precision(features, labels, seed), 3) for seed in range(2)],
        "actions_an_image": round(rounds[-1].actions / len(truth), 3),
        "one_by_one_an_image": 0.95,
        "milliseconds_an_image": round(1e3 * seconds / len(photos.paths), 2),
        "cpu_milliseconds_an_image": round(1e3 * cpu / len(photos.paths), 2),
    }
    copies = copies_found(photos, load(args.checkpoint, **options).embed, args.copies)
    print(json.dumps({"ratios": ratios, "copies_found": copies, "images": len(photos.paths), "accuracy": rounds[-1].accuracy}))


if __name__ == "__main__":
    main()
