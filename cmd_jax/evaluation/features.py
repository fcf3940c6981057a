"""Features of a whole split from the teacher: one extractor that every protocol reads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import normalize
from cmd_jax.data.decode import decode_record, eval_boxes, eval_crop
from cmd_jax.data.sources import Source
from cmd_jax.method import mil
from cmd_jax.models.heads import l2_normalize
from cmd_jax.models.network import Network
from cmd_jax.training.sharding import data_parallel
from cmd_jax.training.state import Params


class Features(NamedTuple):
    """Features of N images.

    Attributes:
        features: [N, F] float32, l2-normalised.
        mil_weights: [N, P] float32, weights of the P patches, row-major; rows sum to 1.
        labels: [N] int64, -1 where unlabelled.
        boxes: [N, parts, 4] float32 (ymin, xmin, ymax, xmax), fractions of the evaluation crop.
        names: paths or ids.
    """

    features: np.ndarray
    mil_weights: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    names: tuple[str, ...]


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


def make_extractor(config: ConfigDict, network: Network) -> Callable[[Params, np.ndarray], dict[str, jax.Array]]:
    """Builds the jitted function (params, [B, H, W, 3] uint8) -> features and mil_weights of a batch."""
    parts = config.eval.features.split("+")

    @jax.jit
    def extract(params: Params, images: jax.Array) -> dict[str, jax.Array]:
        encoded = network.apply({"params": params}, jax.vmap(lambda x: normalize(x, config.data.normalization))(images))
        tokens = encoded.patch_tokens.astype(jnp.float32)
        pools = {
            "cls": lambda: encoded.backbone["cls_token"].astype(jnp.float32),
            "mean": lambda: jnp.mean(tokens, axis=1),
            "mil": lambda: mil.bag_embedding(encoded.mil_weights, tokens),
            "blocks": lambda: last_blocks(encoded.backbone, config.eval.last_blocks),
        }
        chosen = [pools[name]() for name in parts]
        # Each pool counts the same in a concatenation, whatever its norm.
        unit = [l2_normalize(x) for x in chosen]
        return {
            "features": jnp.concatenate(unit, axis=-1) / np.sqrt(len(parts)),
            "mil_weights": encoded.mil_weights,
        }

    return extract


def eval_images(
    source: Source, config: ConfigDict, indices: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, int, str]]:
    """Decodes images of a split in order: (crop [H, W, 3] uint8, part boxes in the crop [P, 4], label, name)."""

    resize_px, crop_px, threads = config.eval.resize_px, config.eval.crop_px, config.data.decode_threads

    def load(index: int):
        record = source[index]
        pixels = decode_record(record, grayscale=config.data.grayscale)
        boxes = eval_boxes(record.part_boxes, pixels.shape[:2], resize_px, crop_px)
        return eval_crop(pixels, resize_px, crop_px), boxes, record.label, record.name

    chunk = 4 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), chunk):
            yield from pool.map(load, indices[start : start + chunk])


def extract_features(
    extract: Callable, params: Params, source: Source, config: ConfigDict, between: Callable[[], None] = lambda: None
) -> Features:
    """Runs the teacher over a split: every process over its share, and all get the whole.

    Args:
        extract: of `make_extractor`.
        params: the teacher's, on every device of this process.
        source: the split.
        config: the whole resolved configuration.
        between: called before every batch, in all processes equally often.
    """
    processes, devices = jax.process_count(), jax.local_devices()
    of_process = data_parallel(devices).batch
    batch_size, outputs, rows = -(-config.eval.batch_size // len(devices)) * len(devices), [], []
    pending: list[np.ndarray] = []

    def flush() -> None:
        between()
        images = np.stack(pending + [pending[-1]] * (batch_size - len(pending)))  # one shape: one compilation
        encoded = extract(params, jax.device_put(images, of_process))
        outputs.append({key: np.asarray(value)[: len(pending)] for key, value in encoded.items()})
        pending.clear()

    # Shares of one size, so that they can be gathered: the last ones repeat the last image.
    share = -(-len(source) // processes)
    indices = range(jax.process_index() * share, (jax.process_index() + 1) * share)
    indices = indices if indices.stop <= len(source) else [min(index, len(source) - 1) for index in indices]
    for pixels, boxes, label, name in eval_images(source, config, indices):
        pending.append(pixels)
        rows.append((boxes, label, name))
        if len(pending) == batch_size:
            flush()
    if pending:
        flush()
    boxes, labels, names = zip(*rows, strict=True)
    joined = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    features = Features(**joined, labels=np.array(labels, np.int64), boxes=np.stack(boxes), names=names)
    return features if processes == 1 else _of_all_processes(features, len(source))


def _of_all_processes(share: Features, count: int) -> Features:
    """Joins the shares of all processes, the first `count` rows of them."""
    encoded = [name.encode() for name in share.names]
    width = int(np.max(multihost_utils.process_allgather(np.int32(max(map(len, encoded))))))
    names = np.array(encoded, f"S{width}").view(np.uint8).reshape(-1, width)
    # JAX holds no 64-bit integers.
    share = share._replace(names=names, labels=share.labels.astype(np.int32))
    whole = jax.tree.map(lambda x: np.asarray(x)[:count], multihost_utils.process_allgather(share, tiled=True))
    names = np.ascontiguousarray(whole.names).view(f"S{width}")[:, 0]
    return whole._replace(names=tuple(name.decode() for name in names), labels=whole.labels.astype(np.int64))
