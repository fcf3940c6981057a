"""Few-shot classification by the nearest class mean (Snell, Swersky, Zemel, NeurIPS 2017), in episodes of five classes."""

import numpy as np

from cmd_jax.evaluation.features import all_images
from cmd_jax.evaluation.protocol import Cost, EvalInputs
from cmd_jax.metrics import Number
from cmd_jax.training import processes

WAYS = 5
SHOTS = (1, 5)
QUERIES = 15  # a class
EPISODES = 600
EPISODES_AT_ONCE = 100
NORMAL = 1.96  # deviations of a 95 % interval


def draw_episodes(labels: np.ndarray, shots: int, seed: int) -> np.ndarray | None:
    """Draws the images of all episodes, different classes and different images in each.

    Args:
        labels: [N] int.
        shots: labelled images a class.
        seed: of the draws.

    Returns:
        [EPISODES, WAYS, shots + QUERIES] int64 rows; None where fewer than WAYS classes have so many images.
    """
    wanted = shots + QUERIES
    members = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    members = [rows for rows in members if len(rows) >= wanted]
    if len(members) < WAYS:
        return None
    rng = np.random.default_rng((seed, shots))
    episodes = np.empty((EPISODES, WAYS, wanted), np.int64)
    for episode in episodes:
        for way, name in enumerate(rng.choice(len(members), WAYS, replace=False)):
            episode[way] = rng.choice(members[name], wanted, replace=False)
    return episodes


def episode_accuracy(features: np.ndarray, episodes: np.ndarray, shots: int) -> np.ndarray:
    """Share of an episode's queries whose nearest class mean, by cosine, is that of their class.

    Args:
        features: [N, F] l2-normalised.
        episodes: of `draw_episodes`, the labelled images of a class first.
        shots: how many these are.

    Returns:
        [episodes] float64 in 0..1; of equal cosines a wrong one counts.
    """
    found = []
    for start in range(0, len(episodes), EPISODES_AT_ONCE):
        images = features[episodes[start : start + EPISODES_AT_ONCE]]  # [E, ways, shots + queries, F]
        means = images[:, :, :shots].mean(axis=2)
        means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
        queries = images[:, :, shots:].reshape(len(images), -1, images.shape[-1])  # [E, ways * queries, F]
        cosines = np.matmul(queries, means.transpose(0, 2, 1)).reshape(len(images), WAYS, -1, WAYS)
        own = np.eye(WAYS, dtype=bool)[None, :, None]
        right = np.max(cosines, axis=-1, where=own, initial=-2) > np.max(cosines, axis=-1, where=~own, initial=-2)
        found.append(right.mean(axis=(1, 2)))
    return np.concatenate(found)


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`."""
    width = inputs.gallery.features.shape[1]
    work = f"{EPISODES} episodes of {WAYS} classes, with {' and '.join(map(str, SHOTS))} labelled images a class"
    return Cost(work, len(SHOTS), "parts", 2.0 * len(SHOTS) * EPISODES * WAYS * WAYS * QUERIES * width)


def measure(inputs: EvalInputs) -> list[Number]:
    """Mean accuracy over the episodes and its interval; a line says so where there are too few classes or images."""
    features, labels = all_images(inputs.gallery, inputs.queries)
    numbers = []
    for shots in SHOTS:
        inputs.poll()
        episodes = draw_episodes(labels, shots, inputs.config.seed)
        if episodes is None:
            processes.print_once(f"few_shot: no {shots}-shot, which needs {WAYS} classes of {shots + QUERIES} images or more")
            continue
        accuracy = 100 * episode_accuracy(features, episodes, shots)
        mean, half = float(accuracy.mean()), NORMAL * float(accuracy.std(ddof=1)) / EPISODES**0.5
        protocol = (
            f"nearest class mean, cosine, {inputs.features()}, {EPISODES} episodes of {WAYS} classes and {QUERIES} queries a "
            f"class, of {len(labels):,} train and test images; interval over episodes; chance {100 / WAYS:.0f}"
        )
        title = f"{WAYS}-way {shots}-shot"
        numbers.append(Number(f"few_shot{shots}", title, mean, protocol, low=mean - half, high=mean + half))
    return numbers
