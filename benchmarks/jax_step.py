"""Our side of `benchmarks.step`: serves training steps on fixed random crops (`benchmarks.timing`).

Stochastic depth is off and the last layer is never frozen, as on PyTorch's side. `--set=model.remat=full` sets any other key of
the configuration.
"""

import argparse
import time

import jax
import numpy as np

from benchmarks import timing
from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict, validate
from cmd_jax.models.build import count_parameters, make_network
from cmd_jax.training.flops import model_flops
from cmd_jax.training.memory import return_free_memory
from cmd_jax.training.optimizer import adamw
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.sharding import all_hardware
from cmd_jax.training.state import TrainState, init_state
from cmd_jax.training.step import Crops, make_gradients, make_teacher, make_update

IMAGES = 100_000  # size of the imagined data set, on which schedules alone depend


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_step", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a model.name of cmd_jax")
    add("--method", required=True, choices=["dino", "cmd"])
    add("--batch_size", type=int, required=True, help="images")
    add("--prototypes", type=int, required=True, help="K")
    add("--local_count", type=int, required=True, help="local views of an image")
    add("--global_px", type=int, required=True)
    add("--local_px", type=int, required=True)
    add("--dtype", required=True, choices=["float32", "bfloat16"])
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration; may be repeated")
    return parser


def make_config(args: argparse.Namespace) -> ConfigDict:
    """The resolved configuration."""
    config = config_lib.default()
    config.model.name, config.method.name = args.model, args.method
    config.head.prototypes, config.train.batch_size = args.prototypes, args.batch_size
    config.views.local_count, config.views.global_px, config.views.local_px = args.local_count, args.global_px, args.local_px
    config.model.dtype, config.model.drop_path = args.dtype, 0.0
    config.model.patch_size = 8 if args.model == "vit_micro" else None
    config.optim.freeze_last_layer_epochs, config.optim.warmup_epochs = 0.0, 0.0
    timing.set_values(config, args.set)
    validate(config)
    return config_lib.resolve(config, IMAGES, all_hardware())


def random_crops(config: ConfigDict) -> tuple[jax.Array, ...]:
    """Normalised views [B, V, side, side, 3] float32, global and local ones."""
    views, batch = config.views, config.train.batch_size
    sizes = [(2, views.global_px)] + ([(views.local_count, views.local_px)] if views.local_count else [])
    rng = np.random.default_rng(0)
    return jax.device_put(tuple(rng.standard_normal((batch, count, px, px, 3), dtype=np.float32) for count, px in sizes))


def compile_step(config: ConfigDict) -> tuple[jax.stages.Compiled, TrainState, tuple[jax.Array, ...]]:
    """The compiled (state, crops) -> (state, metrics), which takes the state's memory, and its first arguments."""
    network, schedules = make_network(config), make_schedules(config, IMAGES)
    optimizer = adamw(config.optim.clip_grad, freeze_steps=0)
    state = jax.jit(lambda: init_state(config, network, optimizer))()
    gradients, teacher = make_gradients(config, network, schedules), make_teacher(config, network)
    update, crops = make_update(optimizer, schedules), random_crops(config)
    keys = jax.random.split(jax.random.key(0), config.train.batch_size)
    step = lambda state, views: update(state, *gradients(state, Crops(views), teacher(state.teacher, views[0]), keys))
    compiled = jax.jit(step, donate_argnums=0).lower(state, crops).compile()
    return_free_memory()  # as the training loop does
    return compiled, state, crops


def main() -> None:
    args = parser().parse_args()
    replies = timing.claim_stdout()
    config = make_config(args)
    started = time.perf_counter()
    step, state, crops = compile_step(config)
    compile_s = time.perf_counter() - started

    def run() -> float:
        nonlocal state
        state, metrics = step(state, crops)
        return float(metrics["loss"])

    info = {
        "loss": run(),
        "parameters": count_parameters(state.student),
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
        "compile_s": compile_s,
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "model_flops_per_image": model_flops(config),
    }

    def device_peak() -> dict:
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"device_peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}

    timing.serve(run, info, replies, device_peak)


if __name__ == "__main__":
    main()
