"""Our training step on fixed random crops, the other side of `benchmarks.torch_step`.

    python -m benchmarks.jax_step --model=vit_tiny --method=cmd --batch_size=4 --prototypes=4096

runs three steps and prints loss and seconds; with --serve it answers `benchmarks.worker`, with --phases it times the parts
of the step, each compiled by itself, and prints them as JSON too. Stochastic depth is off and the last layer is never
frozen, as on the other side. `--set=model.remat=full` sets any other key of the configuration.
"""

import argparse
import ast
import contextlib
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import worker
from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.loader import Batch
from cmd_jax.method.objective import cmd_objective
from cmd_jax.method.rows import PrototypePair
from cmd_jax.models.build import count_parameters, make_network, with_dtype
from cmd_jax.training.flops import model_flops, read_fields
from cmd_jax.training.memory import return_free_memory
from cmd_jax.training.optimizer import adamw
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.sharding import all_hardware
from cmd_jax.training.state import TrainState, init_state
from cmd_jax.training.step import (
    Crops,
    ema,
    encode_views,
    make_apply,
    make_gradients,
    make_streaming,
    make_teach,
    make_train_step,
    term_weights,
)
from cmd_jax.validation import validate

IMAGES = 100_000  # of the imagined data set: schedules alone depend on it


def parser() -> argparse.ArgumentParser:
    """The command line, shared with `benchmarks.step`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vit_tiny", help="a model.name of cmd_jax")
    add("--method", default="cmd", choices=["dino", "cmd"])
    add("--batch_size", type=int, default=4, help="images")
    add("--prototypes", type=int, default=4096, help="K")
    add("--local_count", type=int, default=8, help="local views of an image")
    add("--global_px", type=int, default=224)
    add("--local_px", type=int, default=96)
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--augment", action="store_true", help="uint8 images in, views made inside the step")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration; may be repeated")
    add("--serve", action="store_true", help="answer benchmarks.worker")
    add("--phases", action="store_true", help="time the parts of the step, each compiled by itself")
    return parser


def make_config(args: argparse.Namespace) -> ConfigDict:
    """The resolved configuration of the command line."""
    config = config_lib.default()
    config.model.name, config.method.name = args.model, args.method
    config.head.prototypes, config.train.batch_size = args.prototypes, args.batch_size
    config.views.local_count, config.views.global_px, config.views.local_px = args.local_count, args.global_px, args.local_px
    config.model.dtype, config.model.drop_path = args.dtype, 0.0
    config.model.patch_size = 8 if args.model == "vit_micro" else None
    config.optim.freeze_last_layer_epochs, config.optim.warmup_epochs = 0.0, 0.0
    for item in args.set:
        key, _, value = item.partition("=")
        section, name = key.split(".")
        with contextlib.suppress(ValueError, SyntaxError):  # a word stays one
            value = ast.literal_eval(value)
        config[section][name] = value
    validate(config)
    return config_lib.resolve(config, IMAGES, all_hardware())


class Setup:
    """Everything of a step but the data."""

    def __init__(self, config: ConfigDict) -> None:
        self.config, self.network = config, make_network(config)
        self.optimizer = adamw(config.optim.clip_grad, freeze_steps=0)
        self.schedules = make_schedules(config, IMAGES)
        self.state = jax.jit(lambda: init_state(config, self.network, self.optimizer))()

    def views(self) -> tuple[jax.Array, ...]:
        """Random normalised crops [B, V, side, side, 3] float32."""
        views, batch = self.config.views, self.config.train.batch_size
        sizes = [(2, views.global_px)] + ([(views.local_count, views.local_px)] if views.local_count else [])
        rng = np.random.default_rng(0)
        return jax.device_put(
            tuple(rng.standard_normal((batch, count, side, side, 3), dtype=np.float32) for count, side in sizes)
        )

    def batch(self) -> Batch:
        """Random uint8 images on their canvas."""
        count, side = self.config.train.batch_size, self.config.data.canvas_px
        pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        return jax.device_put(Batch(pixels, np.full((count, 2), side, np.int32), np.arange(count, dtype=np.int32)))

    def compiled(self, augment: bool) -> tuple[jax.stages.Compiled, object]:
        """(the step, what it takes beside the state); the state is donated."""
        if augment:
            step, data = make_train_step(self.config, self.network, self.optimizer, self.schedules), self.batch()
        else:
            gradients, teach = make_gradients(self.config, self.network, self.schedules), make_teach(self.config, self.network)
            apply, data = make_apply(self.optimizer, self.schedules), self.views()
            keys = jax.random.split(jax.random.key(0), self.config.train.batch_size)
            step = lambda state, views: apply(state, *gradients(state, Crops(views), teach(state.teacher, views[0]), keys))
        compiled = jax.jit(step, donate_argnums=0).lower(self.state, data).compile()
        return_free_memory()  # as the training loop does
        return compiled, data


def phases(setup: Setup) -> dict[str, tuple[Callable, tuple]]:
    """The parts of a step as (function, arguments); those of the student with their backward passes."""
    config, network, state = setup.config, setup.network, setup.state
    teacher_network = with_dtype(network, jnp.dtype(config.model.teacher_dtype))
    views, batch = setup.views(), setup.batch()

    def total(tree: object) -> jax.Array:
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))

    def backbone(params: dict, views: tuple[jax.Array, ...]) -> tuple:
        groups = (views,) if config.model.packed_views else [(group,) for group in views]
        encode = lambda groups: network.backbone.apply({"params": params}, groups, None, method="encode")
        return tuple((named["patch_tokens"], named.get("cls_token")) for group in groups for named in encode(group))

    def read(params: dict, tokens: tuple) -> list:
        named = [{"patch_tokens": patches, "cls_token": cls} for patches, cls in tokens]
        apply = lambda network: [network.read(one) for one in named]
        encoded = network.apply({"params": params}, method=apply)
        return [getattr(one, name) for one in encoded for name in read_fields(config)]

    def objective(
        views: tuple, prototypes: PrototypePair, teacher: tuple, rows: PrototypePair, weights: jax.Array
    ) -> jax.Array:
        return cmd_objective(
            views,
            prototypes,
            teacher,
            rows,
            weights,
            state.centers,
            weights=term_weights(config),
            region_weights=config.method.region_weights,
            student_temp=config.method.student_temp,
            teacher_temp=config.method.teacher_temp,
            center_momentum=0.9,
            streaming=make_streaming(config),
        ).loss

    def teacher_forward(params: dict, views: tuple[jax.Array, ...]) -> list:
        (encoded,), _ = encode_views(teacher_network, params, views, None)
        return [getattr(encoded, name) for name in read_fields(config)]

    def optimize(state: TrainState, gradients: dict) -> tuple:
        updates, optimizer = setup.optimizer.update(
            gradients, state.optimizer, state.student, learning_rate=1e-4, weight_decay=0.04
        )
        student = optax.apply_updates(state.student, updates)
        return student, ema(state.teacher, student, 0.99), optimizer

    rows = lambda params: PrototypePair(*network.apply({"params": params}, method="prototype_rows"))
    tokens = jax.jit(backbone)(state.student["backbone"], views)
    encode = jax.jit(lambda network, params, views: encode_views(network, params, views, None)[1], static_argnums=0)
    student, (teacher,) = encode(network, state.student, views), encode(teacher_network, state.teacher, views[:1])
    prototypes = jax.jit(rows)(state.student)
    gradient = lambda f, argnums: jax.grad(lambda *arguments: total(f(*arguments)), argnums)
    return {
        "augment": (
            lambda batch: multi_crop(jax.random.key(0), *batch, views=config.views, normalization=config.data.normalization),
            (batch,),
        ),
        "teacher": (teacher_forward, (state.teacher, views[:1])),
        "student backbone": (gradient(backbone, 0), (state.student["backbone"], views)),
        "student heads": (gradient(read, (0, 1)), (state.student, tokens)),
        "loss": (jax.grad(objective, (0, 1, 4)), (student, prototypes, teacher, prototypes, teacher.mil_weights)),
        "optimizer, EMA": (optimize, (state, state.student)),
    }


def time_phases(setup: Setup, rounds: int = 3) -> dict[str, float]:
    """Least process CPU-seconds (wall seconds on an accelerator) of every part."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = {}
    for name, (function, arguments) in phases(setup).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        seconds[name] = float("inf")
        for _ in range(rounds):
            start = clock()
            jax.block_until_ready(compiled(*arguments))
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def matrix_ceiling(dtype: str) -> float:
    """Floating-point operations a second of a large matrix product, the best of several."""
    cpu = jax.default_backend() == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    side = 2048 if cpu else 8192
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: jnp.einsum("ij,jk->ik", a, a, precision="highest" if dtype == "float32" else None))
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(5):
        start = clock()
        jax.block_until_ready(product(a))
        best = min(best, clock() - start)
    return 2 * side**3 / best


