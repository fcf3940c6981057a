"""The references' linear probe (`eval_linear.py` of DINO and EsViT): one linear layer on a frozen backbone, by SGD.

Crops and flips are drawn anew every epoch. The learning rates are tried side by side: the features of a batch are computed
once, and all classifiers take a step on them. The references report the best epoch on the test images; here the rate is chosen
on training images that are held out, and the last epoch is reported. For that every rate has two classifiers, one that never
sees the held-out images and is judged on them, and one that learns from all images and is tested.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import BOX_NUMBERS, normalize, resized_crop, sample_box
from cmd_jax.data.cache import CanvasCache
from cmd_jax.data.loader import batches, process_slice
from cmd_jax.data.sources import Source, eval_section
from cmd_jax.evaluation.protocol import Cost, EvalInputs, forward_flops, percent_number
from cmd_jax.evaluation.splits import Part, order_within_class
from cmd_jax.inference.preprocess import eval_images
from cmd_jax.inference.run import Encoder, batch_count, gather, joined, last_blocks, once, process_indices
from cmd_jax.metrics import Number
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.training.processes import this_host
from cmd_jax.training.sharding import data_parallel

Array = jax.Array

MOMENTUM = 0.9
CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop
HELD_OUT = 0.2  # of the training images of a class
LR_BATCH_SIZE = 256  # for which learning rates are given
INIT_STD = 0.01
PROBE_KEY = 2**31 - 2  # folded into the seed's key; training folds its steps, which stay below


class Classifiers(NamedTuple):
    """L linear layers: kernel [L, F, C], bias [L, C]."""

    kernel: Array
    bias: Array

    def logits(self, features: Array) -> Array:
        """[B, F] -> [L, B, C]."""
        return jnp.einsum("bf,lfc->lbc", features, self.kernel) + self.bias[:, None]


class Probe(NamedTuple):
    """State of the probe: layers and the momentum of their gradients."""

    layers: Classifiers
    momentum: optax.TraceState


def start(count: int, width: int, classes: int, seed: int) -> Probe:
    """Equal layers, weights from N(0, 0.01^2) and biases 0 as in the references."""
    kernel = INIT_STD * jax.random.normal(jax.random.fold_in(jax.random.key(seed), PROBE_KEY), (width, classes))
    layers = Classifiers(jnp.broadcast_to(kernel, (count, width, classes)), jnp.zeros((count, classes)))
    return Probe(layers, optax.trace(MOMENTUM).init(layers))


def losses(layers: Classifiers, features: Array, labels: Array, weights: Array) -> Array:
    """Cross-entropy of every layer, the mean over the images that it may see.

    Args:
        layers: L of them.
        features: [B, F].
        labels: [B] int.
        weights: [L, B], 0 hides an image from a layer.

    Returns:
        [L] float32, 0 where a layer sees none.
    """
    each = optax.softmax_cross_entropy_with_integer_labels(layers.logits(features), labels[None])
    return jnp.sum(each * weights, axis=1) / jnp.maximum(1.0, jnp.sum(weights, axis=1))


@jax.jit
def step(probe: Probe, features: Array, labels: Array, weights: Array, rates: Array) -> Probe:
    """One step of SGD for all layers, each with its own rate: arguments as in `losses`, rates [L]."""
    gradients = jax.grad(lambda layers: jnp.sum(losses(layers, features, labels, weights)))(probe.layers)
    directions, momentum = optax.trace(MOMENTUM).update(gradients, probe.momentum)
    move = lambda layer, direction: layer - rates.reshape(-1, *[1] * (layer.ndim - 1)) * direction
    return Probe(jax.tree.map(move, probe.layers, directions), momentum)


def training_crop(key: Array, canvas: Array, size: Array, crop_px: int) -> Array:
    """RandomResizedCrop (bilinear) and a flip of one image: [C, C, 3] uint8 -> [crop_px, crop_px, 3] in 0..255."""
    *box, coin = jax.random.uniform(key, (BOX_NUMBERS + 1,))
    box = sample_box(jnp.stack(box), size, CROP_SCALE)
    return resized_crop(canvas, box, coin < 0.5, crop_px, interpolation="bilinear")


@once
def make_training_encoder(config: ConfigDict, network: Network) -> Callable[..., Array]:
    """Builds the jitted function of training images: (params, canvas [B, C, C, 3], size [B, 2], index [B], epoch [B]) ->
    the frozen backbone's last blocks of a random crop of each, [B, F], not normalised."""

    @jax.jit
    def encode(params: Params, canvas: Array, size: Array, index: Array, epoch: Array) -> Array:
        base = jax.random.fold_in(jax.random.key(config.seed), PROBE_KEY)

        def one(canvas: Array, size: Array, index: Array, epoch: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(base, epoch), index)
            return normalize(training_crop(key, canvas, size, config.eval.crop_px), config.data.normalization)

        pixels = jax.vmap(one)(canvas, size, index, epoch)
        return last_blocks(network.apply({"params": params}, pixels).backbone, config.eval.last_blocks)

    return encode


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """A fifth of every class that has two images or more, at least one: [N] int labels -> [N] bool."""
    _, of_class, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    counts = np.where(sizes > 1, np.maximum(1, np.round(HELD_OUT * sizes)), 0)
    return order_within_class(labels, seed) < counts[of_class]


