"""Random inputs of the objective at the sizes of `benchmarks.region_loss`, the same for JAX and PyTorch.

An input is a dict of float32 arrays. B images, V views (two global ones, then local ones), N patches of a view, D features,
d bottleneck width, K prototypes:

    {teacher, student_global, student_local}.{image_z [B, V, d], region_z [B, V, N, d], features [B, V, N, D],
    mil_weights [B, V, N]}, {student, teacher}_rows.{image, region} [K, d], centers.{image, region} [K],
    inter_teacher_weights.teacher [B, 2, N]
"""

import argparse

import numpy as np

GROUPS = ("student_global", "student_local")
VIEW_FIELDS = ("image_z", "region_z", "features", "mil_weights")
LEVELS = ("image", "region")
OBJECTIVES = {"region": (0.0, 1.0, 0.0, 0.0), "cmd": (0.5, 0.5, 1.0, 1.0)}  # weights of L_I, L_R, L_S, L_T
STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Sizes that parent and children share."""
    add = parser.add_argument
    add("--batch_size", type=int, default=1, help="images (%(default)s)")
    add("--width", type=int, default=256, help="d of the bottleneck (%(default)s)")
    add("--features", type=int, default=384, help="D of the backbone's patches, by which they are matched (%(default)s)")
    add("--global_patches", type=int, default=196, help="of each of the two global views (%(default)s)")
    add("--local_patches", type=int, default=36, help="of each local view (%(default)s)")
    add("--local_count", type=int, default=8, help="local views, at least 1 (%(default)s)")


def size_arguments(args: argparse.Namespace) -> list[str]:
    """The command line that gives a child the sizes in `args`."""
    names = ("batch_size", "width", "features", "global_patches", "local_patches", "local_count")
    return [f"--{name}={getattr(args, name)}" for name in names]


def make(args: argparse.Namespace, prototypes: int) -> dict[str, np.ndarray]:
    """The arrays for sizes of `add_size_options` and K; equal for equal arguments."""
    rng = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape, np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def shares(*shape: int) -> np.ndarray:
        x = np.exp(rng.standard_normal(shape, np.float32))
        return x / x.sum(-1, keepdims=True)

    batch, sizes = args.batch_size, {"student_local": (args.local_count, args.local_patches)}
    problem = {}
    for name in ("teacher", *GROUPS):
        views, patches = sizes.get(name, (2, args.global_patches))
        problem[f"{name}.image_z"] = unit(batch, views, args.width)
        problem[f"{name}.region_z"] = unit(batch, views, patches, args.width)
        problem[f"{name}.features"] = rng.standard_normal((batch, views, patches, args.features), np.float32)
        problem[f"{name}.mil_weights"] = shares(batch, views, patches)
    for level in LEVELS:
        problem[f"student_rows.{level}"] = unit(prototypes, args.width)
        problem[f"teacher_rows.{level}"] = unit(prototypes, args.width)
        problem[f"centers.{level}"] = 0.1 * rng.standard_normal(prototypes, np.float32)
    problem["inter_teacher_weights.teacher"] = shares(batch, 2, args.global_patches)
    return problem


def trained(objective: str) -> list[str]:
    """Names of the inputs that get a gradient: z and W of the student; for all four terms its MIL weights too."""
    fields, levels = (("region_z",), ("region",)) if objective == "region" else (("image_z", "region_z", "mil_weights"), LEVELS)
    names = [f"{group}.{field}" for group in GROUPS for field in fields] + [f"student_rows.{level}" for level in levels]
    return names if objective == "region" else [*names, "inter_teacher_weights.teacher"]
