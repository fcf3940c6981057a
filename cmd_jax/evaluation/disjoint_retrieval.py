"""Class-disjoint retrieval, the protocol of metric learning (Oh Song et al., CVPR 2016): Recall@K among other classes' images.

There a network is trained with the labels of the first half of the classes and measured on all images of the second half, each
against the others. Here no labels were seen of either.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluation.devices import by_query, chunks, in_chunks
from cmd_jax.evaluation.features import all_images
from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.evaluation.retrieval import SORT_FLOPS, ranked_relevance
from cmd_jax.metrics import Number
from cmd_jax.training import processes

RANKS = (1, 2, 4, 8)


def second_half(labels: np.ndarray, classes: int) -> np.ndarray:
    """[N] int labels in 0..classes - 1 -> [N] bool, those of the second half of the classes; the middle one is in it."""
    return labels >= classes // 2


def recalls(features: np.ndarray, labels: np.ndarray, poll: Callable[[], None] = lambda: None) -> np.ndarray:
    """Whether one of the K most similar of the other images has the class of each, for K of RANKS.

    Args:
        features: [N, F], l2-normalised; N is at least 1.
        labels: [N] int.
        poll: called before every chunk.

    Returns:
        [N, 4] bool; of equal similarities those of other classes come first.
    """
    features, labels = np.asarray(features, np.float32), labels.astype(np.int32)
    return in_chunks(_recalls, (features, labels), (features, labels, np.arange(len(labels), dtype=np.int32)), poll)


@by_query
def _recalls(gallery: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    others = queries[2][:, None] != jnp.arange(len(gallery[1]))
    similarity = jnp.where(others, jnp.matmul(queries[0], gallery[0].T, precision="highest"), -jnp.inf)
    relevant = ranked_relevance(similarity, others & (gallery[1] == queries[1][:, None]))
    return jnp.stack([relevant[:, :rank].any(axis=1) for rank in RANKS], axis=1)


def _images(inputs: EvalInputs) -> tuple[np.ndarray, np.ndarray]:
    features, labels = all_images(inputs.gallery, inputs.queries)
    chosen = second_half(labels, inputs.classes())
    return features[chosen], labels[chosen]


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`."""
    features, labels = _images(inputs)
    pairs, width = len(labels) ** 2, features.shape[1]
    work = f"{len(labels):,} queries, {pairs:,} similarities of {width:,} features ranked"
    return Cost(work, chunks(len(labels)), "chunks", pairs * (2.0 * width + SORT_FLOPS))


def measure(inputs: EvalInputs) -> list[Number]:
    """Recall@1, 2, 4, 8 over all images of the second half of the classes; a line says so where these are fewer than two."""
    features, labels = _images(inputs)
    classes = len(np.unique(labels))
    if classes < 2:
        processes.print_once("disjoint_retrieval: left out, the second half of the classes is fewer than two")
        return []
    found = recalls(features, labels, inputs.poll)
    protocol = (
        f"cosine, {inputs.features()}, each of {len(labels):,} train and test images of the last {classes:,} of "
        f"{inputs.classes():,} classes among the others; no labels of these seen"
    )
    return [
        percent_number(f"disjoint_recall{rank}", f"Class-disjoint Recall@{rank}", found[:, place], protocol, inputs.config.seed)
        for place, rank in enumerate(RANKS)
    ]
