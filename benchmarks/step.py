"""A full training step, ours against the PyTorch one that a user would run instead, on this machine.

    python -m benchmarks.step
    python -m benchmarks.step --cases=cmd:65536:1 --rounds=5
    python -m benchmarks.step --cases=cmd:65536:64 --model=vit_small --dtype=bfloat16 --device=cuda --compile

A step takes given crops (2 x 224 and 8 x 96 px): teacher and student forward, loss, backward, clipping, AdamW, EMA, centers.
Both sides have the same sizes, allocator settings and cores, each in a process of its own, and take turns; a figure is a
median. On a CPU time is the process's CPU-seconds, which other programs on the machine disturb least, on one core; on a GPU
it is wall time. PyTorch's side is `benchmarks/torch_step.py`; without a Python that has torch and transformers only ours is
measured. The parts of our step are timed too, each compiled by itself: augmentation, which the step above does not include,
both networks, the loss, the optimizer. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.worker import Worker

ROOT = Path(__file__).parents[1]
GIB = 2**30
CASES = ["dino:4096:4", "cmd:4096:4", "cmd:65536:2"]
# What both sides allocate with: transparent huge pages for large blocks, and none of the return of memory to the system.
ALLOCATORS = {"huge_pages": "glibc.malloc.hugetlb=1", "default": ""}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cases", nargs="+", default=["dino:4096:4", "cmd:4096:4", "cmd:65536:2"], metavar="METHOD:K:BATCH", help="%(default)s"
    )
    add("--model", default="vit_tiny", choices=["vit_micro", "vit_tiny", "vit_small", "swin_tiny"], help="%(default)s")
    add("--rounds", type=int, default=5, help="of one step on each side (%(default)s)")
    add("--local_count", type=int, default=8, help="local views (%(default)s)")
    add("--global_px", type=int, default=224, help="%(default)s")
    add("--local_px", type=int, default=96, help="%(default)s")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="%(default)s")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="of both sides (%(default)s)")
    add("--core", type=int, default=0, help="of the CPU, for both sides (%(default)s)")
    add("--allocator", default="huge_pages", choices=list(ALLOCATORS), help="%(default)s")
    add("--compile", action="store_true", help="torch.compile on PyTorch's side")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our configuration; may be repeated")
    add("--torch_python", default=None, help="a Python with torch and transformers; default: .venv-interop's, if it is there")
    return parser


def torch_python(given: str | None) -> str | None:
    """Who runs PyTorch's side, or None."""
    if given:
        return given
    built = ROOT / ".venv-interop" / "bin" / "python"
    return str(built) if built.exists() else None


def measure(args: argparse.Namespace, method: str, prototypes: int, batch: int) -> dict:
    """Both sides of one case."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("model", "dtype", "local_count", "global_px", "local_px")]
    sizes += [f"--method={method}", f"--prototypes={prototypes}", f"--batch_size={batch}"]
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATORS[args.allocator]}
    ours = [sys.executable, "-m", "benchmarks.jax_step", *sizes, *(f"--set={item}" for item in args.set)]
    sides = {"jax": ([*ours, "--serve"], environment | {"JAX_PLATFORMS": args.device})}
    if python := torch_python(args.torch_python):
        theirs = [python, "-m", "benchmarks.torch_step", *sizes, "--serve", f"--device={args.device}"]
        theirs += ["--compile"] * args.compile
        sides["torch"] = (theirs, environment)
    workers, replies = {}, {}
    try:
        for name, (argv, env) in sides.items():
            workers[name] = Worker(argv, env)
            replies[name] = [workers[name].run(1)]  # warm: not counted
        for _ in range(args.rounds):
            for name, worker in workers.items():
                replies[name].append(worker.run(1))
        infos = {name: worker.info for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    result = summary(args, {"method": method, "prototypes": prototypes, "batch_size": batch}, infos, replies)
    out = subprocess.run([*ours, "--phases"], env=sides["jax"][1], stdout=subprocess.PIPE, text=True, check=True)
    return result | {"phases_s": json.loads(out.stdout.splitlines()[-1])}


def summary(args: argparse.Namespace, case: dict, infos: dict, replies: dict) -> dict:
    """Medians, spreads and ratios of one case."""
    clock = "cpu_s" if args.device == "cpu" else "wall_s"
    peak_of = lambda reply: reply.get("device_peak_bytes", reply["peak_rss_bytes"])
    result = dict(case)
    seconds = {name: [reply[clock][0] for reply in of_side[1:]] for name, of_side in replies.items()}
    for name, values in seconds.items():
        result[f"{name}_step_s"] = statistics.median(values)
        result[f"{name}_step_s_range"] = [min(values), max(values)]
        result[f"{name}_images_per_s"] = case["batch_size"] / statistics.median(values)
        result[f"{name}_peak_bytes"] = max(map(peak_of, replies[name]))
    ours = infos["jax"]
    result["model_flops_per_image"] = ours["model_flops"] / case["batch_size"]
    result["matrix_ceiling_flops_per_s"] = ours["matrix_ceiling_flops_per_s"]
    result["mfu"] = ours["model_flops"] / result["jax_step_s"] / ours["matrix_ceiling_flops_per_s"]
    result["compile_s"] = ours["compile_s"]
    result["temporary_bytes"] = ours["temporary_bytes"]
    if "torch" in seconds:
        # neighbours in time share what the machine was doing
        ratios = [theirs / mine for mine, theirs in zip(seconds["jax"], seconds["torch"], strict=True)]
        result["images_per_s_ratio"] = statistics.median(ratios)
        result["images_per_s_ratio_range"] = [min(ratios), max(ratios)]
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
    text.append(
        f"  {result['model_flops_per_image'] / 1e9:.1f} GFLOP an image, MFU {result['mfu']:.2f} of "
        f"{result['matrix_ceiling_flops_per_s'] / 1e9:,.0f} GFLOP/s; compiled in {result['compile_s']:.0f} s, "
        f"{result['temporary_bytes'] / GIB:.2f} GiB temporary"
    )
    text.append("  by itself: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["phases_s"].items()))
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
        os.sched_setaffinity(0, {args.core})  # of the children too
    if torch_python(args.torch_python) is None:
        print("no Python with PyTorch: only our side is measured; `make .venv-interop/.installed` builds one")
    results = []
    for case in args.cases:
        method, prototypes, batch = case.split(":")
        results.append(measure(args, method, int(prototypes), int(batch)))
        print("\n".join(lines(results[-1])), flush=True)
    final = {"device": args.device, "model": args.model, "dtype": args.dtype, "allocator": args.allocator, "cases": results}
    for method in ("dino", "cmd"):
        of_method = [result for result in results if result["method"] == method and "images_per_s_ratio" in result]
        if of_method:
            largest = max(of_method, key=lambda result: result["prototypes"])
            final[f"{method}_images_per_s_ratio"] = largest["images_per_s_ratio"]
            final[f"{method}_memory_ratio"] = largest["memory_ratio"]
    print(json.dumps(final))


if __name__ == "__main__":
    main()
