"""The protocols of an evaluation on the devices against NumPy and scikit-learn on the host: time and numbers.

    python -m benchmarks.evaluation

Both forms get the same random features: classes of Gaussians with a decaying spectrum, of unit norm. The host's k-NN computes
the similarities anew for every k, its retrieval sorts with NumPy, and its logistic regression is scikit-learn's
`LogisticRegression` with the same folds and values of C. They take turns in one process; seconds are wall-clock seconds, the
median of the rounds, after a first call each, whose seconds (compilation, imports) are in `first_s`. The last line is a JSON
object; its ratios are devices / host, smaller is better.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

from cmd_jax.evaluation import logistic, retrieval
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.evaluation.splits import order_within_class

TEMP = 0.07
ROWS_AT_ONCE = 1024


def features(args: argparse.Namespace, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features [N, F] and labels [N], test features [Q, F] and labels [Q]."""
    rng, count = np.random.default_rng(args.seed), args.train + args.test
    labels = rng.permutation(np.arange(count) % args.classes)
    centers = args.separation * rng.normal(size=(args.classes, width))
    latent = (centers[labels] + rng.normal(size=(count, width))) * np.arange(1, width + 1) ** (-args.decay / 2)
    rows = latent @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows[: args.train], labels[: args.train], rows[args.train :], labels[args.train :]


def knn_on_devices(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray, ks: list[int]) -> list[float]:
    """Top-1 in percent for every k."""
    neighbours, classes = nearest(train, test, max(ks)), int(labels.max()) + 1
    return [knn_classify(neighbours, labels, wanted, k=k, temp=TEMP, classes=classes).top1 for k in ks]


def knn_on_host(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray, ks: list[int]) -> list[float]:
    found = []
    for k in ks:
        votes = np.zeros((len(test), int(labels.max()) + 1))
        for start in range(0, len(test), ROWS_AT_ONCE):
            similarity = test[start : start + ROWS_AT_ONCE] @ train.T
            near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
            weight = np.exp(np.take_along_axis(similarity, near, axis=1).astype(np.float64) / TEMP)
            row = np.arange(start, start + len(similarity))[:, None]
            np.add.at(votes, (np.broadcast_to(row, near.shape), labels[near]), weight)
        found.append(100 * float(np.mean(np.argsort(-votes, axis=1, kind="stable")[:, 0] == wanted)))
    return found


def retrieval_on_devices(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Rank-1 and mAP in percent."""
    found = retrieval.retrieval(train, labels, test, wanted)
    return [found.rank1, found.map_full]


def retrieval_on_host(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> list[float]:
    first, precision = [], []
    for start in range(0, len(test), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        relevant = labels[np.argsort(-(test[rows] @ train.T), axis=1, kind="stable")] == wanted[rows, None]
        hits = np.cumsum(relevant, axis=1)
        of_rank = hits / np.arange(1, len(labels) + 1)
        precision.append(np.sum(of_rank * relevant, axis=1) / np.maximum(1, hits[:, -1]))
        first.append(relevant[:, 0])
    return [100 * float(np.mean(np.concatenate(parts))) for parts in (first, precision)]


def logistic_on_devices(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Top-1 in percent."""
    return [100 * float(np.mean(logistic.fit_predict(train, labels, test, 0)[0] == wanted))]


def logistic_on_host(train: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> list[float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def predictions(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strengths: tuple[float, ...]) -> list[np.ndarray]:
        scaler, model = StandardScaler().fit(train), LogisticRegression(max_iter=200, tol=1e-3, warm_start=True)
        found = []
        for strength in strengths:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=strength).fit(scaler.transform(train), labels)
            found.append(model.predict(scaler.transform(test)))
        return found

    folds, right = order_within_class(labels, 0) % logistic.FOLDS, np.zeros(len(logistic.STRENGTHS))
    for fold in range(logistic.FOLDS):
        held = folds == fold
        found = predictions(train[~held], labels[~held], train[held], logistic.STRENGTHS)
        right += np.sum(np.stack(found) == labels[held], axis=1)
    best = logistic.STRENGTHS[int(np.argmax(right))]
    return [100 * float(np.mean(predictions(train, labels, test, (best,))[0] == wanted))]


FORMS: dict[str, tuple[Callable, Callable]] = {
    "knn": (knn_on_devices, knn_on_host),
    "retrieval": (retrieval_on_devices, retrieval_on_host),
    "logistic": (logistic_on_devices, logistic_on_host),
}


def measure(name: str, problem: tuple, args: argparse.Namespace) -> dict:
    """Figures of one protocol: numbers, first and median seconds of both forms, and the ratio of the latter."""
    extra = ([k for k in args.knn_k if k <= args.train],) if name == "knn" else ()
    numbers: dict[str, list[float]] = {}
    first_s: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"devices": [], "host": []}
    for number in range(1 + args.rounds):
        for form, function in zip(seconds, FORMS[name], strict=True):
            started = time.perf_counter()
            numbers[form] = function(*problem, *extra)
            took = time.perf_counter() - started
            if number:
                seconds[form].append(took)
            else:
                first_s[form] = took
    median = {form: statistics.median(of_form) for form, of_form in seconds.items()}
    return {"numbers": numbers, "first_s": first_s, "seconds": median, "ratio": median["devices"] / median["host"]}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--protocols", nargs="+", choices=list(FORMS), default=list(FORMS), help="(%(default)s)")
    add("--train", type=int, default=1547, help="training images (%(default)s)")
    add("--test", type=int, default=1496, help="test images (%(default)s)")
    add("--widths", type=int, nargs="+", default=[576, 1536], help="numbers in a feature (%(default)s)")
    add("--classes", type=int, default=100, help="(%(default)s)")
    add("--decay", type=float, default=1.0, help="of the spectrum: variance rank^-decay (%(default)s)")
    add("--separation", type=float, default=0.25, help="of the classes, in deviations (%(default)s)")
    add("--knn_k", type=int, nargs="+", default=[10, 20, 100, 200], help="(%(default)s)")
    add("--rounds", type=int, default=3, help="timed calls of each form (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    cases = []
    for width in args.widths:
        problem = features(args, width)
        for name in args.protocols:
            cases.append({"protocol": name, "width": width, **measure(name, problem, args)})
            print(json.dumps(cases[-1]), flush=True)
    sizes = {"train": args.train, "test": args.test, "classes": args.classes}
    ratios = {f"{case['protocol']}_{case['width']}": round(case["ratio"], 3) for case in cases}
    device = jax.devices()[0]
    print(json.dumps({"ratios": ratios, **sizes, "device": f"{jax.device_count()} x {device.device_kind}", "cases": cases}))


if __name__ == "__main__":
    main()
