"""Weak scaling predicted from compiled programs: what one chip computes and sends in a step, from 1 chip to 256.

    python -m benchmarks.scaling                     # 1, 2, 4 and 8 simulated devices of a CPU
    make scaling                                     # v5e slices too, compiled for by libtpu; nothing runs

CMD, ViT-S/16, K = 65,536, 64 images a chip. For every mesh the real step is compiled in a process of its own and its
collectives are read (`benchmarks.collectives`). Per chip and step:

- FLOPs are those that the method needs (`training.flops.model_flops`). The compiler's own FLOPs and bytes count the body of a
  loop once; they are printed as they are and not used.
- Bytes on the wire are those of ring algorithms.
- A step takes FLOPs / 197 TFLOP/s of v5e; the less time the products take, the harder is the target. `--utilization=0.4`
  says that they reach 40 % of it.
- Sending takes wire bytes / bandwidth of the links that are used, 50 GB/s each way. Pessimistic: nothing overlaps with
  products, links of one axis (two); and each of a collective's hops between neighbours costs 1 us. Optimistic: all of it
  overlaps, links of both axes (four).

Efficiency is the time of one chip by itself over that of one of many. The target, 95 % at 256 chips, is that of the
pessimistic figure. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = 0.95
HOP_S = 1e-6
IMAGES_PER_CHIP = 64
# Of a program that never runs: its machine code, not its collectives, would take most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
TASK = ("model.name=vit_small", "head.prototypes=65536", "model.dtype=bfloat16", "model.remat=full")
SIMULATED = ("cpu:1", "cpu:2", "cpu:4", "cpu:8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--meshes",
        nargs="+",
        default=list(SIMULATED),
        metavar="DEVICES",
        help="cpu:COUNT or v5e:SHAPE (%(default)s)",
    )
    add("--images_per_chip", type=int, default=IMAGES_PER_CHIP, help="%(default)s")
    add("--utilization", type=float, default=1.0, help="share of a chip's peak that products reach (%(default)s)")
    add("--settings", default="", metavar="'KEY=VALUE ...'", help=f"beside {' '.join(TASK)}")
    add("--measure", metavar="MESH", help=argparse.SUPPRESS)
    return parser


def chips_of(mesh: str) -> int:
    """How many devices a mesh has."""
    return math.prod(map(int, mesh.split(":")[1].split("x")))


def measure(mesh: str, images_per_chip: int, extra: list[str]) -> dict:
    """Compiles the step for one mesh, in this process, and reads it."""
    import jax  # the environment that the parent sets decides how many devices there are

    from benchmarks.ahead import attempt, build, topology_devices
    from benchmarks.collectives import collectives
    from cmd_jax.training.flops import model_flops

    devices = jax.devices() if mesh.startswith("cpu:") else topology_devices(mesh)
    batch = images_per_chip * len(devices)
    # What suits a TPU on simulated devices too: the same step on all.
    run = build([*TASK, f"train.batch_size={batch}", *extra], devices)
    result = attempt(run)
    row = {"mesh": mesh, "chips": len(devices), "batch_size": batch, "compile_s": result.seconds}
    row |= {"bytes_per_chip": result.needed_bytes, "flops": model_flops(run.config) * images_per_chip}
    if result.compiled is None:
        return row
    cost = result.compiled.cost_analysis()
    found = collectives(result.compiled.as_text())
    return row | {
        "parameter_bytes": 4 * sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state().student)),
        "compiler_flops": cost["flops"],
        "compiler_bytes": cost["bytes accessed"],
        "collectives": [one._asdict() | {"shapes": str(one.shapes)} for one in found if one.group_size > 1],
        "uncounted": sum(one.executions is None for one in found),
        "wire_bytes": sum(one.wire_bytes for one in found if one.executions is not None),
    }


def predict(row: dict, utilization: float) -> dict:
    """Seconds and efficiencies of a row of `measure`."""
    from benchmarks.ahead import CHIPS

    chip = CHIPS["v5e"]
    products = row["flops"] / chip.flops_per_s / utilization
    hops = sum(2 * math.ceil(math.sqrt(one["group_size"])) * (one["executions"] or 0) for one in row["collectives"])
    one_axis, both_axes = (row["wire_bytes"] / (links * chip.link_bytes_per_s) for links in (2, 4))
    return {
        "products_s": products,
        "sending_s": {"pessimistic": one_axis + hops * HOP_S, "optimistic": both_axes},
        "efficiency": {
            "pessimistic": products / (products + one_axis + hops * HOP_S),
            "optimistic": products / max(products, both_axes),
        },
    }


def by_kind(row: dict) -> dict[str, dict[str, float]]:
    """Collectives summed up: instructions, executions and bytes by op and group size."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"instructions": 0, "executions": 0, "bytes": 0})
    for one in row["collectives"]:
        kind = kinds[f"{one['op']} of {one['group_size']}"]
        kind["instructions"] += 1
        kind["executions"] += one["executions"] or 0
        kind["bytes"] += one["bytes"] * (one["executions"] or 0)
    return dict(kinds)


