"""k-means on the test images' features, as papers on category discovery report it: accuracy, NMI and ARI.

Accuracy is the share of images in the cluster that stands for their class, by the best one-to-one assignment of clusters to
classes (Hungarian algorithm; Han et al., ICCV 2019; Vaze et al., CVPR 2022). Labels are used for that alone.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.metrics import Number

STARTS = 5  # the one whose images end nearest to their centers is taken
MAX_ITERATIONS = 100
TYPICAL_ITERATIONS = 15
PASSES_OF_SEEDING = 8  # over the similarities to all centers: about one for each trial

Array = jax.Array


def kmeans(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Lloyd's algorithm from `STARTS` starts of greedy k-means++ (Arthur and Vassilvitskii, 2007), as in scikit-learn.

    Args:
        features: [N, F] float.
        clusters: k, 1 to N.
        seed: of the starts.

    Returns:
        [N] int32, the cluster of each row, 0 to k - 1; one can be empty where rows are equal.
    """
    keys = jax.random.split(jax.random.key(seed), STARTS)
    found, inertia = _kmeans(np.asarray(features, np.float32), keys, clusters)
    return np.asarray(found)[int(np.argmin(inertia))]


@functools.partial(jax.jit, static_argnames="clusters")
def _kmeans(rows: Array, keys: Array, clusters: int) -> tuple[Array, Array]:
    """[N, F], [starts] keys -> clusters [starts, N] and inertia [starts]."""
    squares = jnp.sum(jnp.square(rows), axis=1)

    def distances(centers: Array) -> Array:
        products = jnp.matmul(rows, centers.T, precision="highest")
        return jnp.maximum(squares[:, None] - 2 * products + jnp.sum(jnp.square(centers), axis=1), 0)

    def assign(centers: Array) -> tuple[Array, Array]:
        to_centers = distances(centers)
        return jnp.argmin(to_centers, axis=1), jnp.sum(jnp.min(to_centers, axis=1))

    def goes_on(carry: tuple[Array, Array, Array, Array]) -> Array:
        *_, moved, iteration = carry
        return moved & (iteration < MAX_ITERATIONS)

    def improve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        centers, of, _, iteration = carry
        members = jax.nn.one_hot(of, clusters)
        counts = jnp.sum(members, axis=0)[:, None]
        means = jnp.matmul(members.T, rows, precision="highest") / jnp.maximum(counts, 1)
        centers = jnp.where(counts > 0, means, centers)
        found, _ = assign(centers)
        return centers, found, jnp.any(found != of), iteration + 1

    def from_start(key: Array) -> tuple[Array, Array]:
        centers = _seeded(key, rows, distances, clusters)
        start = (centers, assign(centers)[0], jnp.bool_(True), jnp.int32(0))
        centers, *_ = jax.lax.while_loop(goes_on, improve, start)
        return assign(centers)

    return jax.lax.map(from_start, keys)


def _seeded(key: Array, rows: Array, distances: Callable[[Array], Array], clusters: int) -> Array:
    """Centers [k, F]: each the best of some rows that are drawn by their squared distance to the nearest center so far."""
    trials = 2 + int(math.log(clusters))
    first = rows[jax.random.randint(key, (1,), 0, len(rows))]

    def add(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, nearest = carry
        logits = jnp.where(jnp.any(nearest > 0), jnp.log(nearest), 0.0)  # all rows equal: any of them
        drawn = rows[jax.random.categorical(jax.random.fold_in(key, number), logits, shape=(trials,))]
        updated = jnp.minimum(nearest[:, None], distances(drawn))
        best = jnp.argmin(jnp.sum(updated, axis=0))
        return centers.at[number].set(drawn[best]), updated[:, best]

    centers = jnp.zeros((clusters, rows.shape[1])).at[0].set(first[0])
    return jax.lax.fori_loop(1, clusters, add, (centers, distances(first)[:, 0]))[0]


def assigned(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image lies in the cluster that the best one-to-one assignment gives its class.

    Args:
        clusters: [N] int, at least 0.
        labels: [N] int, at least 0.

    Returns:
        [N] bool, with the largest possible sum.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((clusters.max() + 1, labels.max() + 1), np.int64)
    np.add.at(counts, (clusters, labels), 1)
    pairs = linear_sum_assignment(counts, maximize=True)
    matched = np.full(len(counts), -1)
    matched[pairs[0]] = pairs[1]
    return matched[clusters] == labels


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`."""
    (images, width), classes = inputs.queries.features.shape, inputs.classes()
    flops = 2.0 * STARTS * (TYPICAL_ITERATIONS * 2 + PASSES_OF_SEEDING) * images * width * classes
    return Cost(f"k-means of {images:,} x {width:,} features, {STARTS} starts, {classes:,} clusters", 1, "fits", flops)


def measure(inputs: EvalInputs) -> list[Number]:
    """Accuracy, NMI and ARI of k-means of the test images, with as many clusters as they have classes."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels, seed = inputs.queries.labels, inputs.config.seed
    clusters = len(np.unique(labels))
    inputs.poll()
    found = kmeans(inputs.queries.features, clusters, seed)
    protocol = (
        f"k-means, k={clusters:,} classes, best of {STARTS} starts, {inputs.features()}, {len(labels):,} test images without "
        "their labels"
    )
    best = f"best one-to-one assignment, {protocol}"
    nmi, ari = normalized_mutual_info_score(labels, found), adjusted_rand_score(labels, found)
    return [
        percent_number("cluster_accuracy", "Clustering accuracy", assigned(found, labels), best, seed),
        Number("cluster_nmi", "Clustering NMI", 100 * float(nmi), f"arithmetic mean of the entropies, {protocol}"),
        Number("cluster_ari", "Clustering ARI", 100 * float(ari), f"0 is chance, {protocol}"),
    ]
