"""The fast linear probe: logistic regression on frozen features, regularised by cross-validation on the training images.

With L-BFGS on standardised features (scikit-learn) it takes seconds where the references' probe (`linear.py`) passes over all
images a hundred times; it sees the centre crops alone.
"""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cmd_jax.evaluation.protocol import Row, Subject, percent_row
from cmd_jax.evaluation.splits import order_within_class

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, of features of variance 1
FOLDS = 3
MAX_ITERATIONS = 200
TOLERANCE = 1e-3  # of the gradient; accuracies no longer change below


def fit_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Chooses C by stratified cross-validation on the training images, and fits once more on all of them.

    Args:
        train: [N, F].
        labels: [N] int.
        test: [Q, F].
        seed: of the folds.
        between: called before every fit, a fixed number of times.

    Returns:
        Predicted classes [Q] int, and the chosen C.
    """
    folds = order_within_class(labels, seed) % FOLDS
    right = np.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        held = folds == fold
        for index, strength in enumerate(STRENGTHS):
            between()
            if np.any(held):  # the last folds are empty where every class has fewer images than there are folds
                right[index] += np.sum(_fit(train[~held], labels[~held], train[held], strength) == labels[held])
    best = STRENGTHS[int(np.argmax(right))]  # the most regularised of equals
    between()
    return _fit(train, labels, test, best), best


def _fit(train: np.ndarray, labels: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    if not len(labels) or np.all(labels == labels[0]):  # nothing to tell apart
        return np.full(len(test), labels[0] if len(labels) else -1)
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak regularisation stops at the limit, and loses in the choice
        model.fit(scaler.transform(train), labels)
    return model.predict(scaler.transform(test))


def fraction_of(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a fraction of every class, at least one image: [N] int labels -> [N] bool."""
    _, of_class, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return order_within_class(labels, seed) < np.maximum(1, np.round(fraction * sizes))[of_class]


def rows(subject: Subject) -> list[Row]:
    """Top-1 with the labels of all training images."""
    return [_row(subject, np.ones(len(subject.gallery.labels), bool), "logistic_top1", "Logistic top-1", "")]


def fraction_rows(subject: Subject) -> list[Row]:
    """Top-1 with the labels of some training images, `eval.fractions` of every class, drawn from the seed."""
    labels, seed, found = subject.gallery.labels, subject.config.seed, []
    for fraction in subject.config.eval.fractions:
        percent = f"{100 * fraction:g}"
        key, title = f"fraction{percent.replace('.', '_')}_top1", f"Logistic top-1, {percent} %"
        found.append(_row(subject, fraction_of(labels, fraction, seed), key, title, f"{percent} % of each class's labels: "))
    return found


def _row(subject: Subject, chosen: np.ndarray, key: str, title: str, share: str) -> Row:
    gallery, queries, seed = subject.gallery, subject.queries, subject.config.seed
    train = gallery.features[chosen], gallery.labels[chosen]
    predictions, strength = fit_predict(*train, queries.features, seed, subject.between)
    protocol = (
        f"logistic regression, C={strength:g} by {FOLDS}-fold cross-validation, standardised {subject.features()}, "
        f"{len(queries.labels):,} test, {share}{int(chosen.sum()):,} train images"
    )
    return percent_row(key, title, predictions == queries.labels, protocol, seed)