def main() -> None:
    args = parser().parse_args()
    replies = worker.claim_stdout() if args.serve else None
    config = make_config(args)
    setup = Setup(config)
    if args.phases:
        seconds = time_phases(setup)
        for name, value in seconds.items():
            print(f"{name:20}{value:9.3f} s")
        print(f"{'sum':20}{sum(seconds.values()):9.3f} s")
        print(json.dumps(seconds))
        return
    started = time.perf_counter()
    step, data = setup.compiled(args.augment)
    compile_s = time.perf_counter() - started
    state, loss = setup.state, None
    setup.state = None  # donated below

    def run() -> None:
        nonlocal state, loss
        state, metrics = step(state, data)
        loss = float(metrics["loss"])

    run()
    memory = step.memory_analysis()
    info = {
        "loss": loss,
        "parameters": count_parameters(state.student),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "compile_s": compile_s,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_and_batch_bytes": memory.argument_size_in_bytes,
        "model_flops": model_flops(config) * config.train.batch_size,
        "compiled_flops": step.cost_analysis()["flops"],  # the body of a loop counts once
        "matrix_ceiling_flops_per_s": matrix_ceiling(args.dtype),
    }
    if not args.serve:
        for name, value in info.items():
            print(f"{name:28}{value:,.4g}" if isinstance(value, float) else f"{name:28}{value}")
        for _ in range(3):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            print(f"loss {loss:.4f}  {time.perf_counter() - wall:.3f} s, {time.process_time() - cpu:.3f} CPU-seconds")
        return

    def device_peak() -> dict:
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"device_peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}

    worker.serve(run, info, replies=replies, extra=device_peak)


if __name__ == "__main__":
    main()
