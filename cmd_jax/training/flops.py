"""FLOPs of a step as the method needs them; recomputation does not count."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Var, jaxprs_in_params

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.augment import LOOKS
from cmd_jax.models.build import init_params, make_network
from cmd_jax.models.network import Encoded

BACKWARD = 2  # a product's backward pass is two products


def reads_regions(config: ConfigDict, local: bool = False) -> bool:
    """Whether the objective of a resolved configuration has a term of regions, of local views if `local`; DINO's has none, and
    iBOT's is of the global views."""
    terms = ("intra_region", "inter_student", "inter_teacher", "released", *(() if local else ("intra_masked",)))
    return any(config.method[f"{term}_weight"] for term in terms)


def read_fields(config: ConfigDict, local: bool = False) -> tuple[str, ...]:
    """Names of the fields of `models.network.Encoded` that the objective reads; the rest is left out of the program."""
    if reads_regions(config, local=True):
        return "image_z", "region_z", "mil_weights"
    return ("image_z", "region_z") if reads_regions(config, local) else ("image_z",)


def product_flops(jaxpr: Jaxpr) -> float:
    """Floating-point operations of the products (matrix products and convolutions) whose results a program returns or uses.

    Counted in the traced program, so on every backend alike; the body of a loop counts with each of its turns.

    Args:
        jaxpr: of the program; its loops are scans, and its convolutions have one group of features.
    """
    total, used = 0.0, {var for var in jaxpr.outvars if isinstance(var, Var)}
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars):
            continue
        used.update(var for var in equation.invars if isinstance(var, Var))
        shapes = [var.aval.shape for var in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            of_features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * out * math.prod(size for axis, size in enumerate(shapes[1]) if axis != of_features)
        else:
            inner = sum(map(product_flops, jaxprs_in_params(equation.params)))
            total += inner * equation.params.get("length", 1)  # of a scan
    return total


def model_flops(config: ConfigDict) -> float:
    """Floating-point operations of one image and step: the products of both networks, the heads and the logits, each done once.

    Recomputed chunks and rematerialised blocks do not count, so that they never flatter a utilisation; nor do augmentation,
    optimizer, the backward pass of blocks that `init.freeze_blocks` keeps as they are, and what is no product.

    Args:
        config: resolved.
    """
    plain = config.copy_and_resolve_references()
    plain.model.attention = "xla"  # a fused kernel does not show its products
    network = make_network(plain)
    shapes = jax.eval_shape(lambda: init_params(plain, network))

    views, frozen = config.views, config.init.freeze_blocks

    def forward(read: Callable[[Encoded], Any], views: int, side: int) -> float:
        run = lambda params, images: read(network.apply({"params": params}, images))
        images = jax.ShapeDtypeStruct((views, side, side, 3), jnp.float32)
        return product_flops(jax.make_jaxpr(run)(shapes, images).jaxpr) if views else 0.0

    whole = lambda encoded: [getattr(encoded, name) for name in read_fields(config)]
    local = lambda encoded: [getattr(encoded, name) for name in read_fields(config, local=True)]
    resting = lambda encoded: encoded.backbone["blocks"][frozen - 1]
    teacher = of_views = forward(whole, 2, views.global_px)
    if config.method.relation_weight:  # products with the bank do not count: they are few unless the images are millions
        teacher += forward(lambda encoded: encoded.image_embedding, len(LOOKS), views.global_px)
    student = of_views + forward(local, views.local_count, views.local_px)
    trained = student
    if frozen:
        trained -= forward(resting, 2, views.global_px) + forward(resting, views.local_count, views.local_px)
    product = 2 * config.head.bottleneck_dim * config.head.prototypes
    patches = lambda side: (-(-side // token_px(config))) ** 2
    teacher_rows = 2 * (1 + reads_regions(config) * patches(views.global_px))
    student_rows = teacher_rows + views.local_count * (1 + reads_regions(config, local=True) * patches(views.local_px))
    return teacher + student + BACKWARD * trained + product * (teacher_rows + (1 + BACKWARD) * student_rows)
