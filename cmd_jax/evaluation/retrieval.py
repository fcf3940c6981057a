"""Retrieval as CMD reports it: test images as queries, training images as the gallery, ranked by cosine similarity."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluation.devices import by_query, chunks, in_chunks
from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.metrics import Number

SORT_FLOPS = 100  # what ranking one similarity costs, in operations of a matrix product
AP_RANKS = 100
QUERY_EVERY = 9  # of the test items in `ratio_split`


class RetrievalResult(NamedTuple):
    """Percentages.

    Attributes:
        rank1: share of queries whose nearest gallery item has their class.
        rank5: share with such an item among the five nearest.
        map_at_100: mean of the average precision over the first 100 ranks, divided by the relevant items found there.
        map_full: mean of the average precision over the whole ranking.
    """

    rank1: float
    rank5: float
    map_at_100: float
    map_full: float


def average_precision(relevant: jax.Array) -> jax.Array:
    """Mean over a ranking's relevant items of the precision at their rank; 0 where there is none.

    Args:
        relevant: [Q, M] bool in ranked order.

    Returns:
        [Q] float32.
    """
    hits = jnp.cumsum(relevant, axis=1, dtype=jnp.int32)
    precision = hits / jnp.arange(1, relevant.shape[1] + 1)
    return jnp.sum(precision * relevant, axis=1) / jnp.maximum(1, hits[:, -1])


def ranked_relevance(similarity: jax.Array, relevant: jax.Array) -> jax.Array:
    """Orders whether items are relevant by their similarity, largest first.

    The float32 similarity becomes an integer of the same order, whose last bit is replaced by the relevance: one sort of
    integers, several times faster on a CPU than one of pairs. Of items that are equal but for that bit, the irrelevant ones
    come first, so that constant features are worth nothing.

    Args:
        similarity: [..., M] float32.
        relevant: [..., M] bool.

    Returns:
        [..., M] bool.
    """
    bits = jax.lax.bitcast_convert_type(similarity, jnp.int32)
    descending = ~jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return (jax.lax.sort(descending & ~1 | relevant, is_stable=False) & 1).astype(bool)


def ratio_split(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """CMD's other split: every ninth test item is a query, the remaining ones join the gallery behind the training items.

    Args:
        gallery: [M, F] training features.
        gallery_labels: [M] int.
        queries: [Q, F] test features.
        query_labels: [Q] int.

    Returns:
        ((gallery features, labels), (query features, labels)).
    """
    chosen = np.arange(len(queries)) % QUERY_EVERY == 0
    joined = (np.concatenate(parts) for parts in ((gallery, queries[~chosen]), (gallery_labels, query_labels[~chosen])))
    return tuple(joined), (queries[chosen], query_labels[chosen])


def query_scores(
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """What the ranking of the gallery by dot product (cosine when features are l2-normalised) is worth to each query.

    Args:
        gallery: [M, F].
        gallery_labels: [M] int.
        queries: [Q, F].
        query_labels: [Q] int.
        poll: called before every chunk of queries.

    Returns:
        [Q, 4] float64 in 0..1: the fields of `RetrievalResult`.
    """
    pairs = ((gallery, gallery_labels), (queries, query_labels))
    pairs = [(np.asarray(features, np.float32), labels.astype(np.int32)) for features, labels in pairs]
    return in_chunks(_score, *pairs, poll).astype(np.float64)


def train_rank1(gallery: np.ndarray, labels: np.ndarray, poll: Callable[[], None] = lambda: None) -> np.ndarray:
    """Whether the most similar of the other training images has the class of each: a number to choose by, without test images.

    Args:
        gallery: [M, F] training features, l2-normalised.
        labels: [M] int.
        poll: called before every chunk.

    Returns:
        [M] bool.
    """
    features, labels = np.asarray(gallery, np.float32), labels.astype(np.int32)
    return in_chunks(_nearest_other, (features, labels), (features, labels, np.arange(len(labels), dtype=np.int32)), poll)


@by_query
def _nearest_other(gallery: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    similarity = jnp.matmul(queries[0], gallery[0].T, precision="highest")
    itself = queries[2][:, None] == jnp.arange(len(gallery[1]))
    nearest = jnp.argmax(jnp.where(itself, -jnp.inf, similarity), axis=1)
    return gallery[1][nearest] == queries[1]


@by_query
def _score(gallery: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, jax.Array]) -> jax.Array:
    similarity = jnp.matmul(queries[0], gallery[0].T, precision="highest")
    relevant = ranked_relevance(similarity, gallery[1] == queries[1][:, None])
    of_ranks = (
        relevant[:, 0],
        relevant[:, :5].any(axis=1),
        average_precision(relevant[:, :AP_RANKS]),
        average_precision(relevant),
    )
    return jnp.stack([scores.astype(jnp.float32) for scores in of_ranks], axis=1)


def retrieval(
    gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray
) -> RetrievalResult:
    """Means of `query_scores` over the queries."""
    scores = query_scores(gallery, gallery_labels, queries, query_labels)
    return RetrievalResult(*(100 * scores.mean(axis=0)).tolist())


def cost(inputs: EvalInputs) -> Cost:
    """Of both splits."""
    images, tests, width = len(inputs.gallery.labels), len(inputs.queries.labels), inputs.gallery.features.shape[1]
    chosen = -(-tests // QUERY_EVERY)
    pairs = tests * images + chosen * (images + tests - chosen) + images**2
    text = f"{tests:,}, {chosen:,} and {images:,} queries, {pairs:,} similarities of {width:,} features ranked"
    return Cost(text, chunks(tests) + chunks(chosen) + chunks(images), "chunks", pairs * (2.0 * width + SORT_FLOPS))


def measure(inputs: EvalInputs) -> list[Number]:
    """Rank-1, Rank-5, mAP of CMD's two splits, "origin" and "ratio", and Rank-1 among the training images."""
    gallery, queries = inputs.gallery, inputs.queries
    origin = ((gallery.features, gallery.labels), (queries.features, queries.labels))
    ratio = ratio_split(gallery.features, gallery.labels, queries.features, queries.labels)
    every_ninth = (
        f"cosine, {inputs.features()}, every ninth test image as query ({len(ratio[1][1]):,}), the others in the gallery "
        f"({len(ratio[0][1]):,})"
    )
    plain = f"cosine, {inputs.features()}, {inputs.counts()}"
    return [
        *_split_numbers(inputs, origin, "", "Retrieval", plain),
        *_split_numbers(inputs, ratio, "ratio_", "Retrieval 1:8", every_ninth),
        percent_number(
            "train_rank1",
            "Train Rank-1",
            train_rank1(gallery.features, gallery.labels, inputs.poll),
            f"cosine, {inputs.features()}, each of {len(gallery.labels):,} train images among the others",
            inputs.config.seed,
        ),
    ]


def _split_numbers(inputs: EvalInputs, split: tuple, prefix: str, title: str, protocol: str) -> list[Number]:
    (gallery, gallery_labels), (queries, query_labels) = split
    scores, seed = query_scores(gallery, gallery_labels, queries, query_labels, inputs.poll), inputs.config.seed
    result = RetrievalResult(*(100 * scores.mean(axis=0)).tolist())
    at_100 = f"first {AP_RANKS} ranks, over the relevant found there, {protocol}"
    return [
        percent_number(f"{prefix}rank1", f"{title} Rank-1", scores[:, 0], protocol, seed),
        Number(f"{prefix}rank5", f"{title} Rank-5", result.rank5, protocol),
        Number(f"{prefix}map_at_100", f"{title} mAP@100", result.map_at_100, at_100),
        percent_number(f"{prefix}map", f"{title} mAP", scores[:, 3], f"whole ranking, {protocol}", seed),
    ]
