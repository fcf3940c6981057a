"""The fast linear probe: logistic regression on frozen features, regularised by cross-validation on the training images.

With L-BFGS on standardised features (scikit-learn) it takes seconds where the references' probe (`linear.py`) passes over all
images a hundred times; it sees the centre crops alone.
"""

import warnings
from collections.abc import Callable

import numpy as np

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
        held = folds == fold  # empty in the last folds where every class has fewer images than there are folds
        found = _predictions(train[~held], labels[~held], train[held], STRENGTHS, between)
        right += np.sum(found == labels[held], axis=1)
    best = STRENGTHS[int(np.argmax(right))]  # the most regularised of equals
    return _predictions(train, labels, test, (best,), between)[0], best


def _predictions(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, strengths: tuple[float, ...], between: Callable[[], None]
) -> np.ndarray:
    """One fit for each C, ascending, each from the last one's solution: [strengths, Q] classes."""
    # Imported here: half a second of every start, and other protocols do without.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    found = np.full((len(strengths), len(test)), labels[0] if len(labels) else -1)
    learns = len(test) > 0 and len(np.unique(labels)) > 1  # else there is nothing to tell apart
    if learns:
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    for index, strength in enumerate(strengths):
        between()
        if learns:
            with warnings.catch_warnings():
                # Weak regularisation stops at the limit, and loses in the choice.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.set_params(C=strength).fit(train, labels)
            found[index] = model.predict(test)
    return found


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
