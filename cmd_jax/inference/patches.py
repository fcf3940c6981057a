"""Patches of a handful of images: tokens, MIL weights, attention of the class token."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.data.sources import Source
from cmd_jax.inference.preprocess import eval_images
from cmd_jax.inference.run import Encoder, joined

BATCH = 16  # one shape: one compilation


class Patches(NamedTuple):
    """The P patches, row-major, of N images.

    Attributes:
        tokens: [N, P, D] float32, after the backbone's final norm.
        mil_weights: [N, P] float32, sum to 1 over P.
        attention: [N, P] float32, sum to 1 over P; see `class_attention`. None without a class token.
    """

    tokens: np.ndarray
    mil_weights: np.ndarray
    attention: np.ndarray | None


def class_attention(attention: np.ndarray) -> np.ndarray:
    """How a class token spreads its attention over the patches: mean over the heads, divided by its sum.

    Args:
        attention: [N, H, P] probabilities of the class token, without what it gives to itself and to registers.

    Returns:
        [N, P] float32.
    """
    mean = attention.astype(np.float32).mean(axis=1)
    return mean / mean.sum(axis=-1, keepdims=True)


def read_patches(encoder: Encoder, source: Source, indices: Sequence[int]) -> Patches:
    """Encodes some images of a split in this process.

    Args:
        encoder: the network.
        source: the split.
        indices: of the images, at least one.
    """
    crops = (image.crop for image in eval_images(source, encoder.config, [int(index) for index in indices]))
    found = joined(encoder.run(crops, ("patch_tokens", "mil_weights", "attention"), BATCH))
    attention = found.get("attention")
    return Patches(found["patch_tokens"], found["mil_weights"], None if attention is None else class_attention(attention))
