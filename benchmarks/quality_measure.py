"""What a finished run of `benchmarks.quality` is worth, kept in its directory as `quality.json`.

Features are pools of the teacher's tokens, each of unit norm, or several joined. Which one a row is measured with is decided
without test images: leave-one-out weighted k-NN on the training images, mean over the seeds. What is measured on the test
images is then measured with that one alone, of the trained teacher and of the same network before training.
"""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality_jobs import seconds_per_step
from benchmarks.quality_plan import Run, pools
from cmd_jax import files
from cmd_jax.config import ConfigDict, is_swin, token_px
from cmd_jax.evaluation import logistic
from cmd_jax.evaluation.features import Features, extract_features, make_extractor
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.evaluation.patches import inspect_patches, make_inspector
from cmd_jax.evaluation.pointing import pointing
from cmd_jax.evaluation.retrieval import retrieval
from cmd_jax.evaluation.splits import Splits
from cmd_jax.inference.encode import widths
from cmd_jax.models.build import Params
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.run import build_run
from cmd_jax.training.sharding import all_hardware, data_parallel

K = 20
ROWS_AT_ONCE = 1024
IMAGES_AT_ONCE = 256
STATES = ("start", "trained")
LOOKS = {"dino": "attention", "esvit": "similarity"}  # where a method looks; the others by their MIL weights
VERSION = 3  # of quality.json; raise it where the same key gets another meaning


def candidates(config: ConfigDict) -> tuple[str, ...]:
    """Features that are tried, as `eval.features` names them."""
    return ("mean", "mil", "mean+mil") if is_swin(config) else ("cls", "mean", "mil", "cls+mean", "cls+mil", "cls+mean+mil")


def joined(parts: dict[str, np.ndarray], feature: str) -> np.ndarray:
    """A feature of its pools: [N, D] of unit norm each -> [N, D * pools] of unit norm."""
    names = feature.split("+")
    return np.concatenate([parts[name] for name in names], axis=1) / np.sqrt(len(names)).astype(np.float32)


def leave_one_out(features: np.ndarray, labels: np.ndarray, k: int, temp: float, classes: int) -> float:
    """Top-1 of weighted k-NN in percent, each image among all the others.

    Args:
        features: [N, F], l2-normalised; N is at least 2.
        labels: [N] int.
        k: number of neighbours; at most N - 1.
        temp: temperature of the votes.
        classes: number of classes.
    """
    k, right = min(k, len(features) - 1), 0
    for start in range(0, len(features), ROWS_AT_ONCE):
        similarity = features[start : start + ROWS_AT_ONCE] @ features.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        votes = np.zeros((len(rows), classes))
        weight = np.exp(np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) / temp)
        np.add.at(votes, (np.broadcast_to(rows[:, None], nearest.shape), labels[nearest]), weight)
        right += int(np.sum(np.argmax(votes, axis=1) == labels[start : start + ROWS_AT_ONCE]))
    return 100 * right / len(features)


def choose(selections: Sequence[dict[str, float]]) -> str:
    """The feature with the best mean over seeds; of equals the one with fewer pools."""
    means = {name: float(np.mean([of_seed[name] for of_seed in selections])) for name in selections[0]}
    return max(means, key=lambda name: (means[name], -name.count("+")))


def similarity(tokens: np.ndarray) -> np.ndarray:
    """How much each patch is like the mean of its image: [N, P, D] -> [N, P], from 0, sums to 1 over P unless all are alike."""
    mean = tokens.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(mean, axis=-1)
    cosine = np.sum(tokens * mean, axis=-1) / np.maximum(norms, 1e-12)
    above = cosine - cosine.min(axis=1, keepdims=True)
    return above / np.maximum(above.sum(axis=1, keepdims=True), 1e-12)


class _State(NamedTuple):
    """A teacher's features of both splits.

    Attributes:
        params: of the teacher, on every device.
        train: pools of the training images, [N, D] by name.
        test: of the test images.
        gallery: labels of the former.
        queries: the test images as extracted, all pools joined.
    """

    params: Params
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    gallery: np.ndarray
    queries: Features


