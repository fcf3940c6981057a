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

from benchmarks.timing import Timed, alternate, spread_of, torch_python, use_one_core

GIB = 2**30


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
    add("--torch_python", help="a Python with torch and transformers, or none; default: .venv-interop's, if it is there")
    return parser


def measure(args: argparse.Namespace, case: str, python: str | None) -> dict:
    """Both sides of one case."""
    method, prototypes, batch = case.split(":")
    sizes = [f"--{name}={getattr(args, name)}" for name in ("model", "dtype", "local_count", "global_px", "local_px")]
    sizes += [f"--method={method}", f"--prototypes={prototypes}", f"--batch_size={batch}"]
    ours = [sys.executable, "-m", "benchmarks.jax_step", *sizes, *(f"--set={item}" for item in args.set)]
    sides = {"jax": (ours, {"JAX_PLATFORMS": args.device})}
    if python:
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
