"""Directions of features, and the nearest images of each: what choosing and filling in read."""

import numpy as np

ROWS_AT_ONCE = 1024  # of the N x N similarities


def directions(features: np.ndarray) -> np.ndarray:
    """Features without what all images have in common: [N, F] -> [N, F] float32 of mean removed, then unit norm (0 stays 0)."""
    centered = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    return unit(centered)


def unit(rows: np.ndarray) -> np.ndarray:
    """[N, F] -> rows of unit norm; those of norm 0 stay 0."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of largest dot product with each, itself among them, in any order.

    Args:
        rows: [N, F] float32.
        k: at most N are found.

    Returns:
        (index [N, k] int64, similarity [N, k] float32).
    """
    k, found = min(k, len(rows)), []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        similarity = rows[start : start + ROWS_AT_ONCE] @ rows.T
        index = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        found.append((index, np.take_along_axis(similarity, index, axis=1)))
    index, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return index, similarity
