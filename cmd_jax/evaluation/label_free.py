"""Quality of features measured without labels.

RankMe and alpha-ReQ read the spectrum of the features, uniformity their spread, alignment how far apart two views of an image
lie, View Rank-1 whether they find each other, and the teacher's entropies are those that training logs. Alone none of them is a
verdict: random features are spread and of full rank. They compare checkpoints of one run; `agreement` measures how well.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.decode import decode_record, to_canvas
from cmd_jax.evaluation.protocol import Cost, EvalInputs, forward_flops, percent_number
from cmd_jax.evaluation.splits import spread
from cmd_jax.inference.preprocess import in_threads
from cmd_jax.inference.run import batch_count, gather, joined, once, process_indices, read_outputs, run_batches
from cmd_jax.method.centers import sinkhorn_center
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.logits import teacher_logits
from cmd_jax.metrics import Metrics, Number
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.training.health import relative_entropy
from cmd_jax.training.step import term_weights

PAIR_IMAGES = 1024  # of alignment and entropies: means over images, which settle far earlier than a spectrum
FIRST_RANK, LAST_RANK = 4, 100  # of the eigenvalues that alpha-ReQ's code fits
FEWEST_RANKS = 8
VIEWS_KEY = 2**31 - 1  # folded into the seed's key; training folds its steps, which stay below
KEYS = ("view_rank1", "rankme", "alpha_req", "uniformity", "alignment", "teacher_entropy", "marginal_entropy")
FEWEST_STEPS = 4  # of a rank correlation; of three, any order is near another
ROWS_AT_ONCE = 64  # of logits [rows, K]


def rankme(features: np.ndarray) -> float:
    """Effective rank (RankMe, Garrido et al., ICML 2023): exp of the entropy of the singular values over their sum.

    Args:
        features: [N, F], not all zero.

    Returns:
        1 (all on one line) to min(N, F).
    """
    singular = np.sqrt(np.maximum(_eigenvalues(features), 0))
    share = singular[singular > 0] / singular.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def alpha_req(features: np.ndarray) -> float | None:
    """Decay of the covariance's spectrum (alpha-ReQ, Agrawal et al., NeurIPS 2022): alpha of eigenvalue ~ rank^-alpha.

    As in the authors' code, a least-squares line through the logarithms of the eigenvalues 4 to 100, weighted by 1 / rank.

    Args:
        features: [N, F].

    Returns:
        0 is a flat spectrum, around 1 the authors find good features; None with fewer than 8 such eigenvalues.
    """
    centered = features - features.mean(axis=0, dtype=np.float64)
    spectrum = _eigenvalues(centered)[::-1]
    spectrum = spectrum[spectrum > 1e-9 * spectrum[0]][FIRST_RANK - 1 : LAST_RANK]  # below is rounding
    if len(spectrum) < FEWEST_RANKS:
        return None
    ranks = np.arange(FIRST_RANK, FIRST_RANK + len(spectrum))
    slope, _ = np.polyfit(np.log(ranks), np.log(spectrum), 1, w=ranks**-0.5)  # polyfit squares its weights
    return float(-slope)


def _eigenvalues(rows: np.ndarray) -> np.ndarray:
    """Squared singular values of [N, F], ascending, from the smaller Gram matrix."""
    rows = rows.astype(np.float64)
    return np.linalg.eigvalsh(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows)


def uniformity(features: np.ndarray, rows_at_once: int = 1024) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs (Wang and Isola, ICML 2020): 0 where all are one, less is better.

    Args:
        features: [N, F] l2-normalised; N is at least 2.
        rows_at_once: of the N x N similarities.
    """
    total, count = 0.0, len(features)
    for start in range(0, count, rows_at_once):
        similarity = features[start : start + rows_at_once] @ features.T
        total += float(np.sum(np.exp(4 * similarity.astype(np.float64) - 4)))
    return math.log((total - count) / (count * (count - 1)))  # without every image's pair with itself


def alignment(views: np.ndarray) -> float:
    """Mean squared distance of two views of an image (Wang and Isola, ICML 2020): less is better, 0 also in a collapse.

    Args:
        views: [N, 2, F] l2-normalised.
    """
    return float(np.mean(np.sum(np.square(views[:, 0] - views[:, 1], dtype=np.float64), axis=-1)))


