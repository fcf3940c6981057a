"""A full training step, ours against the PyTorch one that a user would run instead, on this machine.

    python -m benchmarks.step
    python -m benchmarks.step --cases cmd:65536:1 --rounds=5
    python -m benchmarks.step --cases cmd:65536:64 --model=vit_small --dtype=bfloat16 --device=cuda --compile

A step takes given crops (2 x 224 and 8 x 96 px): teacher and student forward, loss, backward, clipping, AdamW, EMA, centers.
Both sides have the same sizes and cores, each in a process of its own, and take turns; a figure is a median. On a CPU time is
the CPU seconds of the process, which other programs on the machine disturb least, on one core; on a GPU it is wall time. The
other side is `benchmarks/torch_step.py`; without a Python that has torch and transformers only ours is measured. The last line
is one JSON object.
"""

import argparse
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Timed, alternate, claim_stdout, serve, set_values, spread_of, torch_python, use_one_core
from cmd_jax import config as config_lib
from cmd_jax.config import ConfigDict, validate
from cmd_jax.models.build import count_parameters, make_network
from cmd_jax.training.flops import model_flops
from cmd_jax.training.memory import return_free_memory
from cmd_jax.training.optimizer import Group, adamw
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.sharding import all_hardware
from cmd_jax.training.state import TrainState, init_state
from cmd_jax.training.step import Crops, make_gradients, make_teacher, make_update

GIB = 2**30
IMAGES = 100_000  # size of the imagined data set, on which schedules alone depend
# Stochastic depth is off and the last layer is never frozen, as on PyTorch's side.
SAME = ("model.drop_path=0.0", "optim.freeze_last_layer_epochs=0.0", "optim.warmup_epochs=0.0")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cases = ["dino:4096:4", "cmd:4096:4", "cmd:65536:2"]
    add("--cases", nargs="+", default=cases, metavar="METHOD:K:BATCH", help="%(default)s")
    add("--model", default="vit_tiny", choices=["vit_micro", "vit_tiny", "vit_small"], help="%(default)s")
    add("--rounds", type=int, default=5, help="of one step on each side (%(default)s)")
    add("--local_count", type=int, default=8, help="local views (%(default)s)")
    add("--global_px", type=int, default=224, help="%(default)s")
    add("--local_px", type=int, default=96, help="%(default)s")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="%(default)s")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="of both sides (%(default)s)")
    add("--compile", action="store_true", help="torch.compile on PyTorch's side")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our configuration; may be repeated")
    add("--torch_python", help="a Python with torch and transformers, or none; default: .venv-interop's or this one")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def random_crops(config: ConfigDict) -> tuple[jax.Array, ...]:
    """Normalised views [B, V, side, side, 3] float32, global and local ones."""
    views, batch = config.views, config.train.batch_size
    sizes = [(2, views.global_px)] + ([(views.local_count, views.local_px)] if views.local_count else [])
    rng = np.random.default_rng(0)
    return jax.device_put(tuple(rng.standard_normal((batch, count, px, px, 3), dtype=np.float32) for count, px in sizes))


def compile_step(config: ConfigDict) -> tuple[jax.stages.Compiled, TrainState, tuple[jax.Array, ...]]:
    """The compiled (state, crops) -> (state, metrics), which takes the state's memory, and its first arguments."""
    network, schedules = make_network(config), make_schedules(config, IMAGES)
    optimizer = adamw(config.optim.clip_grad, lambda name: Group())
    state = jax.jit(lambda: init_state(config, network, optimizer, IMAGES))()
    gradients, teacher = make_gradients(config, network, schedules), make_teacher(config, network)
    update, crops = make_update(optimizer, schedules), random_crops(config)
    batch = config.train.batch_size
    keys, index = jax.random.split(jax.random.key(0), batch), jnp.arange(batch)
    step = lambda state, views: update(state, *gradients(state, Crops(views), teacher(state.teacher, views[0]), keys, index))
    compiled = jax.jit(step, donate_argnums=0).lower(state, crops).compile()
    return_free_memory()  # as the training loop does
    return compiled, state, crops


def serve_steps(settings: list[str]) -> None:
    """The process of our side: serves training steps on fixed random crops."""
    replies = claim_stdout()
    config = config_lib.default()
    set_values(config, settings)
    validate(config)
    config = config_lib.resolve(config, IMAGES, all_hardware())
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

    serve(run, info, replies, device_peak)


