"""The whole network of a student or a teacher: backbone, MIL scorer, image and region heads, prototypes."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmd_jax.method import mil
from cmd_jax.models.heads import MILScorer, ProjectionHead, Prototypes, Scoring
from cmd_jax.models.layers import Masked, table_init

Array = jax.Array


class Encoded(NamedTuple):
    """Outputs of the network for a batch of views.

    Attributes:
        patch_tokens: [B, N, D] backbone embeddings after the final norm.
        mil_weights: [B, N] float32, sum to 1 over N; the mean over the scorer's heads.
        bag: [B, H * D] float32, what each of the H heads makes of the patches.
        image_embedding: [B, F] float32, the pools joined; F is D for each pool, and H * D for "mil".
        image_z: [B, d] float32, unit norm.
        region_z: [B, N, d] float32, unit norm.
        backbone: the backbone's named intermediates.
    """

    patch_tokens: Array
    mil_weights: Array
    bag: Array
    image_embedding: Array
    image_z: Array
    region_z: Array
    backbone: dict


class Network(nn.Module):
    """Backbone with both levels of CMD on top.

    Attributes:
        backbone: `vit.ViT`, `swin.Swin`: maps images to named intermediates with `patch_tokens`, most ViTs with `cls_token`.
        image_pool: how patches become one image embedding: "mil", "mean", "cls" of a class token, or several joined by "+".
        prototypes: K.
        share_mlp: both levels use the image level's layers before the prototypes.
        share_prototypes: both levels use the image level's prototypes.
        mil_temp: temperature of the MIL weights.
        mil_scoring: how patches are scored, see `MILScorer`; without parameters there is no "mil_scorer" among them.
        mil_heads: see `MILScorer`.
        mask_token: whether there is a learned token for the patches that `encode` is told to mask. It belongs to no module: the
            backbone's parameters are the same with and without it.
        batch_axis: see `heads.BatchStatisticsNorm`.
        packed_views: views of all sizes share the products of one row of tokens (ViT), else one size after the other.
    """

    backbone: nn.Module
    image_pool: str
    prototypes: int
    bottleneck_dim: int
    hidden_dim: int
    head_layers: int
    head_batch_norm: bool
    learned_gain: bool
    share_prototypes: bool
    mil_hidden_dim: int
    mil_temp: float
    dtype: jnp.dtype = jnp.float32
    packed_views: bool = False
    mil_scoring: Scoring = "gated"
    mil_heads: int = 1
    share_mlp: bool = False
    mask_token: bool = False
    batch_axis: str | None = None

    @property
    def pool_widths(self) -> tuple[int, ...]:
        """Channels of each pool of an image embedding, F together."""
        width = self.backbone.width
        heads = {"class_token": getattr(self.backbone, "num_heads", 1), "mean": 1}.get(self.mil_scoring, self.mil_heads)
        return tuple(heads * width if pool == "mil" else width for pool in self.image_pool.split("+"))

    def setup(self) -> None:
        self.mil_scorer = MILScorer(self.mil_hidden_dim, self.mil_scoring, self.mil_heads)
        head = (self.hidden_dim, self.bottleneck_dim, self.head_layers, self.head_batch_norm, self.dtype, self.batch_axis)
        self.image_head = ProjectionHead(*head)
        self.region_head = self.image_head if self.share_mlp else ProjectionHead(*head)
        self.image_last_layer = Prototypes(self.prototypes, self.bottleneck_dim, self.learned_gain)
        if not self.share_prototypes:
            self.region_last_layer = Prototypes(self.prototypes, self.bottleneck_dim, self.learned_gain)
        if self.mask_token:
            # As BEiT starts it. From iBOT's zeros the gradient through a Swin's norms overflows: it adds no positions to them.
            self.token = self.param("mask_token", table_init, (1, 1, self.backbone.width))

    def score_patches(self, patch_tokens: Array) -> Array:
        """MIL weights of given patch embeddings: [..., N, D] -> [..., N] float32, sum to 1; "class_token" has none of these."""
        return jnp.mean(mil.mil_weights(self.mil_scorer(patch_tokens), self.mil_temp), axis=-2)

    def __call__(self, images: Array) -> Encoded:
        """images: [B, height, width, 3] normalised float -> Encoded."""
        return self.read(self.backbone(images))

    def encode(self, groups: tuple[Array, ...], keys: Array | None = None, masks: Array | None = None) -> tuple[Encoded, ...]:
        """Encodes views of several sizes.

        Args:
            groups: [B, V, height, width, 3] normalised float each.
            keys: [B] random keys of stochastic depth, one for each image; None (the teacher) keeps every branch.
            masks: [B, V, N] bool, the patches of the first group that the mask token stands for; None: of no patch.

        Returns:
            One for each group, with leading [B * V].
        """
        masked = None if masks is None else Masked(masks, self.token)
        if self.packed_views:
            named = self.backbone.encode(groups, keys, masked=masked)
        else:
            of_group = (masked, *[None] * (len(groups) - 1))
            named = [
                self.backbone.encode((images,), keys, number, masked)[0]
                for number, (images, masked) in enumerate(zip(groups, of_group, strict=True))
            ]
        return tuple(map(self.read, named))

    def read(self, named: dict) -> Encoded:
        """Computes MIL weights, pooling and both heads from the backbone's named intermediates."""
        tokens = named["patch_tokens"]
        weights = mil.mil_weights(self.mil_scorer(tokens, named.get("attention")), self.mil_temp)  # [B, H, N]
        bag = mil.bag_embedding(weights, tokens)
        pools = {
            "mil": lambda: bag,
            "mean": lambda: jnp.mean(tokens.astype(jnp.float32), axis=1),
            "cls": lambda: named["cls_token"].astype(jnp.float32),
        }
        # As they are: every part is made of tokens after the final norm, and the head's first layer weighs them.
        parts = [pools[name]() for name in self.image_pool.split("+")]
        pooled = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        weights = jnp.mean(weights, axis=1)
        return Encoded(tokens, weights, bag, pooled, self.image_head(pooled), self.region_head(tokens), named)

    def prototype_rows(self) -> tuple[Array, Array]:
        """(image W, region W), both [K, d] float32; the same array when prototypes are shared."""
        image = self.image_last_layer()
        return image, image if self.share_prototypes else self.region_last_layer()

    def initialise(self, images: Array) -> tuple[Encoded, tuple[Array, Array]]:
        """Touches every parameter; only for `init`."""
        return self(images), self.prototype_rows()