def view_rank1(views: np.ndarray) -> np.ndarray:
    """Whether the most similar of all second views to an image's first view is the image's own: retrieval without labels.

    Args:
        views: [N, 2, F] l2-normalised.

    Returns:
        [N] bool.
    """
    return np.argmax(views[:, 0] @ views[:, 1].T, axis=1) == np.arange(len(views))


def teacher_entropies(config: ConfigDict, network: Network, teacher: Params, pooled: np.ndarray) -> tuple[float, float]:
    """Of the teacher's image-level distributions softmax((W z - center) / temperature), at the last temperature.

    The center is the one of these rows, as `method.centering` computes it: Sinkhorn's, or the mean of the logits, which the
    moving average follows. Batch statistics in the heads are those of all rows.

    Args:
        config: resolved.
        network: of the teacher.
        teacher: parameters.
        pooled: [n, D] image embeddings of views.

    Returns:
        Mean entropy, and entropy of the mean distribution, both over log K: 0 is one prototype, 1 all alike.
    """
    found = _make_entropies(config, network)(teacher, pooled)
    return tuple(float(relative_entropy(entropy, config.head.prototypes)) for entropy in found)


@once
def _make_entropies(config: ConfigDict, network: Network) -> Callable:
    """Builds (params, pooled [n, D]) -> the entropies of `teacher_entropies` in nats."""
    temp = config.method.teacher_temp

    @jax.jit
    def entropies(params: Params, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = len(pooled)
        z = network.apply({"params": params}, pooled, method=lambda network, x: network.image_head(x))
        prototypes = network.apply({"params": params}, method="prototype_rows")[0]
        if config.method.centering == "sinkhorn":
            center = sinkhorn_center(z, prototypes, temp, Streaming(config.method.prototype_chunk))
        else:
            center = prototypes @ jnp.mean(z, axis=0)
        spare = -count % ROWS_AT_ONCE
        real = jnp.pad(jnp.ones(count), (0, spare)).reshape(-1, ROWS_AT_ONCE)
        parts = jnp.pad(z, ((0, spare), (0, 0))).reshape(*real.shape, -1)  # [n, d] -> [parts, rows, d]

        def add(totals: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple:
            log_probs = jax.nn.log_softmax(teacher_logits(part[0], prototypes, center, temp))
            probs = jnp.exp(log_probs) * part[1][:, None]
            return (totals[0] - jnp.sum(probs * log_probs), totals[1] + jnp.sum(probs, axis=0)), None

        (entropy, mean), _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(prototypes.shape[0])), (parts, real))
        mean = mean / count
        return entropy / count, -jnp.sum(jax.scipy.special.xlogy(mean, mean))

    return entropies


