"""Nearest neighbours in a file of features: of whole images, or of one patch among all patches."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import ConfigError
from cmd_jax.inference.load import Trained
from cmd_jax.inference.preprocess import file_crop
from cmd_jax.inference.run import grid_side, place
from cmd_jax.inference.store import Meta, rows


class Match(NamedTuple):
    """An image that was found.

    Attributes:
        path: relative to the folder that was embedded.
        similarity: cosine.
        patch: (row, column) of the most similar patch; None of whole images.
    """

    path: str
    similarity: float
    patch: tuple[int, int] | None


class Found(NamedTuple):
    """Matches, most similar first, and the patch of the query that was searched for, if one was."""

    matches: list[Match]
    patch: tuple[int, int] | None


def search(
    trained: Trained,
    path: str,
    meta: Meta,
    query: str,
    top: int = 10,
    patches: bool = False,
    patch: tuple[int, int] | None = None,
) -> Found:
    """Finds the images of a file that are most similar to one image.

    Args:
        trained: the network that made the file, with its `features`.
        path: of the file.
        meta: its own.
        query: path of an image.
        top: number of matches.
        patches: compare one patch of the query with every patch, an image counting by its best one.
        patch: (row, column) of it; None is the patch with the largest MIL weight.

    Raises:
        ConfigError: the file is of another network or has no patches, or the patch is not in the grid.
        BadImage: the query cannot be read.
        DatasetError: the file is damaged.
    """
    if trained.fingerprint != meta.fingerprint:
        raise ConfigError(
            f"{path} was made by another checkpoint ({meta.checkpoint}, step {meta.step}, fingerprint {meta.fingerprint}) than "
            f"{trained.source} (fingerprint {trained.fingerprint}); pass the one, or embed again with the other"
        )
    if not patches:
        (feature,) = _encode(trained, query, ("features",))
        return Found(_nearest(_image_scores(path, meta, feature), top), None)
    if "patch_tokens" not in meta.widths:
        raise ConfigError(f"{path} has no patch tokens; embed again with --patches, or search whole images")
    if patch is None and not trained.has_scorer:
        raise ConfigError(f"{trained.source} has no MIL scorer that would choose a patch; name one: --patch=ROW,COLUMN")
    outputs = ("patch_tokens", *(["mil_weights"] if patch is None else []))
    tokens, *weights = _encode(trained, query, outputs)
    side = grid_side(trained.config)
    if patch is None:
        patch = divmod(int(np.argmax(weights[0])), side)
    if not all(0 <= place < side for place in patch):
        raise ConfigError(f"--patch={patch[0]},{patch[1]} is outside the grid of {side} x {side} patches; count from 0")
    return Found(_nearest(_patch_scores(path, meta, tokens[patch[0] * side + patch[1]]), top), patch)


def _encode(trained: Trained, query: str, outputs: tuple[str, ...]) -> list[np.ndarray]:
    (encoded,) = place(trained).run([file_crop(query, trained.config)], outputs, batch_size=1)
    return [encoded[name][0] for name in outputs]


Scores = Iterator[tuple[list[str], np.ndarray, np.ndarray | None]]


def _image_scores(path: str, meta: Meta, feature: np.ndarray) -> Scores:
    for names, columns in rows(path, meta, ["features"]):
        yield names, columns["features"] @ feature, None


def _patch_scores(path: str, meta: Meta, token: np.ndarray) -> Scores:
    unit = token / max(float(np.linalg.norm(token)), 1e-12)
    for names, columns in rows(path, meta, ["patch_tokens"]):
        tokens = columns["patch_tokens"].astype(np.float32).reshape(len(names), meta.grid**2, -1)
        cosine = tokens @ unit / np.maximum(np.linalg.norm(tokens, axis=-1), 1e-12)
        best = np.argmax(cosine, axis=1)
        yield names, cosine[np.arange(len(names)), best], np.stack(np.divmod(best, meta.grid), axis=1)


def _nearest(scores: Scores, top: int) -> list[Match]:
    """The best of all pieces; of equals the first."""
    best: list[Match] = []
    for names, similarity, places in scores:
        for index in np.argsort(-similarity, kind="stable")[:top]:
            place = None if places is None else (int(places[index][0]), int(places[index][1]))
            best.append(Match(names[index], float(similarity[index]), place))
        best = sorted(best, key=lambda match: -match.similarity)[:top]
    return best
