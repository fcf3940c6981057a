"""Features of a whole split from the teacher: one extractor that every protocol reads."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import normalize
from cmd_jax.data.decode import BadImages, decode_record, eval_boxes, eval_crop
from cmd_jax.data.sources import NO_BOXES, UNLABELLED, Source
from cmd_jax.errors import BadImage, WeightsError
from cmd_jax.models.build import Params
from cmd_jax.models.heads import l2_normalize
from cmd_jax.models.network import Encoded, Network
from cmd_jax.training.sharding import data_parallel

T = TypeVar("T")


class Features(NamedTuple):
    """Features of the N images of a split that can be read.

    Attributes:
        features: [N, F] float32, l2-normalised.
        mil_weights: [N, P] float32, weights of the P patches, row-major; rows sum to 1.
        labels: [N] int64, -1 where unlabelled.
        boxes: [N, parts, 4] float32 (ymin, xmin, ymax, xmax), fractions of the evaluation crop.
        names: paths or ids.
        indices: [N] int64, ascending: their indices in the split; those that are missing cannot be read.
    """

    features: np.ndarray
    mil_weights: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...]
    indices: np.ndarray


def last_blocks(named: dict, count: int, append_mean: bool = False) -> jax.Array:
    """The references' linear-probe feature: what the last blocks say of an image, concatenated in network order.

    Of a ViT the class tokens, each after the final norm (DINO, EsViT); of a Swin the means over tokens, of which only the
    last stage's are normed and every stage's are taken before its merging (EsViT).

    Args:
        named: a backbone's intermediates.
        count: number of blocks.
        append_mean: end with the mean patch token of the last block (`avgpool` of EsViT's ViT).

    Returns:
        [B, F] float32, not normalised; F is the sum of the blocks' widths, and one more width with the mean.
    """
    blocks = [tokens.astype(jnp.float32) for tokens in named["blocks"][-count:]]
    parts = [tokens[:, 0] if "cls_token" in named else jnp.mean(tokens, axis=1) for tokens in blocks]
    if append_mean:
        parts.append(jnp.mean(named["patch_tokens"].astype(jnp.float32), axis=1))
    return jnp.concatenate(parts, axis=-1)


def once(build: Callable[..., T]) -> Callable[..., T]:
    """Keeps what was built last for the same configuration and other arguments: evaluations of a run share their programs."""
    built: dict[tuple, T] = {}

    @functools.wraps(build)
    def get(config: ConfigDict, *others: Any) -> T:
        key = (config.to_json(), *others)
        if key not in built:
            if any(text != key[0] for text, *_ in built):
                built.clear()
            built[key] = build(config.copy_and_resolve_references(), *others)
        return built[key]

    return get


@once
def make_extractor(config: ConfigDict, network: Network) -> Callable[[Params, np.ndarray], dict[str, jax.Array]]:
    """Builds the jitted function (params, [B, H, W, 3] uint8) -> features and mil_weights of a batch."""

    @jax.jit
    def extract(params: Params, images: jax.Array) -> dict[str, jax.Array]:
        encoded = network.apply({"params": params}, normalized(images, config))
        return {"features": pool_features(encoded, config), "mil_weights": encoded.mil_weights}

    return extract


def normalized(images: jax.Array, config: ConfigDict) -> jax.Array:
    """[B, H, W, 3] in 0..255 -> float32, as the network sees them."""
    return jax.vmap(lambda image: normalize(image, config.data.normalization))(images)


def pool_features(encoded: Encoded, config: ConfigDict) -> jax.Array:
    """`eval.features` of what a network gives for B images: [B, F] float32, l2-normalised."""
    tokens = encoded.patch_tokens.astype(jnp.float32)
    pools = {
        "cls": lambda: encoded.backbone["cls_token"].astype(jnp.float32),
        "mean": lambda: jnp.mean(tokens, axis=1),
        "mil": lambda: encoded.bag,
        "blocks": lambda: last_blocks(encoded.backbone, config.eval.last_blocks),
    }
    parts = config.eval.features.split("+")
    # Each pool counts the same in a concatenation, whatever its norm.
    unit = [l2_normalize(pools[name]()) for name in parts]
    return jnp.concatenate(unit, axis=-1) / np.sqrt(len(parts))


class EvalImage(NamedTuple):
    """One image as evaluation reads it.

    Attributes:
        crop: [H, W, 3] uint8.
        boxes: [P, 4] float32, part boxes in the crop.
        label: class index, or UNLABELLED.
        name: path or id.
    """

    crop: np.ndarray
    boxes: np.ndarray
    label: int
    name: str


def eval_images(source: Source, config: ConfigDict, indices: Sequence[int]) -> Iterator[EvalImage]:
    """Decodes images of a split in order. Raises BadImage."""
    return in_threads(lambda index: _load(source, config, index), indices, config.data.decode_threads)


def _load(source: Source, config: ConfigDict, index: int) -> EvalImage:
    resize_px, crop_px = config.eval.resize_px, config.eval.crop_px
    record = source[index]
    pixels = decode_record(record, grayscale=config.data.grayscale)
    boxes = eval_boxes(record.part_boxes, pixels.shape[:2], resize_px, crop_px)
    return EvalImage(eval_crop(pixels, resize_px, crop_px), boxes, record.label, record.name)


def in_threads(load: Callable[[int], T], indices: Sequence[int], threads: int) -> Iterator[T]:
    """load(index) of all indices in order, a few ahead of what is taken."""
    chunk = 4 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), chunk):
            yield from pool.map(load, indices[start : start + chunk])


def in_batches(
    apply: Callable, params: Params, items: Iterable[tuple[np.ndarray, ...]], config: ConfigDict, between: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Runs a function over items, a batch of `eval.batch_size` at a time on all devices of this process.

    Args:
        apply: jitted (params, one array [B, ...] for each of an item's) -> arrays [B, ...] by name.
        params: on every device of this process.
        items: at least one.
        config: the whole resolved configuration.
        between: called before every batch.

    Returns:
        Arrays [items, ...] by name.
    """
    devices = jax.local_devices()
    of_process = data_parallel(devices).batch
    batch_size, outputs = _batch_size(config), []
    pending: list[tuple[np.ndarray, ...]] = []

    def flush() -> None:
        between()
        padded = pending + [pending[-1]] * (batch_size - len(pending))  # one shape: one compilation
        arrays = (jax.device_put(np.stack(column), of_process) for column in zip(*padded, strict=True))
        outputs.append({key: np.asarray(value)[: len(pending)] for key, value in apply(params, *arrays).items()})
        pending.clear()

    for item in items:
        pending.append(item)
        if len(pending) == batch_size:
            flush()
    if pending:
        flush()
    return {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}


def check_finite(outputs: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Passes on what a network made of images, if all of it is finite.

    Args:
        outputs: arrays [N, ...] by name.
        names: of the N images.

    Raises:
        WeightsError: naming the first image whose numbers are not.
    """
    for what, array in outputs.items():
        bad = np.nonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0]
        if len(bad):
            raise WeightsError(
                f"{what} of {names[bad[0]]} ({len(bad)} of {len(array)} images) are NaN or infinite: the weights are damaged, "
                "or the network overflows in half precision; use model.dtype=float32, or an earlier checkpoint"
            )
    return outputs


def _batch_size(config: ConfigDict) -> int:
    """`eval.batch_size`, rounded up to the devices of this process."""
    devices = jax.local_device_count()
    return -(-config.eval.batch_size // devices) * devices


def batch_count(config: ConfigDict, images: int) -> int:
    """How many batches each process makes of its share of some images."""
    return -(-images // (jax.process_count() * _batch_size(config))) if images else 0


def share(count: int) -> Sequence[int]:
    """The indices that this process reads of `count`. All shares have one size: the last ones repeat the last index."""
    size = -(-count // jax.process_count())
    indices = range(jax.process_index() * size, (jax.process_index() + 1) * size)
    return indices if indices.stop <= count else [min(index, count - 1) for index in indices]


def gather_shares(tree: Any, count: int) -> Any:
    """Joins the arrays [share, ...] of all processes, the first `count` rows of them; JAX holds no 64-bit integers."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: np.asarray(x)[:count], multihost_utils.process_allgather(tree, tiled=True))


def extract_features(
    extract: Callable, params: Params, source: Source, config: ConfigDict, between: Callable[[], None] = lambda: None
) -> Features:
    """Runs the teacher over a split: every process over its share, and all get the whole.

    An image that cannot be read is said on the error stream and left out; `data.bad_images` has the limit.

    Args:
        extract: of `make_extractor`.
        params: the teacher's, on every device of this process.
        source: the split.
        config: the whole resolved configuration.
        between: called before every batch, in all processes equally often.

    Raises:
        BadImage: too many images cannot be read.
    """
    bad = BadImages(np.zeros(len(source), np.uint8), "left out of the evaluation")
    boxes, labels, names, readable = [], [], [], []

    def load(index: int) -> EvalImage | BadImage:
        try:
            return _load(source, config, index)
        except BadImage as error:
            return error

    def crops() -> Iterator[tuple[np.ndarray]]:
        indices = share(len(source))
        for index, image in zip(indices, in_threads(load, indices, config.data.decode_threads), strict=True):
            readable.append(not isinstance(image, BadImage))
            if not readable[-1]:
                bad.note(index, str(image))
                image = _blank(source, config, index)  # a row of its own until all processes have joined theirs
            boxes.append(image.boxes)
            labels.append(image.label)
            names.append(image.name)
            yield (image.crop,)

    encoded = in_batches(extract, params, crops(), config, between)
    check_finite(encoded, names)
    rows = {**encoded, "boxes": np.stack(boxes), "labels": np.array(labels, np.int32), "readable": np.array(readable)}
    rows = gather_shares({**rows, "names": _as_bytes(names)}, len(source))
    readable = rows.pop("readable")
    BadImages(~readable, bad.outcome).check("images of this split cannot be read")  # a process counts those of its share
    rows = {key: array[readable] for key, array in rows.items()}
    names = tuple(name.tobytes().rstrip(b"\0").decode() for name in rows.pop("names"))
    return Features(**rows | {"labels": rows["labels"].astype(np.int64)}, names=names, indices=np.flatnonzero(readable))


def _blank(source: Source, config: ConfigDict, index: int) -> EvalImage:
    """Stands for an image that cannot be read."""
    try:
        boxes = np.zeros_like(source[index].part_boxes)
    except BadImage:  # a file, and folders have no boxes
        boxes = NO_BOXES
    return EvalImage(np.zeros((config.eval.crop_px, config.eval.crop_px, 3), np.uint8), boxes, UNLABELLED, "")


def _as_bytes(names: Sequence[str]) -> np.ndarray:
    """[n, W] uint8: UTF-8, filled up with zeros to the longest name of all processes."""
    encoded = [name.encode() for name in names]
    width = max(1, *map(len, encoded))
    if jax.process_count() > 1:
        width = int(np.max(multihost_utils.process_allgather(np.int32(width))))
    return np.array(encoded, f"S{width}").view(np.uint8).reshape(len(encoded), width)
