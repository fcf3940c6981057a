"""The fast linear probe: logistic regression on frozen features, regularised by cross-validation on the training images.

The same problem as scikit-learn's `LogisticRegression` on standardised features, solved by L-BFGS on the devices: with the
rows split over them, in float32. It takes seconds where the references' probe (`linear.py`) passes over all images a hundred
times; it sees the centre crops alone.

L-BFGS takes few iterations because it works along the principal axes of the features, each scaled by the curvature that the
objective has there when all classes are equally likely.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from cmd_jax.evaluation.devices import everywhere, padded, place
from cmd_jax.evaluation.protocol import Cost, EvalInputs, percent_number
from cmd_jax.evaluation.splits import order_within_class
from cmd_jax.metrics import Number

Array = jax.Array

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C: the loss is C times the sum over images, plus half the squared norm of the weights
FOLDS = 3
FITS = FOLDS * len(STRENGTHS) + 1
MAX_ITERATIONS = 100
TOLERANCE = 1e-6  # nats an image: about how far above its minimum the objective may end
ROWS_UNIT = 2048  # rows are padded to a multiple: folds and fractions share a program
TYPICAL_PASSES = 30  # over the rows, in one fit
HIDDEN = -1e30  # logit of a class without training images


class Rows(NamedTuple):
    """Rows as a fit reads them.

    Attributes:
        features: [N, F] float32, standardised by the rows that count, along the principal axes.
        spread: [F] float32, sum of squares of each column over the rows that count.
        labels: [N] int32 in 0..C-1.
        weights: [N] float32, 1 where a row counts, else 0.
    """

    features: Array
    spread: Array
    labels: Array
    weights: Array


class LinearModel(NamedTuple):
    """Weights [F, C] and bias [C] of a linear classifier, float32."""

    kernel: Array
    bias: Array

    def logits(self, features: Array) -> Array:
        """[N, F] -> [N, C]."""
        return features @ self.kernel + self.bias


class Scaler(NamedTuple):
    """Mean and deviation of each feature, [F] float32."""

    mean: Array
    deviation: Array

    def __call__(self, features: Array) -> Array:
        """[N, F] -> [N, F] of mean 0 and variance 1; a constant feature is only centered."""
        return (features - self.mean) / self.deviation


def scaler_of(features: Array, weights: Array) -> Scaler:
    """Of [N, F] rows with weights [N] of 0 or 1."""
    count = jnp.maximum(1.0, jnp.sum(weights))
    mean = weights @ features / count
    deviation = jnp.sqrt(weights @ jnp.square(features - mean) / count)
    constant = deviation <= 1e-6 * jnp.abs(mean)  # the rounding of equal numbers' mean
    return Scaler(mean, jnp.where(constant, 1.0, deviation))


def second_moments(features: Array, weights: Array) -> Array:
    """Correlations of the features times the number of rows that count: [N, F], [N] -> [F, F]."""
    scaled = scaler_of(features, weights)(features)
    return scaled.T @ (weights[:, None] * scaled)


def prepare(features: Array, axes: Array, labels: Array, weights: Array) -> tuple[Rows, Scaler]:
    """Standardises rows [N, F] by those of weight 1 and turns them into the orthogonal axes [F, F]."""
    scaler = scaler_of(features, weights)
    turned = scaler(features) @ axes
    return Rows(turned, weights @ jnp.square(turned), labels, weights), scaler


def fit(rows: Rows, strength: Array, model: LinearModel) -> tuple[LinearModel, Array]:
    """Minimises the regularised cross-entropy over the rows that count.

    As in scikit-learn the bias is free, classes without rows take no part, and two classes are one logistic function, whose
    weights are the difference of those here: their squared norms count twice.

    Args:
        rows: to learn from; those of weight 0 are only classified.
        strength: C [].
        model: where to start.

    Returns:
        The minimum and the predicted classes of all rows, [N] int32.
    """
    count = jnp.maximum(1.0, jnp.sum(rows.weights))
    chosen = jax.nn.one_hot(rows.labels, len(model.bias))
    present = rows.weights @ chosen > 0
    classes = jnp.maximum(1, jnp.sum(present))
    decay = jnp.where(classes == 2, 2.0, 1.0) / strength
    scale = LinearModel(jax.lax.rsqrt(rows.spread / classes + decay)[:, None], jnp.sqrt(classes / count))
    original = lambda scaled: LinearModel(*(part * by for part, by in zip(scaled, scale, strict=True)))
    logits_of = lambda model: jnp.where(present, model.logits(rows.features), HIDDEN)

    def objective(scaled: LinearModel) -> Array:
        model = original(scaled)
        logits = logits_of(model)
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.sum(chosen * logits, axis=1)
        losses = jnp.where(rows.weights > 0, losses, 0.0)
        return jnp.sum(losses) + decay / 2 * jnp.sum(jnp.square(model.kernel))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)
    start = LinearModel(*(part / by for part, by in zip(model, scale, strict=True)))

    def goes_on(carry: tuple[LinearModel, optax.OptState, Array, Array]) -> Array:
        *_, iteration, gradient = carry
        # The scaled curvature is about one, so half the squared gradient is the distance to the minimum.
        return (iteration < MAX_ITERATIONS) & (gradient > 2 * TOLERANCE * count)

    def improve(carry: tuple[LinearModel, optax.OptState, Array, Array]) -> tuple:
        scaled, state, iteration, _ = carry
        value, gradient = value_and_grad(scaled, state=state)
        updates, state = solver.update(gradient, state, scaled, value=value, grad=gradient, value_fn=objective)
        squared = optax.tree.norm(optax.tree.get(state, "grad"), squared=True)
        return optax.apply_updates(scaled, updates), state, iteration + 1, squared

    scaled, *_ = jax.lax.while_loop(goes_on, improve, (start, solver.init(start), jnp.int32(0), jnp.float32(jnp.inf)))
    model = original(scaled)
    return model, jnp.argmax(logits_of(model), axis=1)


def classify(features: Array, scaler: Scaler, axes: Array, model: LinearModel) -> Array:
    """The most likely class of each row, [N, F] -> [N] int32."""
    return jnp.argmax(model.logits(scaler(features) @ axes), axis=1)


class Programs(NamedTuple):
    """The functions above, compiled for rows that are split over all devices; results but for the rows are on each of them."""

    second_moments: Callable
    prepare: Callable
    fit: Callable
    classify: Callable


@functools.cache
def programs() -> Programs:
    """Compiled once a process and shape."""
    whole, split = everywhere().replicated, everywhere().batch

    def compiled(function: Callable, shardings: object = whole) -> Callable:
        def precise(*arguments: object) -> object:
            with jax.default_matmul_precision("highest"):
                return function(*arguments)

        return jax.jit(precise, out_shardings=shardings)

    return Programs(
        compiled(second_moments),
        compiled(prepare, (Rows(split, whole, split, split), whole)),
        compiled(fit),
        compiled(classify),
    )


def fit_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    seed: int,
    poll: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Chooses C by stratified cross-validation on the training images, and fits once more on all of them.

    Args:
        train: [N, F] float; N is at least 1.
        labels: [N] int.
        test: [Q, F] float.
        seed: of the folds.
        poll: called before every fit, FITS times.

    Returns:
        Predicted classes [Q] int, and the chosen C.
    """
    folds = order_within_class(labels, seed) % FOLDS
    names, classes = np.unique(labels, return_inverse=True)
    run, whole = programs(), everywhere().replicated
    features, truth = (_on_devices(array) for array in (train.astype(np.float32), classes.astype(np.int32)))
    every = np.ones(len(labels), np.float32)
    axes = place(_principal_axes(np.asarray(run.second_moments(features, _on_devices(every)))), whole)
    zero = place(np.zeros((train.shape[1], len(names)), np.float32), whole), place(np.zeros(len(names), np.float32), whole)
    right = np.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        held = folds == fold  # empty in the last folds where every class has fewer images than there are folds
        rows, _ = run.prepare(features, axes, truth, _on_devices(np.where(held, np.float32(0), every)))
        model = LinearModel(*zero)
        for index, strength in enumerate(STRENGTHS):  # ascending, each from the last one's minimum
            poll()
            model, found = run.fit(rows, np.float32(strength), model)
            right[index] += np.sum(np.asarray(found)[: len(labels)][held] == classes[held])
    best = STRENGTHS[int(np.argmax(right))]  # the most regularised of equals
    poll()
    rows, scaler = run.prepare(features, axes, truth, _on_devices(every))
    model, _ = run.fit(rows, np.float32(best), LinearModel(*zero))
    if not len(test):
        return np.zeros(0, labels.dtype), best
    found = run.classify(_on_devices(test.astype(np.float32)), scaler, axes, model)
    return names[np.asarray(found)[: len(test)]], best


