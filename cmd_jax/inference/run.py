"""Runs a trained network on images: padded batches on all devices of all processes -> named outputs."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.config import ConfigDict, for_inference, token_px
from cmd_jax.data.augment import normalize
from cmd_jax.errors import WeightsError
from cmd_jax.inference.load import Trained
from cmd_jax.method import mil
from cmd_jax.method.logits import l2_normalize
from cmd_jax.models.build import Params, make_backbone
from cmd_jax.models.heads import MILScorer
from cmd_jax.models.sizes import UNLEARNED
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.training.sharding import all_hardware, data_parallel

Array = jax.Array
T = TypeVar("T")


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


def last_blocks(named: dict, count: int, append_mean: bool = False) -> Array:
    """The references' linear-probe feature: one vector of each of the last blocks, concatenated in network order.

    The class tokens, each after the final norm (DINO, EsViT); of a network without one the means over patches: of a Swin only
    the last stage's are normed, and every stage's are taken before its merging (EsViT).

    Args:
        named: a backbone's intermediates.
        count: number of blocks.
        append_mean: end with the mean patch token of the last block (`avgpool` of EsViT's ViT).

    Returns:
        [B, F] float32, not normalised; F is the sum of the blocks' widths, and one more width with the mean.
    """
    blocks = [tokens.astype(jnp.float32) for tokens in named["blocks"][-count:]]
    registers = named["blocks"][-1].shape[1] - named["patch_tokens"].shape[1]  # where there is no class token
    parts = [tokens[:, 0] if "cls_token" in named else jnp.mean(tokens[:, registers:], axis=1) for tokens in blocks]
    if append_mean:
        parts.append(jnp.mean(named["patch_tokens"].astype(jnp.float32), axis=1))
    return jnp.concatenate(parts, axis=-1)


def normalized(images: Array, config: ConfigDict) -> Array:
    """[B, H, W, 3] in 0..255 -> float32, as the network sees them."""
    return jax.vmap(lambda image: normalize(image, config.data.normalization))(images)


def read_outputs(config: ConfigDict, params: Params, named: dict) -> dict[str, Array]:
    """Computes the outputs of a network from its backbone's intermediates; inside `jax.jit` unused ones cost nothing.

    Args:
        config: resolved; `eval.features` names the pools, `eval.last_blocks` the number of blocks.
        params: with "mil_scorer" where there is one; some of `method.mil_scorer` have no parameters.
        named: the backbone's intermediates of B images.

    Returns:
        features [B, F] float32, each pool and the whole l2-normalised; blocks [B, G] float32, of `last_blocks`;
        patch_tokens [B, P, D] float32, row-major; with a scorer mil_weights [B, P] float32, sum to 1, the mean over its heads;
        with a class token attention [B, H, P], its probabilities over the patches in the last block (what it gives to itself
        and to registers is left out); with either patch_weights [B, P] float32, how much each patch counts: the MIL weights,
        else the mean of the attention over its heads, divided by its sum.
    """
    tokens = named["patch_tokens"].astype(jnp.float32)
    outputs = {"patch_tokens": tokens, "blocks": last_blocks(named, config.eval.last_blocks)}
    pools: dict[str, Callable[[], Array]] = {
        "mean": lambda: jnp.mean(tokens, axis=1),
        "blocks": lambda: outputs["blocks"],
    }
    if "mil_scorer" in params or config.method.mil_scorer in UNLEARNED:
        scorer = MILScorer(config.method.mil_hidden_dim, config.method.mil_scorer, config.method.mil_heads)
        scores = scorer.apply({"params": params.get("mil_scorer", {})}, named["patch_tokens"], named.get("attention"))
        weights = mil.mil_weights(scores, config.method.mil_temp)  # [B, H, P]
        outputs["mil_weights"] = jnp.mean(weights, axis=1)
        pools["mil"] = lambda: mil.bag_embedding(weights, named["patch_tokens"])
    if "cls_token" in named:
        pools["cls"] = lambda: named["cls_token"].astype(jnp.float32)
        outputs["attention"] = named["attention"][:, :, 0, -tokens.shape[1] :]
    if "mil_weights" in outputs:
        outputs["patch_weights"] = outputs["mil_weights"]
    elif "attention" in outputs:
        attention = jnp.mean(outputs["attention"].astype(jnp.float32), axis=1)
        outputs["patch_weights"] = attention / jnp.sum(attention, axis=-1, keepdims=True)
    parts = config.eval.features.split("+")
    # Each pool counts the same in a concatenation, whatever its norm.
    unit = [l2_normalize(pools[name]()) for name in parts]
    return outputs | {"features": jnp.concatenate(unit, axis=-1) / np.sqrt(len(parts))}


def encode(config: ConfigDict, backbone: ViT | Swin, params: Params, images: Array) -> dict[str, Array]:
    """Encodes evaluation crops [B, C, C, 3] uint8; arguments and outputs are those of `read_outputs`."""
    named = backbone.apply({"params": params["backbone"]}, normalized(images, config))
    return read_outputs(config, params, named)


def run_batches(
    program: Callable[..., dict[str, Array]],
    params: Params,
    items: Iterable[tuple[np.ndarray, ...]],
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
    fill: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Runs a program over items in batches, on all devices of this process; while they work the next batch is read.

    Args:
        program: jitted (params, one array [B, ...] for each array of an item) -> arrays [B, ...] by name.
        params: on every device of this process.
        items: arrays [...] of one shape.
        batch_size: items at a time, rounded up to the devices of this process.
        poll: called before every batch.
        fill: the last batch is padded to `batch_size`, for one compilation; else to a power of two: few compilations.

    Yields:
        Arrays [n, ...] by name of the n items of each batch.
    """
    devices = jax.local_devices()
    sharding = data_parallel(devices).batch
    batch_size, running = batch_rows(batch_size), None
    pending: list[tuple[np.ndarray, ...]] = []

    def start() -> tuple[dict[str, Array], int]:
        poll()
        rows = batch_size if fill else batch_rows(min(batch_size, 1 << (len(pending) - 1).bit_length()))
        padded = pending + [pending[-1]] * (rows - len(pending))
        columns = [jax.device_put(np.stack(column), sharding) for column in zip(*padded, strict=True)]
        return program(params, *columns), len(pending)

    def read(outputs: dict[str, Array], count: int) -> dict[str, np.ndarray]:
        return {name: array[:count] for name, array in jax.device_get(outputs).items()}

    for item in items:
        pending.append(item)
        if len(pending) == batch_size:
            started = start()
            pending.clear()
            if running:
                yield read(*running)
            running = started
    if pending:
        started = start()
        if running:
            yield read(*running)
        running = started
    if running:
        yield read(*running)


def joined(batches: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the outputs of one batch or more: arrays [N, ...] by name."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def batch_rows(batch_size: int) -> int:
    """A batch size rounded up to the devices of this process."""
    devices = jax.local_device_count()
    return -(-batch_size // devices) * devices


def batch_count(config: ConfigDict, images: int) -> int:
    """How many batches of `eval.batch_size` each process makes of its share of some images."""
    return -(-images // (jax.process_count() * batch_rows(config.eval.batch_size))) if images else 0


def process_indices(count: int) -> Sequence[int]:
    """The indices that this process reads of `count`. All shares have one size: the last ones repeat the last index."""
    size = -(-count // jax.process_count())
    indices = range(jax.process_index() * size, (jax.process_index() + 1) * size)
    return indices if indices.stop <= count else [min(index, count - 1) for index in indices]


def gather(tree: Any, count: int) -> Any:
    """Joins arrays [n, ...] of `process_indices` from all processes: [count, ...] each; JAX holds no 64-bit integers."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: np.asarray(x)[:count], multihost_utils.process_allgather(tree, tiled=True))


def check_finite(outputs: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the outputs of a network if all of them are finite.

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


class Encoder(NamedTuple):
    """A network on the devices of this process.

    Attributes:
        config: resolved.
        backbone: of the network.
        params: "backbone", and "mil_scorer" where there is one, on every device of this process.
    """

    config: ConfigDict
    backbone: ViT | Swin
    params: Params

    def program(self, outputs: Sequence[str]) -> Callable[[Params, Array], dict[str, Array]]:
        """The jitted function (params, images [B, C, C, 3] uint8) -> the named outputs of `read_outputs`."""
        return _make_program(self.config, self.backbone, tuple(outputs))

    def run(
        self,
        crops: Iterable[np.ndarray],
        outputs: Sequence[str],
        batch_size: int,
        poll: Callable[[], None] = lambda: None,
        fill: bool = True,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Encodes evaluation crops [C, C, 3] uint8: the named outputs of each batch, see `run_batches`."""
        items = ((crop,) for crop in crops)
        return run_batches(self.program(outputs), self.params, items, batch_size, poll, fill)


def place(trained: Trained) -> Encoder:
    """Puts a loaded network onto every device of this process."""
    params = jax.device_put(trained.params, data_parallel(jax.local_devices()).replicated)
    return Encoder(trained.config, _backbone(trained.config), params)


@once
def _make_program(config: ConfigDict, backbone: ViT | Swin, outputs: tuple[str, ...]) -> Callable:
    @jax.jit
    def encode_images(params: Params, images: Array) -> dict[str, Array]:
        encoded = encode(config, backbone, params, images)
        return {name: encoded[name] for name in outputs if name in encoded}

    return encode_images


def _backbone(config: ConfigDict) -> ViT | Swin:
    return make_backbone(for_inference(config, all_hardware()))


def grid_side(config: ConfigDict) -> int:
    """Rows, and columns, of the patch tokens of an evaluation crop."""
    return -(-config.eval.crop_px // token_px(config))


def widths(config: ConfigDict, params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of one image, without computing them."""
    side = config.eval.crop_px
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    shapes: dict[str, Any] = jax.eval_shape(lambda p, x: encode(config, _backbone(config), p, x), params, images)
    return {name: leaf.shape[1:] for name, leaf in shapes.items()}
