"""Measures a finished run of `benchmarks.quality`; the numbers are kept in its work directory as `quality.json`.

Features are pools of the teacher's tokens, each of unit norm, or several concatenated. The one that a row is measured with is
chosen by leave-one-out weighted k-NN on the training images, mean over seeds. The test images are measured with that one
alone, for the trained teacher and for the same network before training.
"""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality_plan import Run, pools
from cmd_jax import files
from cmd_jax.config import ConfigDict, has_class_token, token_px
from cmd_jax.evaluation import logistic
from cmd_jax.evaluation.clustering import assigned, kmeans
from cmd_jax.evaluation.disjoint_retrieval import recalls, second_half
from cmd_jax.evaluation.features import Features, extract_features
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.evaluation.pointing import pointing
from cmd_jax.evaluation.protocol import Neighbours
from cmd_jax.evaluation.retrieval import retrieval
from cmd_jax.evaluation.splits import Splits
from cmd_jax.inference.patches import read_patches
from cmd_jax.inference.run import Encoder, widths
from cmd_jax.models.build import Params
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.run import build_run, with_weights
from cmd_jax.training.sharding import all_hardware, data_parallel
from cmd_jax.weights.transfer import initial_weights

K = 20
IMAGES_AT_ONCE = 256
# The patch weights that a method points with; others: MIL weights.
MAPS = {"dino": "attention", "ibot": "attention", "esvit": "similarity"}
VERSION = 4  # of quality.json; raise it where a key is new or changes its meaning


def candidates(config: ConfigDict) -> tuple[str, ...]:
    """Features to choose from, as `eval.features` names them."""
    if not has_class_token(config):
        return ("mean", "mil", "mean+mil")
    return ("cls", "mean", "mil", "cls+mean", "cls+mil", "cls+mean+mil")


def concatenated(pools: dict[str, np.ndarray], feature: str) -> np.ndarray:
    """[N, D] of unit norm by pool -> [N, sum of D] of unit norm."""
    names = feature.split("+")
    return np.concatenate([pools[name] for name in names], axis=1) / np.sqrt(len(names)).astype(np.float32)


def leave_one_out(features: np.ndarray, labels: np.ndarray, k: int, temp: float, classes: int) -> float:
    """Top-1 of weighted k-NN in percent, each image among all others.

    Args:
        features: [N, F], l2-normalised; N is at least 2.
        labels: [N] int.
        k: number of neighbours; at most N - 1 are used.
        temp: temperature of the votes.
        classes: number of classes.
    """
    k = min(k, len(features) - 1)
    similarity, index = nearest(features, features, k + 1)
    itself = index == np.arange(len(index))[:, None]
    itself[:, -1] |= ~itself.any(axis=1)  # of more than k equal images, leave out the last instead
    others = Neighbours(*(array[~itself].reshape(-1, k) for array in (similarity, index)))
    return knn_classify(others, labels, labels, k=k, temp=temp, classes=classes).top1


def choose(selections: Sequence[dict[str, float]]) -> str:
    """The feature with the best mean over seeds; of equal ones the one with fewer pools."""
    means = {name: float(np.mean([selection[name] for selection in selections])) for name in selections[0]}
    return max(means, key=lambda name: (means[name], -name.count("+")))


def similarity_to_mean(tokens: np.ndarray) -> np.ndarray:
    """Cosine of each patch with the image's mean patch, above the smallest one: [N, P, D] -> [N, P]."""
    mean = tokens.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(mean, axis=-1)
    cosine = np.sum(tokens * mean, axis=-1) / np.maximum(norms, 1e-12)
    return cosine - cosine.min(axis=1, keepdims=True)


class _Teacher(NamedTuple):
    """Features of a teacher.

    Attributes:
        params: on every device.
        train: pools of the training images, [N, D] by name.
        test: pools of the test images.
        labels: [N] of the training images.
        queries: the test images, all pools concatenated.
    """

    params: Params
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    labels: np.ndarray
    queries: Features