def _on_devices(rows: np.ndarray) -> Array:
    """Rows that every process has, padded by zeros and split over all devices."""
    devices = jax.device_count()
    unit = -(-ROWS_UNIT // devices) * devices
    return place(padded(rows, -(-len(rows) // unit) * unit), everywhere().batch)


def _principal_axes(moments: np.ndarray) -> np.ndarray:
    """Eigenvectors of [F, F], in columns; those of the first process, since the last bits depend on the processor."""
    axes = np.linalg.eigh(moments)[1]
    return axes if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(axes))


def _cost(inputs: EvalInputs, images: list[int]) -> Cost:
    """Of `fit_predict` for some numbers of training images."""
    width, classes = inputs.gallery.features.shape[1], inputs.classes()
    fits = FITS * len(images)
    text = f"{fits} fits of {', '.join(f'{count:,}' for count in images)} x {width:,} features, {classes:,} classes"
    return Cost(text, fits, "fits", 4.0 * FITS * TYPICAL_PASSES * sum(images) * width * classes)


def fraction_of(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a fraction of every class, at least one image: [N] int labels -> [N] bool."""
    _, of_class, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return order_within_class(labels, seed) < np.maximum(1, np.round(fraction * sizes))[of_class]


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`."""
    return _cost(inputs, [len(inputs.gallery.labels)])


def cost_of_fractions(inputs: EvalInputs) -> Cost:
    """Of `measure_fractions`."""
    images = len(inputs.gallery.labels)
    return _cost(inputs, [round(fraction * images) for fraction in inputs.config.eval.fractions])


def measure(inputs: EvalInputs) -> list[Number]:
    """Top-1 with the labels of all training images."""
    return [_number(inputs, np.ones(len(inputs.gallery.labels), bool), "logistic_top1", "Logistic top-1", "")]


def measure_fractions(inputs: EvalInputs) -> list[Number]:
    """Top-1 with the labels of some training images, `eval.fractions` of every class, drawn from the seed."""
    labels, seed, found = inputs.gallery.labels, inputs.config.seed, []
    for fraction in inputs.config.eval.fractions:
        percent = f"{100 * fraction:g}"
        key, title = f"fraction{percent.replace('.', '_')}_top1", f"Logistic top-1, {percent} %"
        found.append(_number(inputs, fraction_of(labels, fraction, seed), key, title, f"{percent} % of each class's labels: "))
    return found


def _number(inputs: EvalInputs, chosen: np.ndarray, key: str, title: str, prefix: str) -> Number:
    gallery, queries, seed = inputs.gallery, inputs.queries, inputs.config.seed
    train = gallery.features[chosen], gallery.labels[chosen]
    predictions, strength = fit_predict(*train, queries.features, seed, inputs.poll)
    protocol = (
        f"logistic regression, C={strength:g} by {FOLDS}-fold cross-validation, standardised {inputs.features()}, "
        f"{len(queries.labels):,} test, {prefix}{int(chosen.sum()):,} train images"
    )
    return percent_number(key, title, predictions == queries.labels, protocol, seed)
