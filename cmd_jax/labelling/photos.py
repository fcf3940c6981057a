"""The photographs of a folder as labelling sees them: features, key patches, thumbnails, and what doubles are found by."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.decode import eval_corner, eval_size
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.sources import SPLITS
from cmd_jax.errors import BadImage, ConfigError, DatasetError
from cmd_jax.inference.preprocess import in_threads
from cmd_jax.inference.store import read_meta, rows
from cmd_jax.labelling.thumbs import Thumb, read_thumb, thumb_px
from cmd_jax.progress import track
from cmd_jax.text import printable

KEY_PATCHES, KEY_WEIGHT = 3, 1.5  # patches that are marked, and their least weight beside that of equal ones


class Photos(NamedTuple):
    """The N photographs of a folder that can be read.

    Attributes:
        folder: that holds them.
        paths: relative to it, sorted.
        features: [N, F] float32, l2-normalised.
        marks: [N, KEY_PATCHES, 4] float32 (x, y, width, height) of key patches as fractions of the photograph; of no width
            where there is none.
        thumbs: of each.
        classes: of the class folders; "" where there is none.
        splits: "train", "test" or "".
        bad: (path, reason) of those that cannot be read.
        note: why class folders are not used; "" where they are or where there are none.
    """

    folder: str
    paths: list[str]
    features: np.ndarray
    marks: np.ndarray
    thumbs: list[Thumb]
    classes: np.ndarray
    splits: np.ndarray
    bad: list[tuple[str, str]]
    note: str


def read_photos(
    folder: str, features: str, config: ConfigDict, bad: list[tuple[str, str]], kept: Mapping[str, Thumb] | None = None
) -> Photos:
    """Reads the photographs of a file of features once more, for their pixels.

    Args:
        folder: that was embedded.
        features: the file, as `embed_folder` writes it.
        config: of the network, resolved.
        bad: photographs that embedding could not read.
        kept: of an earlier call, by path; photographs that have not changed since are not read.
    """
    meta = read_meta(features)
    columns = ["features", *(["patch_weights"] if "patch_weights" in meta.widths else [])]
    paths, pieces = [], []
    for names, piece in rows(features, meta, columns):
        paths += names
        pieces.append(piece)
    arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}
    side, kept = thumb_px(len(paths)), kept or {}

    def load(path: str) -> Thumb | BadImage:
        try:
            return read_thumb(os.path.join(folder, path), side, kept.get(path))
        except BadImage as error:
            return error

    loaded = in_threads(load, paths, config.data.decode_threads)
    found = list(track(loaded, f"looking at {printable(folder)}", len(paths)))
    whole = np.array([isinstance(thumb, Thumb) for thumb in found])
    bad = bad + [(path, str(thumb)) for path, thumb in zip(paths, found, strict=True) if isinstance(thumb, BadImage)]
    kept = [path for path, is_whole in zip(paths, whole, strict=True) if is_whole]
    thumbs = [thumb for thumb in found if isinstance(thumb, Thumb)]
    weights = arrays["patch_weights"][whole] if "patch_weights" in arrays else np.zeros((len(kept), 0), np.float32)
    marks = key_patches(weights, [thumb.size for thumb in thumbs], config)
    classes, splits, note = class_folders(folder, kept)
    return Photos(folder, kept, arrays["features"][whole], marks, thumbs, classes, splits, bad, note)


def key_patches(weights: np.ndarray, sizes: list[tuple[int, int]], config: ConfigDict) -> np.ndarray:
    """Where the patches with the largest weights lie in their photographs.

    Args:
        weights: [N, P], sum to 1 over P; P is 0 where there are none.
        sizes: (width, height) of each photograph.
        config: of the network, resolved.

    Returns:
        [N, KEY_PATCHES, 4] float32 (x, y, width, height), fractions of the photograph; zeros where a patch counts no more than
        KEY_WEIGHT times its share.
    """
    count, patches = weights.shape
    marks = np.zeros((count, KEY_PATCHES, 4), np.float32)
    if not patches:
        return marks
    grid, side, how = round(patches**0.5), token_px(config), config.eval
    best = np.argsort(-weights, axis=1, kind="stable")[:, :KEY_PATCHES]
    for row, (width, height) in enumerate(sizes):
        resized = eval_size((height, width), how.resize_px, how.resize_mode)
        top, left = eval_corner(resized, how.crop_px)
        for place, patch in enumerate(best[row]):
            if weights[row, patch] * patches >= KEY_WEIGHT:
                down, right = divmod(int(patch), grid)
                corner = ((left + side * right) / resized[1], (top + side * down) / resized[0])
                marks[row, place] = (*corner, side / resized[1], side / resized[0])
    return marks


def class_folders(folder: str, paths: list[str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Classes and splits of `train/CLASS/*` and `test/CLASS/*` for paths relative to a folder: texts [N], and a note.

    The note says why the folders are no classes, where they look like splits and are none.
    """
    of, note = {}, ""
    try:
        for split in SPLITS:
            source = FolderSource(folder, split)
            for path, label in zip(source.paths, source.labels, strict=True):
                relative = os.path.relpath(path, source.root)
                of[relative] = (source.class_names[label] if label >= 0 else "", split if source.class_names else "")
    except (ConfigError, DatasetError) as error:
        of, note = {}, str(error)
    found = [of.get(path, ("", "")) for path in paths]
    return np.array([name for name, _ in found], object), np.array([split for _, split in found], object), note
