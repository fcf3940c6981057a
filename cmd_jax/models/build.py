"""Networks and their initial parameters from a resolved configuration."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cmd_jax.models.network import Network
from cmd_jax.models.sizes import SWIN_SIZES
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT

Params = Any

# Keys of the section `model` that are attributes of a ViT, beside those of a Swin too.
OF_VITS = (
    "width", "depth", "num_heads", "mlp_dim", "class_token", "registers", "positions", "resample_rule", "rope_base",
    "layer_scale", "gated_mlp", "activation", "pre_norm", "qkv_bias", "scan_blocks", "attention",
)  # fmt: skip


def make_backbone(config: ConfigDict) -> ViT | Swin:
    """The backbone of a resolved configuration."""
    model = config.model
    common = {
        "patch_size": model.patch_size,
        "table_px": model.table_px,
        "layer_norm_eps": model.layer_norm_eps,
        "drop_path_rate": model.drop_path,
        "dtype": jnp.dtype(model.dtype),
        "product_dtype": jnp.dtype(model.product_dtype),
        "remat": model.remat,
    }
    if model.name in SWIN_SIZES:
        return Swin(*SWIN_SIZES[model.name], window=model.window, **common)
    return ViT(**common, **{key: model[key] for key in OF_VITS}, frozen_blocks=config.init.freeze_blocks)


def make_network(config: ConfigDict) -> Network:
    """The student's network (the teacher's too: stochastic depth is drawn only in training)."""
    dtype = jnp.dtype(config.model.dtype)
    return Network(
        backbone=make_backbone(config),
        image_pool=config.method.image_pool,
        prototypes=config.head.prototypes,
        bottleneck_dim=config.head.bottleneck_dim,
        hidden_dim=config.head.hidden_dim,
        head_layers=config.head.layers,
        head_batch_norm=config.head.batch_norm,
        learned_gain=not config.head.norm_last_layer,
        share_mlp=config.head.share_mlp,
        share_prototypes=config.head.share_prototypes,
        mil_hidden_dim=config.method.mil_hidden_dim,
        mil_temp=config.method.mil_temp,
        dtype=dtype,
        packed_views=config.model.packed_views,
        mil_scoring=config.method.mil_scorer,
        mil_heads=config.method.mil_heads,
        mask_token=bool(config.method.intra_masked_weight),
    )


def with_dtype(network: Network, dtype: jnp.dtype) -> Network:
    """The same network with activations and products in a dtype; one of that dtype as it is."""
    if dtype == network.dtype:
        return network
    return network.clone(dtype=dtype, backbone=network.backbone.clone(dtype=dtype, product_dtype=dtype))


def init_params(config: ConfigDict, network: Network) -> Params:
    """Initial parameters of student and teacher, a function of the seed."""
    images = jnp.zeros((1, config.views.global_px, config.views.global_px, 3), jnp.float32)
    return network.init(jax.random.key(config.seed), images, method="initialise")["params"]


def count_parameters(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
