"""The text of `--dry_run`: what a run would train, and what it would cost."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cmd_jax import config as config_lib
from cmd_jax.data.cache import plan
from cmd_jax.data.sources import Source, eval_section, where
from cmd_jax.models.build import count_parameters
from cmd_jax.progress import clock
from cmd_jax.training.flops import model_flops
from cmd_jax.training.processes import this_host
from cmd_jax.training.run import Run

PRODUCTS, ROUNDS = 8, 3  # that are timed: products one after the other, and repetitions of them
REACHED = "training of a ViT-Ti on two CPU cores had about 0.4 of it"


def product_rate(dtype: str, side: int | None = None) -> float:
    """Operations a second of large matrix products on one device: the best of some rounds, in a second on a CPU core.

    Args:
        dtype: of the operands; sums and results are float32.
        side: of the square operands; None: 2,048 on a CPU, 8,192 elsewhere.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    square = jnp.ones((side, side), dtype)
    product = lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32)
    multiply = lambda _, y: (product(square, y) / side).astype(dtype)
    products = jax.jit(lambda x: jax.lax.fori_loop(0, PRODUCTS, multiply, x)).lower(square).compile()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        products(square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return PRODUCTS * 2 * side**3 / min(seconds)


def summarize(run: Run, test: Source, weight_notes: Sequence[str] = ()) -> str:
    """Data, model, shapes, memory and arithmetic of a run, whose step is compiled; nothing is trained.

    Args:
        run: of `prepare_run`.
        test: images of its evaluation.
        weight_notes: what it takes from `init.weights`; a sentence each.
    """
    config, state = run.config, run.abstract_state()
    count, memory = config.train.batch_size, run.compile().memory_analysis()
    evaluated = eval_section(config.data)
    views, token_px = config.views, config_lib.token_px(config)
    patches = lambda side: (-(-side // token_px)) ** 2
    model = f"{config.model.name}/{config.model.patch_size}"
    if not config_lib.is_swin(config):
        model += f", {config.model.depth} blocks of {config.model.width:,} channels"
    backbone, total = count_parameters(state.student["backbone"]), count_parameters(state.student)
    gib, devices, precision = 2**30, run.shardings.mesh.devices, config.model.dtype
    if config.model.teacher_dtype != config.model.dtype:
        precision += f", the teacher in {config.model.teacher_dtype}"
    if config.model.product_dtype != config.model.dtype:
        precision += f", products of {config.model.product_dtype}"
    flops, rate = model_flops(config), product_rate(config.model.product_dtype)
    least = clock(flops * count * run.steps / (rate * devices.size))
    lines = [
        f"data        {where(config.data)}: {len(run.source):,} train, {len(test):,} test images"
        f"{'' if where(evaluated) == where(config.data) else f' of {where(evaluated)}'}, {len(test.class_names)} classes",
        *(f"data        {split}: {of.note}" for split, of in (("train", run.source), ("test", test)) if of.note),
        f"cache       {plan(run.source, config.data, this_host()).note}",
        f"views       2 x {views.global_px} px ({patches(views.global_px)} patches), "
        f"{views.local_count} x {views.local_px} px ({patches(views.local_px)} patches)",
        f"model       {model}: {backbone:,} parameters in the backbone, {total:,} with heads and "
        f"{config.head.prototypes:,} prototypes a level; computed in {precision}",
        *(f"init        {note}" for note in weight_notes),
        f"run         {run.steps:,} steps of {count:,} images, {count // devices.size} on each of {devices.size} device(s) "
        f"({devices.flat[0].device_kind}), {config.train.epochs:g} epochs",
        f"memory      {memory.argument_size_in_bytes / gib:.2f} GiB of state and batch, "
        f"{memory.temp_size_in_bytes / gib:.2f} GiB temporary on each device",
        f"speed       attention {config.model.attention}, "
        + ", ".join(f"{key} {config.model[key]}" for key in ("packed_views", "scan_blocks", "remat"))
        + f", {config.method.prototype_chunk:,} prototypes at a time, {config.method.matched_targets} targets",
        f"arithmetic  {flops / 1e9:.2f} GFLOP an image and step, each product counted once",
        f"time        at least {least}, at {rate / 1e12:.3g} TFLOP/s of matrix "
        f"products in {config.model.product_dtype} on each device, measured now; {REACHED}",
    ]
    return "\n".join(lines)
