"""What a teacher says of the patches of a handful of images: tokens, MIL weights, attention of the class token."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import Source
from cmd_jax.evaluation.features import eval_images, normalized, once
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.training.sharding import data_parallel

BATCH = 16  # one shape: one compilation


class Patches(NamedTuple):
    """The P patches, row-major, of N images.

    Attributes:
        tokens: [N, P, D] float32, after the backbone's final norm.
        mil_weights: [N, P] float32, sum to 1 over P.
        attention: [N, P] float32, sum to 1 over P; see `class_attention`. None of a Swin, which has no class token.
    """

    tokens: np.ndarray
    mil_weights: np.ndarray
    attention: np.ndarray | None

    def take(self, rows: Sequence[int]) -> "Patches":
        """Those of some of the images."""
        rows = np.asarray(rows, np.int64)
        return Patches(self.tokens[rows], self.mil_weights[rows], None if self.attention is None else self.attention[rows])


def class_attention(attention: jax.Array, patches: int) -> jax.Array:
    """How a ViT's class token spreads its attention over the patches.

    Mean over the heads; what it gives to itself and to registers is left out, and the rest divided by its sum.

    Args:
        attention: [B, H, T, T] probabilities; the last `patches` of the T tokens are patches, the first is the class token.
        patches: P.

    Returns:
        [B, P] float32.
    """
    row = jnp.mean(attention[:, :, 0, -patches:].astype(jnp.float32), axis=1)
    return row / jnp.sum(row, axis=-1, keepdims=True)


@once
def make_inspector(config: ConfigDict, network: Network) -> Callable[[Params, np.ndarray], dict[str, jax.Array]]:
    """Builds the jitted function (params, [B, H, W, 3] uint8) -> the fields of `Patches` by name."""

    @jax.jit
    def inspect(params: Params, images: jax.Array) -> dict[str, jax.Array]:
        encoded = network.apply({"params": params}, normalized(images, config))
        found = {"tokens": encoded.patch_tokens.astype(jnp.float32), "mil_weights": encoded.mil_weights}
        if "cls_token" in encoded.backbone:
            found["attention"] = class_attention(encoded.backbone["attention"], encoded.patch_tokens.shape[1])
        return found

    return inspect


def inspect_patches(inspect: Callable, params: Params, source: Source, config: ConfigDict, indices: Sequence[int]) -> Patches:
    """Runs the teacher over some images of a split.

    Args:
        inspect: of `make_inspector`.
        params: the teacher's, on every device of this process.
        source: the split.
        config: the whole resolved configuration.
        indices: of the images, at least one.
    """
    everywhere = data_parallel(jax.local_devices()).replicated  # where the parameters are
    crops, outputs = [crop for crop, *_ in eval_images(source, config, [int(index) for index in indices])], []
    for start in range(0, len(crops), BATCH):
        part = crops[start : start + BATCH]
        images = np.stack(part + [part[-1]] * (BATCH - len(part)))
        found = inspect(params, jax.device_put(images, everywhere))
        outputs.append({key: np.asarray(value)[: len(part)] for key, value in found.items()})
    joined = {key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}
    return Patches(joined["tokens"], joined["mil_weights"], joined.get("attention"))
