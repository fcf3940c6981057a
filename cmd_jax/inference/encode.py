"""What a network says of prepared images: features, MIL weights, patch tokens and attention, in one compiled pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import ConfigDict, for_inference, token_px
from cmd_jax.data.augment import normalize
from cmd_jax.evaluation.features import last_blocks, once
from cmd_jax.method import mil
from cmd_jax.models.build import Params, make_backbone
from cmd_jax.models.heads import MILScorer, l2_normalize
from cmd_jax.models.sizes import UNLEARNED
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.training.sharding import all_hardware, data_parallel

Array = jax.Array
OUTPUTS = ("features", "mil_weights", "patch_tokens", "attention")


def encode(config: ConfigDict, backbone: ViT | Swin, params: Params, images: Array) -> dict[str, Array]:
    """Encodes evaluation crops; a caller that reads a part of the outputs pays for that part, once it is compiled.

    Args:
        config: resolved; `eval.features` names the pools.
        backbone: of the configuration.
        params: "backbone", and "mil_scorer" where there is one; some of `method.mil_scorer` have no parameters.
        images: [B, C, C, 3] uint8.

    Returns:
        features [B, F] float32, each pool and the whole l2-normalised; patch_tokens [B, P, D], row-major; with a scorer
        mil_weights [B, P] float32, sum to 1, the mean over its heads; of a ViT attention [B, H, P],
        probabilities of the class token over the patches in the last block (what it gives to itself and to registers is left
        out).
    """
    named = backbone.apply({"params": params["backbone"]}, jax.vmap(lambda x: normalize(x, config.data.normalization))(images))
    tokens = named["patch_tokens"].astype(jnp.float32)
    outputs = {"patch_tokens": tokens}
    pools: dict[str, Callable[[], Array]] = {
        "mean": lambda: jnp.mean(tokens, axis=1),
        "blocks": lambda: last_blocks(named, config.eval.last_blocks),
    }
    if "mil_scorer" in params or config.method.mil_scorer in UNLEARNED:
        scorer = MILScorer(config.method.mil_hidden_dim, config.method.mil_scorer, config.method.mil_heads)
        scores = scorer.apply({"params": params.get("mil_scorer", {})}, tokens, named.get("attention"))
        weights = mil.mil_weights(scores, config.method.mil_temp)  # [B, H, P]
        outputs["mil_weights"] = jnp.mean(weights, axis=1)
        pools["mil"] = lambda: mil.bag_embedding(weights, tokens)
    if "cls_token" in named:
        pools["cls"] = lambda: named["cls_token"].astype(jnp.float32)
        outputs["attention"] = named["attention"][:, :, 0, 1 + config.model.registers :]
    parts = config.eval.features.split("+")
    # Each pool counts the same in a concatenation, whatever its norm.
    unit = [l2_normalize(pools[name]()) for name in parts]
    return outputs | {"features": jnp.concatenate(unit, axis=-1) / np.sqrt(len(parts))}


def make_encoder(config: ConfigDict, params: Params, outputs: Sequence[str]) -> Callable[[np.ndarray, int], dict[str, Array]]:
    """Puts a network onto every device of this process.

    Args:
        config: resolved.
        params: see `encode`.
        outputs: some of OUTPUTS.

    Returns:
        (images [n, C, C, 3] uint8, rows) -> the named outputs with at least n rows, without waiting for the device. The batch
        is filled up to `rows` (and to a multiple of the devices): one compilation for each size.
    """
    devices = jax.local_devices()
    shardings, run = data_parallel(devices), _make_program(config, tuple(outputs))
    placed = jax.device_put(params, shardings.replicated)

    def encoder(images: np.ndarray, rows: int) -> dict[str, Array]:
        rows = -(-max(rows, len(images)) // len(devices)) * len(devices)
        filled = np.concatenate([images, np.repeat(images[-1:], rows - len(images), axis=0)])
        return run(placed, jax.device_put(filled, shardings.batch))

    return encoder


@once
def _make_program(config: ConfigDict, outputs: tuple[str, ...]) -> Callable[[Params, Array], dict[str, Array]]:
    """Builds the jitted function (params, images) -> the named outputs of `encode`: networks of a configuration share it."""
    backbone = _backbone(config)

    @jax.jit
    def run(params: Params, images: Array) -> dict[str, Array]:
        encoded = encode(config, backbone, params, images)
        return {name: encoded[name] for name in outputs}

    return run


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
