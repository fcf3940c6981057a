"""Weak scaling predicted from compiled programs: what one chip computes and sends in a step, from 1 chip to 256.

    python -m benchmarks.scaling --devices 1 2 4 8 256

CMD, ViT-S/16, K = 65,536, 64 images a chip. The real step is compiled for simulated devices of a CPU, each number of them in a
process of its own, and its collectives are read (`benchmarks.collectives`); nothing runs. Per chip and step:

- FLOPs are those that the method needs (`training.flops.model_flops`).
- Bytes on the wire are those of ring algorithms.
- A step takes FLOPs / 197 TFLOP/s of a v5e; the less time the products take, the harder is the target. `--utilization=0.4`
  says that they reach 40 % of it.
- Sending takes wire bytes / bandwidth of the links that are used, 50 GB/s each way. Pessimistic: nothing overlaps with
  products, links of one axis (two); and each of a collective's hops between neighbours costs 1 us. Optimistic: all of it
  overlaps, links of both axes (four).

Efficiency is the time of one chip alone over that of one of many. The target, 95 % at 256 chips, is for the pessimistic
figure. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict

from benchmarks.timing import ROOT

TARGET = 0.95
HOP_S = 1e-6
# Of a v5e (docs.cloud.google.com/tpu/docs/v5e): products in bfloat16, and one of four links in one direction.
FLOPS_PER_S, LINK_BYTES_PER_S = 197e12, 50e9
# The program never runs: generating its code would take most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
TASK = ("model.name=vit_small", "head.prototypes=65536", "model.dtype=bfloat16", "model.remat=full")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--devices", nargs="+", type=int, default=[1, 2, 4, 8], metavar="COUNT", help="%(default)s")
    add("--images_per_chip", type=int, default=64, help="%(default)s")
    add("--utilization", type=float, default=1.0, help="share of a chip's peak that products reach (%(default)s)")
    add("--settings", default="", metavar="'KEY=VALUE ...'", help=f"beside {' '.join(TASK)}")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure(images_per_chip: int, extra: list[str]) -> dict:
    """Compiles the step for the devices of this process and reads it."""
    import jax  # the environment that the parent sets decides how many devices there are

    from benchmarks.collectives import collectives
    from benchmarks.tpu_compile import build, memory_of
    from cmd_jax.training.flops import model_flops

    devices = jax.devices()
    batch = images_per_chip * len(devices)
    run = build([*TASK, f"train.batch_size={batch}", *extra], devices)
    compiled = run.compile()
    found = collectives(compiled.as_text())
    return {
        "chips": len(devices),
        "batch_size": batch,
        "bytes_per_chip": sum(memory_of(compiled)),
        "flops": model_flops(run.config) * images_per_chip,
        "parameter_bytes": 4 * sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state().student)),
        "collectives": [{**one._asdict(), "shapes": str(one.shapes)} for one in found if one.group_size > 1],
        "uncounted": sum(one.executions is None for one in found),
        "wire_bytes": sum(one.wire_bytes for one in found if one.executions is not None),
    }


def predict(row: dict, utilization: float) -> dict:
    """Seconds and efficiencies of a row of `measure`."""
    products = row["flops"] / FLOPS_PER_S / utilization
    hops = sum(2 * math.ceil(math.sqrt(one["group_size"])) * (one["executions"] or 0) for one in row["collectives"])
    one_axis, both_axes = (row["wire_bytes"] / (links * LINK_BYTES_PER_S) for links in (2, 4))
    return {
        "products_s": products,
        "sending_s": {"pessimistic": one_axis + hops * HOP_S, "optimistic": both_axes},
        "efficiency": {
            "pessimistic": products / (products + one_axis + hops * HOP_S),
            "optimistic": products / max(products, both_axes),
        },
    }


def child(devices: int, args: argparse.Namespace) -> dict:
    """`measure` in a process with that many devices."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}"}
    command = [sys.executable, "-m", "benchmarks.scaling", "--measure", f"--images_per_chip={args.images_per_chip}"]
    command += [f"--settings={args.settings}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {devices} devices failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def lines(row: dict) -> list[str]:
    """A row as text: the prediction, then the collectives by op and group size."""
    efficiency, sending = row["efficiency"], row["sending_s"]
    text = [
        f"{row['chips']:5} chips: {row['flops'] / 1e12:.2f} TFLOP, products {row['products_s'] * 1e3:.1f} ms, "
        f"{row['wire_bytes'] / 2**20:.1f} MiB sent in {sending['optimistic'] * 1e3:.2f} to "
        f"{sending['pessimistic'] * 1e3:.2f} ms, "
        f"efficiency {efficiency['pessimistic']:.1%} to {efficiency['optimistic']:.1%}, {row['bytes_per_chip'] / 2**30:.1f} GiB"
    ]
    executions: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for one in row["collectives"]:
        kind = f"{one['op']} of {one['group_size']}"
        executions[kind] += one["executions"] or 0
        sizes[kind] += one["bytes"] * (one["executions"] or 0)
    text += [f"      {kind}: {executions[kind]} executions, {size / 2**20:.1f} MiB" for kind, size in sizes.items()]
    text.append(f"      {sum(sizes.values()) / row['parameter_bytes']:.2f} times the gradients")
    if row["uncounted"]:
        text.append(f"      {row['uncounted']} in loops of unknown trip count are not counted")
    return text


def main() -> None:
    args, rows = parser().parse_args(), []
    if args.measure:
        print(json.dumps(measure(args.images_per_chip, args.settings.split())))
        return
    for devices in args.devices:
        row = child(devices, args)
        rows.append(row | predict(row, args.utilization))
        print("\n".join(lines(rows[-1])), flush=True)
    met = {str(row["chips"]): row["efficiency"]["pessimistic"] >= TARGET for row in rows if row["chips"] == 256}
    print(json.dumps({"target": TARGET, "met": met, "utilization": args.utilization, "meshes": rows}))


if __name__ == "__main__":
    main()
