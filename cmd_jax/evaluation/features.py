"""Features of a whole split from the teacher, which every protocol reads."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.config import ConfigDict
from cmd_jax.data.decode import BadImages
from cmd_jax.data.sources import NO_BOXES, UNLABELLED, Source
from cmd_jax.errors import BadImage
from cmd_jax.inference.preprocess import EvalImage, in_threads, load_eval_image
from cmd_jax.inference.run import Encoder, check_finite, gather, joined, process_indices


class Features(NamedTuple):
    """Features of the N images of a split that can be read.

    Attributes:
        features: [N, F] float32, l2-normalised.
        mil_weights: [N, P] float32, weights of the P patches, row-major; rows sum to 1.
        labels: [N] int64, -1 where unlabelled.
        boxes: [N, parts, 4] float32 (ymin, xmin, ymax, xmax), fractions of the evaluation crop.
        names: paths or ids.
        indices: [N] int64, ascending: their indices in the split; those that are missing cannot be read.
    """

    features: np.ndarray
    mil_weights: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...]
    indices: np.ndarray


def all_images(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, F] and labels [N] of both splits, training images first."""
    return np.concatenate([train.features, test.features]), np.concatenate([train.labels, test.labels])


def extract_features(encoder: Encoder, source: Source, poll: Callable[[], None] = lambda: None) -> Features:
    """Encodes a split: every process its share, and all get the whole.

    An image that cannot be read is reported on the error stream and left out; `data.decode.BadImages` has the limit.

    Args:
        encoder: the network.
        source: the split.
        poll: called before every batch, in all processes equally often.

    Raises:
        BadImage: too many images cannot be read.
    """
    config = encoder.config
    bad = BadImages(np.zeros(len(source), np.uint8), "left out of the evaluation")
    boxes, labels, names, readable = [], [], [], []

    def load(index: int) -> EvalImage | BadImage:
        try:
            return load_eval_image(source, config, index)
        except BadImage as error:
            return error

    def crops() -> Iterator[np.ndarray]:
        indices = process_indices(len(source))
        for index, image in zip(indices, in_threads(load, indices, config.data.decode_threads), strict=True):
            readable.append(not isinstance(image, BadImage))
            if not readable[-1]:
                bad.note(index, str(image))
                image = _blank(source, config, index)  # a row of its own until all processes have joined theirs
            boxes.append(image.boxes)
            labels.append(image.label)
            names.append(image.name)
            yield image.crop

    encoded = joined(encoder.run(crops(), ("features", "mil_weights"), config.eval.batch_size, poll))
    check_finite(encoded, names)
    rows = {**encoded, "boxes": np.stack(boxes), "labels": np.array(labels, np.int32), "readable": np.array(readable)}
    rows = gather({**rows, "names": _as_bytes(names)}, len(source))
    readable = rows.pop("readable")
    BadImages(~readable, bad.outcome).check("images of this split cannot be read")  # a process counts those of its share
    rows = {key: array[readable] for key, array in rows.items()}
    names = tuple(name.tobytes().rstrip(b"\0").decode() for name in rows.pop("names"))
    return Features(**rows | {"labels": rows["labels"].astype(np.int64)}, names=names, indices=np.flatnonzero(readable))


def _blank(source: Source, config: ConfigDict, index: int) -> EvalImage:
    """Stands for an image that cannot be read."""
    try:
        boxes = np.zeros_like(source[index].part_boxes)
    except BadImage:  # a file, and folders have no boxes
        boxes = NO_BOXES
    return EvalImage(np.zeros((config.eval.crop_px, config.eval.crop_px, 3), np.uint8), boxes, UNLABELLED, "")


def _as_bytes(names: Sequence[str]) -> np.ndarray:
    """[n, W] uint8: UTF-8, filled up with zeros to the longest name of all processes."""
    encoded = [name.encode() for name in names]
    width = max(1, *map(len, encoded))
    if jax.process_count() > 1:
        width = int(np.max(multihost_utils.process_allgather(np.int32(width))))
    return np.array(encoded, f"S{width}").view(np.uint8).reshape(len(encoded), width)