def child(mesh: str, args: argparse.Namespace) -> dict:
    """`measure` in a process of its own, with its devices."""
    kind, shape = mesh.split(":")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if kind == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={shape} {QUICK}"
    command = [sys.executable, "-m", "benchmarks.scaling", f"--measure={mesh}", f"--images_per_chip={args.images_per_chip}"]
    done = subprocess.run(
        [*command, f"--settings={args.settings}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {mesh} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def lines(row: dict) -> list[str]:
    """A row as text."""
    if "collectives" not in row:
        return [f"{row['mesh']:12} does not fit: {row['bytes_per_chip'] / 2**30:.1f} GiB a chip"]
    efficiency, sending = row["efficiency"], row["sending_s"]
    text = [
        f"{row['mesh']:12} {row['flops'] / 1e12:6.2f} {row['products_s'] * 1e3:9.1f} {row['wire_bytes'] / 2**20:9.1f} "
        f"{sending['optimistic'] * 1e3:6.2f} .. {sending['pessimistic'] * 1e3:6.2f} "
        f"{efficiency['pessimistic']:8.1%} .. {efficiency['optimistic']:6.1%} "
        f"{row['compiler_flops'] / 1e12:9.2f} {row['compiler_bytes'] / 1e9:6.0f} "
        f"{row['bytes_per_chip'] / 2**30:6.1f} {row['compile_s']:7.0f}"
    ]
    for kind, of_kind in by_kind(row).items():
        counts = f"{of_kind['instructions']} instructions, {of_kind['executions']} executions"
        text.append(f"{'':14}{kind}: {counts}, {of_kind['bytes'] / 2**20:.1f} MiB")
    reduced = sum(kind["bytes"] for kind in by_kind(row).values())
    text.append(
        f"{'':14}{reduced / row['parameter_bytes']:.2f} times the {row['parameter_bytes'] / 2**20:.1f} MiB of gradients"
    )
    if row["uncounted"]:
        text.append(f"{'':14}{row['uncounted']} in loops of unknown trip count are not counted")
    return text


def main() -> None:
    args = parser().parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.images_per_chip, args.settings.split())))
        return
    rows = []
    print("mesh          TFLOP  products  MiB sent   sending ms          efficiency       TFLOP, GB once    GiB  compile s")
    for mesh in args.meshes:
        row = child(mesh, args)
        if "collectives" in row:
            row |= predict(row, args.utilization)
        rows.append(row)
        print("\n".join(lines(row)), flush=True)
    met = {
        row["mesh"]: row["efficiency"]["pessimistic"] >= TARGET for row in rows if row["chips"] == 256 and "efficiency" in row
    }
    for mesh, reached in met.items():
        print(f"target of {TARGET:.0%} at 256 chips, {mesh}: {'met' if reached else 'missed'}")
    print(json.dumps({"target": TARGET, "met": met, "utilization": args.utilization, "meshes": rows}))


if __name__ == "__main__":
    main()