def measure(args: argparse.Namespace, case: str, python: str | None) -> dict:
    """Both sides of one case."""
    method, prototypes, batch = case.split(":")
    views = ("local_count", "global_px", "local_px")
    settings = [f"model.name={args.model}", f"model.dtype={args.dtype}", f"method.name={method}"]
    settings += [f"head.prototypes={prototypes}", f"train.batch_size={batch}"]
    settings += [f"views.{name}={getattr(args, name)}" for name in views]
    settings += [*SAME, *["model.patch_size=8"] * (args.model == "vit_micro"), *args.set]
    ours = [sys.executable, "-m", "benchmarks.step", "--serve", *(f"--set={item}" for item in settings)]
    sides = {"jax": (ours, {"JAX_PLATFORMS": args.device})}
    if python:
        sizes = [f"--{name}={getattr(args, name)}" for name in ("model", "dtype", *views)]
        sizes += [f"--method={method}", f"--prototypes={prototypes}", f"--batch_size={batch}"]
        theirs = [python, "-m", "benchmarks.torch_step", *sizes, f"--device={args.device}", *["--compile"] * args.compile]
        sides["torch"] = (theirs, {})
    timed = alternate(sides, args.rounds)
    return {"method": method, "prototypes": int(prototypes)} | summary(timed, int(batch), args.device)


def summary(timed: dict[str, Timed], batch: int, device: str) -> dict:
    """Medians, spreads and ratios of one case."""
    seconds = {name: side.seconds("cpu_s" if device == "cpu" else "wall_s") for name, side in timed.items()}
    result = {"batch_size": batch, **timed["jax"].info}
    for name, side in timed.items():
        median, low, high = spread_of(seconds[name])
        result[f"{name}_step_s"], result[f"{name}_step_s_range"] = median, [low, high]
        result[f"{name}_images_per_s"] = batch / median
        result[f"{name}_peak_bytes"] = side.peak_bytes()
    if "torch" in timed:
        # Of the same round, so that both met the same state of the machine.
        ratio = spread_of([theirs / ours for ours, theirs in zip(seconds["jax"], seconds["torch"], strict=True)])
        result["images_per_s_ratio"], result["images_per_s_ratio_range"] = ratio.median, [ratio.low, ratio.high]
        result["memory_ratio"] = result["jax_peak_bytes"] / result["torch_peak_bytes"]
    return result


def lines(result: dict) -> list[str]:
    """A case as text."""
    text = [f"{result['method']}, K = {result['prototypes']:,}, batch {result['batch_size']}"]
    for name in ("jax", "torch"):
        if f"{name}_step_s" in result:
            low, high = result[f"{name}_step_s_range"]
            text.append(
                f"  {name:6}{result[f'{name}_step_s']:8.3f} s a step ({low:.3f} to {high:.3f}), "
                f"{result[f'{name}_images_per_s']:.2f} images/s, peak {result[f'{name}_peak_bytes'] / GIB:.2f} GiB"
            )
    if "images_per_s_ratio" in result:
        low, high = result["images_per_s_ratio_range"]
        text.append(
            f"  images/s, ours / PyTorch {result['images_per_s_ratio']:.2f} ({low:.2f} to {high:.2f}); "
            f"peak memory, ours / PyTorch {result['memory_ratio']:.2f}"
        )
    return text


def main() -> None:
    args = parser().parse_args()
    if args.serve:
        serve_steps(args.set)
        return
    if args.device == "cpu":
        use_one_core()
    python, results = torch_python(args.torch_python), []
    for case in args.cases:
        results.append(measure(args, case, python))
        print("\n".join(lines(results[-1])), flush=True)
    final = {"device": args.device, "model": args.model, "dtype": args.dtype, "cases": results}
    for result in sorted(results, key=lambda result: result["prototypes"]):
        if "images_per_s_ratio" in result:  # of the most prototypes
            final[f"{result['method']}_images_per_s_ratio"] = result["images_per_s_ratio"]
            final[f"{result['method']}_memory_ratio"] = result["memory_ratio"]
    print(json.dumps(final))


if __name__ == "__main__":
    main()