class Measurement:
    """Numbers of a finished run: read from its `quality.json`, or measured and written there.

    Args:
        run: finished.
        splits: images to measure on, labelled.
        shown: rows of the test split that pictures show.
    """

    def __init__(self, run: Run, splits: Splits, shown: Sequence[int]):
        self._run, self._splits, self._shown = run, splits, [int(row) for row in shown]
        self._path = os.path.join(run.workdir, "quality.json")
        of = {"version": VERSION, "step": run.steps, "train_images": len(splits.train), "test_images": len(splits.test)}
        stored = json.loads(files.read(self._path)) if files.exists(self._path) else {}
        self._numbers: dict[str, Any] = stored if stored.get("of") == of else {"of": of}
        self._config = run.config.copy_and_resolve_references()
        self._config.eval.features = "+".join(pools(run.config))
        self.looks = LOOKS.get(run.config.method.name, "mil")
        if self.looks == "attention" and is_swin(run.config):
            self.looks = "similarity"

    def selection(self) -> dict[str, float]:
        """Leave-one-out k-NN top-1 on the training images in percent, of every candidate."""
        if "selection" not in self._numbers:
            state = self._states["trained"]
            count = len(self._splits.train.class_names)
            self._keep(
                selection={
                    name: leave_one_out(joined(state.train, name), state.gallery, K, self._config.eval.knn_temp, count)
                    for name in candidates(self._config)
                }
            )
        return self._numbers["selection"]

    def tests(self, feature: str) -> dict[str, dict[str, float | None]]:
        """Numbers on the test images with a feature, in percent: by "start" and "trained", then by name.

        "pointing" and "pointing_chance" are None without part boxes, the former too where all patches weigh the same.
        """
        kept = self._numbers.setdefault("tests", {})
        if feature not in kept:
            kept[feature] = {name: self._test(state, feature) for name, state in self._states.items()}
            self._keep()
        return kept[feature]

    def maps(self) -> list[list[float]]:
        """Where the trained teacher looks in the images shown: for each the weights of its patches, row-major."""
        if self._numbers.get("shown") != self._shown:
            looks = self._look(self._states["trained"], self._shown)
            self._keep(shown=self._shown, maps=np.round(looks.astype(float), 6).tolist())
        return self._numbers["maps"]

    def seconds_per_step(self) -> float | None:
        """Of training, without evaluations; None where the log does not tell."""
        return seconds_per_step(self._run.log)

    def close(self) -> None:
        """Forgets features and parameters; what was measured stays."""
        self.__dict__.pop("_states", None)

    def _keep(self, **values: Any) -> None:
        self._numbers |= values
        files.write(self._path, json.dumps(self._numbers) + "\n")

    @functools.cached_property
    def _states(self) -> dict[str, _State]:
        run, config, splits = self._run, self._config, self._splits
        built = build_run(run.config, range(run.images), all_hardware())  # in place of a source: its length alone counts
        checkpoints = Checkpoints(run.workdir, read_only=True)
        try:
            trained = checkpoints.read_network("teacher", run.steps)[1]
        finally:
            checkpoints.close()
        self._network = built.network
        extract = make_extractor(config, built.network)
        width = widths(config, trained)["patch_tokens"][-1]
        everywhere = data_parallel(jax.local_devices()).replicated

        def state(teacher: Params) -> _State:
            params = jax.device_put(teacher, everywhere)
            of_splits = [extract_features(extract, params, split, config) for split in splits]
            train, test = (dict(zip(pools(config), self._parts(found.features, width), strict=True)) for found in of_splits)
            return _State(params, train, test, of_splits[0].labels, of_splits[1])

        return {"start": state(built.first_state().teacher), "trained": state(trained)}

    def _parts(self, features: np.ndarray, width: int) -> list[np.ndarray]:
        """The pools of joined features, of unit norm again: as wide as a token, but for the last, a bag of one head or more."""
        count = len(pools(self._config))
        parts = np.split(features, [width * number for number in range(1, count)], axis=1)
        return [part * np.sqrt(count).astype(np.float32) for part in parts]

    def _test(self, state: _State, feature: str) -> dict[str, float | None]:
        train, test = joined(state.train, feature), joined(state.test, feature)
        labels, wanted, config = state.gallery, state.queries.labels, self._config
        classes = len(self._splits.train.class_names)
        predicted, _ = logistic.fit_predict(train, labels, test, config.seed)
        neighbours = nearest(train, test, K)
        voted = knn_classify(neighbours, labels, wanted, k=K, temp=config.eval.knn_temp, classes=classes)
        ranked = retrieval(train, labels, test, wanted)
        numbers: dict[str, float | None] = {
            "linear": 100 * float(np.mean(predicted == wanted)),
            "knn": voted.top1,
            "rank1": ranked.rank1,
            "map": ranked.map_full,
            "pointing": None,
            "pointing_chance": None,
        }
        boxes = state.queries.boxes
        if np.any(boxes[..., 2:] > boxes[..., :2]):
            looks = self._look(state, range(len(wanted)))
            result = pointing(looks, boxes, token_px(config) / config.eval.crop_px)
            alike = float(np.ptp(looks, axis=1).max()) < 1e-6  # no patch is the most weighted one
            numbers |= {"pointing": None if alike else result.accuracy, "pointing_chance": result.chance}
        return numbers

    def _look(self, state: _State, rows: Sequence[int]) -> np.ndarray:
        """[rows, P], at least 0."""
        if self.looks == "mil":
            return state.queries.mil_weights[list(rows)]
        inspect, found = make_inspector(self._run.config, self._network), []
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            part = rows[start : start + IMAGES_AT_ONCE]
            patches = inspect_patches(inspect, state.params, self._splits.test, self._run.config, part)
            found.append(patches.attention if self.looks == "attention" else similarity(patches.tokens))
        return np.concatenate(found)