def two_views(inputs: EvalInputs) -> tuple[np.ndarray, np.ndarray]:
    """Teacher outputs for the two global views of up to PAIR_IMAGES training images, augmented as in training.

    Returns:
        Features [n, 2, F] l2-normalised, and image embeddings [n, 2, D].
    """
    config, source = inputs.config, inputs.splits.train
    chosen = spread(len(source), PAIR_IMAGES)
    apply = _make_encoder(config, inputs.network)

    def load(place: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
        pixels = decode_record(source[int(chosen[place])], grayscale=config.data.grayscale)
        return *to_canvas(pixels, config.data.canvas_px), np.int32(chosen[place])

    items: Iterator = in_threads(load, process_indices(len(chosen)), config.data.decode_threads)
    batches = run_batches(apply, inputs.teacher, items, config.eval.batch_size, inputs.poll)
    found = gather(joined(batches), len(chosen))
    return found["features"], found["pooled"]


@once
def _make_encoder(config: ConfigDict, network: Network) -> Callable:
    """Builds (params, canvas [B, C, C, 3], size [B, 2], index [B]) -> what `two_views` returns of them, by name."""
    views = config.views
    with views.unlocked():
        views.local_count = 0

    @jax.jit
    def encode(params: Params, canvas: jax.Array, size: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), VIEWS_KEY)
        pairs, _ = multi_crop(key, canvas, size, index, views=views, normalization=config.data.normalization)
        encoded = network.apply({"params": params}, pairs.reshape(-1, *pairs.shape[2:]))  # [B, 2, ...] -> [B * 2, ...]
        split = lambda x: x.reshape(*pairs.shape[:2], -1)
        features = read_outputs(config, params, encoded.backbone)["features"]
        return {"features": split(features), "pooled": split(encoded.image_embedding)}

    return encode


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`: the two views go through the teacher."""
    config, images = inputs.config, min(PAIR_IMAGES, len(inputs.splits.train))
    side = config.views.global_px
    work = f"two views of {images:,} train images at {side} px"
    flops = forward_flops(config, inputs.teacher, 2 * images, side)
    return Cost(work, 1 + batch_count(config, images), "batches", flops)


def measure(inputs: EvalInputs) -> list[Number]:
    """All of them, of the training images, but what fewer than two images, a flat spectrum or an untrained head cannot say."""
    config, gallery = inputs.config, inputs.gallery.features
    chosen = gallery[spread(len(gallery), config.eval.label_free_images)]
    if len(chosen) < 2:
        return []
    inputs.poll()
    features, pooled = two_views(inputs)
    entropy = marginal = None
    if term_weights(config).use_image:
        entropy, marginal = teacher_entropies(config, inputs.network, inputs.teacher, pooled.reshape(-1, pooled.shape[-1]))
    alpha = alpha_req(chosen)
    measured = f"{inputs.features()}, {len(chosen):,} train images"
    pairs = f"two views as in training of {len(features):,} train images"
    of_teacher = f"over log {config.head.prototypes:,}, {config.method.centering} centers of these, {pairs}"
    numbers = [
        ("rankme", "RankMe", rankme(chosen), f"effective rank, at most {min(chosen.shape):,}, {measured}"),
        ("alpha_req", "alpha-ReQ", alpha, f"decay of the spectrum, ranks {FIRST_RANK} to {LAST_RANK}, {measured}"),
        ("uniformity", "Uniformity", uniformity(chosen), f"less is more spread, {measured}"),
        ("alignment", "Alignment", alignment(features), f"squared distance of {pairs}, {inputs.features()}"),
        ("teacher_entropy", "Teacher entropy", entropy, f"mean over views, {of_teacher}"),
        ("marginal_entropy", "Teacher entropy of mean", marginal, f"0 is collapsed, {of_teacher}"),
    ]
    of_views = f"cosine, {inputs.features()}, {pairs}: the other view of the image among those of all"
    return [
        percent_number("view_rank1", "View Rank-1", view_rank1(features), of_views, config.seed),
        *(Number(key, title, value, protocol, unit="") for key, title, value, protocol in numbers if value is not None),
    ]


def rank_correlations(history: list[dict[str, float]], of: str) -> dict[str, float]:
    """Spearman's rho of each label-free number with a labelled one over checkpoints.

    Args:
        history: metrics of each checkpoint; those without both numbers do not count.
        of: key of the labelled number.

    Returns:
        Key -> rho in -1..1, of every number that has FEWEST_STEPS checkpoints and is not the same in all.
    """
    found = {}
    for key in KEYS:
        pairs = [(metrics[key], metrics[of]) for metrics in history if key in metrics and of in metrics]
        columns = list(zip(*pairs, strict=True))
        if len(pairs) >= FEWEST_STEPS and all(len(set(column)) > 1 for column in columns):
            from scipy import stats  # imported here: half a second of every start, and few need it

            found[key] = float(stats.spearmanr(*columns).statistic)
    return found


def agreement(history: list[Metrics], of: str) -> str | None:
    """How well the label-free numbers order the evaluated steps of a run, in one line; None where there are too few.

    Args:
        history: of every evaluated step.
        of: key of a labelled number.
    """
    correlations = rank_correlations([metrics.values() for metrics in history], of)
    if not correlations:
        return None
    numbers = ", ".join(f"{key} {rho:+.2f}" for key, rho in correlations.items())
    return f"rank correlation (Spearman) with {of} over the evaluated steps: {numbers}"
