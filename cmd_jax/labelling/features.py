"""Directions of features, and the nearest images of each: what choosing, grouping and filling in read."""

import numpy as np
from scipy import linalg

ROWS_AT_ONCE = 1024  # of the N x N similarities
SHRINKAGE = 0.3  # of a covariance towards a multiple of the identity: features are many, images few


def directions(features: np.ndarray) -> np.ndarray:
    """Features without what all images have in common: [N, F] -> [N, F] float32 of unit norm.

    The mean is removed, and of unit vectors the covariance (shrunk by SHRINKAGE): what varies most in features, light and pose
    among it, says no more than what varies little. An image at the mean has no direction: it stays 0.
    """
    rows = np.asarray(features, np.float32) - np.mean(features, axis=0, dtype=np.float64).astype(np.float32)
    rows = unit(rows)
    covariance = (1 - SHRINKAGE) * (rows.T @ rows) / len(rows)
    covariance[np.diag_indices_from(covariance)] += max(SHRINKAGE * np.sum(rows**2) / rows.size, 1e-12)
    # Rows times the inverse of a Cholesky factor have the dot products of x' covariance^-1 y.
    return unit(linalg.solve_triangular(linalg.cholesky(covariance, lower=True), rows.T, lower=True).T)


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
