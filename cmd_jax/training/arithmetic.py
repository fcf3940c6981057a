"""What a step costs in floating-point operations, counted as the method needs them, whatever the program repeats."""

import jax
import jax.numpy as jnp

from cmd_jax.config import ConfigDict, region_rows, token_px
from cmd_jax.training.state import Params, init_params, make_network

BACKWARD = 2  # a product's backward pass is two products


def reads_regions(config: ConfigDict) -> bool:
    """Whether the objective of a resolved configuration has a term of regions; DINO's has not."""
    terms = ("intra_region", "inter_student", "inter_teacher", "released")
    return any(config.method[f"{term}_weight"] for term in terms)


def read_fields(config: ConfigDict) -> tuple[str, ...]:
    """Names of what the objective reads of `models.network.Encoded`; the rest is left out of the program."""
    return ("image_z", "region_z", "mil_weights") if reads_regions(config) else ("image_z",)


def model_flops(config: ConfigDict) -> float:
    """Floating-point operations of one image and step: both networks, the heads and the logits, each done once.

    Recomputed chunks and rematerialised blocks do not count, so that they never flatter a utilisation; nor do augmentation and
    optimizer.

    Args:
        config: resolved.
    """
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
        # Loops are counted once by the compiler, so the blocks are written out.
        plain.model.update(scan_blocks=False, packed_views=False, remat="none")
    network = make_network(plain)
    shapes = jax.eval_shape(lambda: init_params(plain, network))

    views, regions, read = config.views, reads_regions(config), read_fields(config)

    def forward(views: int, side: int) -> float:
        images = jax.ShapeDtypeStruct((views, side, side, 3), jnp.float32)

        def run(params: Params, images: jax.Array) -> list[jax.Array]:
            encoded = network.apply({"params": params}, images)
            return [getattr(encoded, name) for name in read]

        return jax.jit(run).lower(shapes, images).cost_analysis()["flops"]

    teacher = forward(2, views.global_px)
    student = teacher + (forward(views.local_count, views.local_px) if views.local_count else 0.0)
    product = 2 * config.head.bottleneck_dim * config.head.prototypes
    teacher_regions = 2 * (-(-views.global_px // token_px(config))) ** 2
    teacher_rows = 2 + (teacher_regions if regions else 0)
    student_rows = 2 + views.local_count + (region_rows(config) - teacher_regions if regions else 0)
    return teacher + (1 + BACKWARD) * student + product * (teacher_rows + (1 + BACKWARD) * student_rows)