def batch_size(config: ConfigDict, images: int) -> int:
    """`eval.linear_batch_size`, at most all images, and a number that divides over the devices of all processes."""
    devices = jax.device_count()
    return max(1, min(config.eval.linear_batch_size, images) // devices) * devices


def step_count(config: ConfigDict, images: int) -> int:
    """Steps of `eval.linear_epochs`, at least one."""
    return max(1, round(config.eval.linear_epochs * images / batch_size(config, images)))


def fit(inputs: EvalInputs, of_training: Callable, hidden: np.ndarray, rates: np.ndarray) -> Classifiers:
    """Trains 2 L layers: the first L never see the images of `hidden`, the others see all; rates [L] are for this batch."""
    config, labels, images = inputs.config, inputs.gallery.labels, len(inputs.gallery.labels)
    count, epochs = batch_size(config, images), config.eval.linear_epochs
    data = eval_section(config.data)
    if data.cache == "ram":  # training holds its own images there; these go to a disk where both do not fit
        data.cache = "auto"
    cache = CanvasCache(inputs.splits.train, data, this_host())
    rows = process_slice(count, jax.process_index(), jax.process_count())
    place = data_parallel(jax.local_devices()).batch
    stream = batches(cache, images, count, config.seed, 0, data.decode_threads, jax.process_index(), jax.process_count())
    probe = None
    both = jnp.concatenate([rates, rates])
    for number in range(step_count(config, images)):
        inputs.poll()
        batch, epoch = next(stream), (number * count + np.arange(count, dtype=np.int64)) // images
        arrays = [jax.device_put(array, place) for array in (*batch, epoch[rows].astype(np.int32))]
        features, index = gather((np.asarray(of_training(inputs.teacher, *arrays)), batch.index), count)
        if probe is None:
            probe = start(len(both), features.shape[1], inputs.classes(), config.seed)
        seen = np.stack([~hidden[index]] * len(rates) + [np.ones(count, bool)] * len(rates)).astype(np.float32)
        decay = 0.5 * (1 + np.cos(np.pi * (epoch[0] / epochs)))  # a step an epoch, as the references' schedule
        probe = step(probe, features, labels[index].astype(np.int32), seen, np.float32(decay) * both)
    stream.close()
    return probe.layers


def _blocks(inputs: EvalInputs, source: Source) -> np.ndarray:
    """Of the evaluation crops of a split: [N, F]."""
    config = inputs.config
    crops = (image.crop for image in eval_images(source, config, process_indices(len(source))))
    encoder = Encoder(config, inputs.network.backbone, inputs.teacher)
    found = joined(encoder.run(crops, ("blocks",), config.eval.batch_size, inputs.poll))
    return gather(found, len(source))["blocks"]


def cost(inputs: EvalInputs) -> Cost:
    """Of `measure`: every epoch passes over all training images."""
    config, labels, tests = inputs.config, inputs.gallery.labels, len(inputs.queries.labels)
    steps, judged = step_count(config, len(labels)), int(held_out(labels, config.seed).sum())
    calls = steps + batch_count(config, judged) + batch_count(config, tests)
    images, side = steps * batch_size(config, len(labels)) + judged + tests, config.eval.crop_px
    work = f"{steps:,} steps, {images:,} images in all through the backbone at {side} px"
    return Cost(work, calls, "batches", forward_flops(config, inputs.teacher, images, side))


def measure(inputs: EvalInputs) -> list[Number]:
    """Top-1 and top-5 of the last epoch, at the rate that does best on the held-out training images."""
    config, labels = inputs.config, inputs.gallery.labels
    hidden = held_out(labels, config.seed)
    of_training = make_training_encoder(config, inputs.network)
    given = np.array(sorted(config.eval.linear_lrs), np.float32)
    count = batch_size(config, len(labels))
    layers = fit(inputs, of_training, hidden, given * count / LR_BATCH_SIZE)
    judged, tested = (jax.tree.map(lambda x, part=part: x[part], layers) for part in np.split(np.arange(2 * len(given)), 2))
    best = 0
    if hidden.any():
        validation = _blocks(inputs, Part(inputs.splits.train, np.flatnonzero(hidden)))
        right = jnp.argmax(judged.logits(validation), axis=-1) == labels[hidden].astype(np.int32)
        best = int(jnp.argmax(jnp.mean(right, axis=1)))  # the smallest of equals
    logits = np.asarray(tested.logits(_blocks(inputs, inputs.splits.test)))[best]
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5] == inputs.queries.labels[:, None]
    protocol = (
        f"references' linear probe, last epoch of {config.eval.linear_epochs}, SGD, batch {count}, lr {given[best]:g} x "
        f"batch/{LR_BATCH_SIZE} chosen on {int(hidden.sum()):,} train images held out, last {config.eval.last_blocks} blocks "
        f"at {config.eval.crop_px} px, {inputs.counts()}"
    )
    return [
        percent_number("linear_top1", "Linear probe top-1", ranked[:, 0], protocol, config.seed),
        Number("linear_top5", "Linear probe top-5", 100 * float(ranked.any(axis=1).mean()), protocol),
    ]