class Measurement:
    """Numbers of a finished run, read from `quality.json` or measured and written there.

    Args:
        run: finished.
        splits: labelled images to measure on.
    """

    def __init__(self, run: Run, splits: Splits):
        self._run, self._splits = run, splits
        self._path = os.path.join(run.workdir, "quality.json")
        of = {"version": VERSION, "step": run.steps, "train_images": len(splits.train), "test_images": len(splits.test)}
        stored = json.loads(files.read(self._path)) if files.exists(self._path) else {}
        self._numbers: dict[str, Any] = stored if stored.get("of") == of else {"of": of, "tests": {}}
        self._config = run.config.copy_and_resolve_references()
        self._config.eval.features = "+".join(pools(run.config))
        self._classes = len(splits.train.class_names)
        self.map = MAPS.get(run.config.method.name, "mil")
        if self.map == "attention" and not has_class_token(run.config):
            self.map = "similarity"

    def selection(self) -> dict[str, float]:
        """Leave-one-out k-NN top-1 on the training images in percent, by feature."""
        if "selection" not in self._numbers:
            teacher, temp = self._teachers["trained"], self._config.eval.knn_temp
            self._numbers["selection"] = {
                name: leave_one_out(concatenated(teacher.train, name), teacher.labels, K, temp, self._classes)
                for name in candidates(self._config)
            }
            self._write()
        return self._numbers["selection"]

    def tests(self, feature: str) -> dict[str, dict[str, float | None]]:
        """Percentages on the test images by "start" and "trained", then by column.

        "pointing" and "pointing_chance" are None without part boxes, the former also where all patches have equal weights.
        """
        tests = self._numbers["tests"]
        if feature not in tests:
            tests[feature] = {name: self._test(teacher, feature) for name, teacher in self._teachers.items()}
            self._write()
        return tests[feature]

    def _write(self) -> None:
        files.write(self._path, json.dumps(self._numbers) + "\n")

    @functools.cached_property
    def _teachers(self) -> dict[str, _Teacher]:
        run, config = self._run, self._config
        built = build_run(run.config, range(run.images), all_hardware())  # of a source only the length counts
        checkpoints = Checkpoints(run.workdir, read_only=True)
        try:
            trained = checkpoints.read_network("teacher", run.steps)[1]
        finally:
            checkpoints.close()
        self._network = built.network
        width = widths(config, trained)["patch_tokens"][-1]
        replicated = data_parallel(jax.local_devices()).replicated

        def encode(teacher: Params) -> _Teacher:
            params = jax.device_put(teacher, replicated)
            encoder = Encoder(config, built.network.backbone, params)
            train, test = (extract_features(encoder, split) for split in self._splits)
            return _Teacher(params, self._pools(train.features, width), self._pools(test.features, width), train.labels, test)

        weights = initial_weights(run.config, built.network).arrays if run.config.init.weights else {}
        start = with_weights(built.first_state(), weights)
        return {"start": encode(start.teacher), "trained": encode(trained)}

    def _pools(self, features: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Splits concatenated features into pools of unit norm: each as wide as a token, the last (MIL) a bag of all heads."""
        names = pools(self._config)
        parts = np.split(features, [width * number for number in range(1, len(names))], axis=1)
        return {name: part * np.sqrt(len(names)).astype(np.float32) for name, part in zip(names, parts, strict=True)}

    def _test(self, teacher: _Teacher, feature: str) -> dict[str, float | None]:
        train, test = concatenated(teacher.train, feature), concatenated(teacher.test, feature)
        labels, wanted, config = teacher.labels, teacher.queries.labels, self._config
        predicted, _ = logistic.fit_predict(train, labels, test, config.seed)
        neighbours, temp = nearest(train, test, K), config.eval.knn_temp
        ranked = retrieval(train, labels, test, wanted)
        images, classes = np.concatenate([train, test]), np.concatenate([labels, wanted])
        disjoint = second_half(classes, self._classes)
        numbers: dict[str, float | None] = {
            "linear": 100 * float(np.mean(predicted == wanted)),
            "knn": knn_classify(neighbours, labels, wanted, k=K, temp=temp, classes=self._classes).top1,
            "rank1": ranked.rank1,
            "map": ranked.map_full,
            "disjoint_recall1": 100 * float(np.mean(recalls(images[disjoint], classes[disjoint])[:, 0])),
            "cluster_accuracy": 100 * float(np.mean(assigned(kmeans(test, len(np.unique(wanted)), config.seed), wanted))),
            "pointing": None,
            "pointing_chance": None,
        }
        boxes = teacher.queries.boxes
        if np.any(boxes[..., 2:] > boxes[..., :2]):
            weights = self._patch_weights(teacher)
            found = pointing(weights, boxes, token_px(config) / config.eval.crop_px)
            equal = float(np.ptp(weights, axis=1).max()) < 1e-6
            numbers |= {"pointing": None if equal else found.accuracy, "pointing_chance": found.chance}
        return numbers

    def _patch_weights(self, teacher: _Teacher) -> np.ndarray:
        """[test images, P]: the weights by which the method points at patches."""
        if self.map == "mil":
            return teacher.queries.mil_weights
        encoder = Encoder(self._run.config, self._network.backbone, teacher.params)
        weights, images = [], len(teacher.queries.labels)
        for start in range(0, images, IMAGES_AT_ONCE):
            rows = teacher.queries.indices[start : start + IMAGES_AT_ONCE]
            patches = read_patches(encoder, self._splits.test, rows)
            weights.append(patches.attention if self.map == "attention" else similarity_to_mean(patches.tokens))
        return np.concatenate(weights)
