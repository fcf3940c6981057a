"""The real train step compiled for TPU slices that are not here: does it fit, and with which settings?

    make tpu-compile
    python -m benchmarks.tpu_compile --topologies=v5e:2x4 --models=swin_tiny --settings="train.accumulate=8"

CMD with K = 65,536 prototypes and 1,024 images a step, compiled by libtpu's compiler, which refuses what does not fit its
memory: more than ten minutes a case on two cores. Each line has the settings as `--config.SETTING` takes them, the memory on
one chip and the seconds of the compiler. The settings are meant to fit, and the program ends with 1 if some do not. The last
line is one JSON object.
"""

import argparse
import json
import sys
from typing import NamedTuple

from benchmarks.ahead import CHIPS, GIB, NoTopology, attempt, build, memory_of, topology_devices

TASK = ("head.prototypes=65536", "train.batch_size=1024")
TOPOLOGIES = ("v5e:2x4", "v6e:2x4")
MODELS = ("vit_small", "swin_tiny")


class Case(NamedTuple):
    """What is compiled.

    Attributes:
        model: a model.name.
        topology: generation and shape of a slice.
        settings: beside model and TASK.
        meant_to_fit: whether a misfit is a failure.
    """

    model: str
    topology: str
    settings: tuple[str, ...]
    meant_to_fit: bool = True


# Each was compiled to the end with these (docs/performance.md).
FITTING = {
    ("vit_small", "v5e"): ("model.dtype=bfloat16", "model.remat=full"),
    ("vit_small", "v6e"): ("model.dtype=bfloat16", "model.remat=full"),
    ("swin_tiny", "v5e"): ("model.dtype=bfloat16", "train.accumulate=4"),
    ("swin_tiny", "v6e"): ("model.dtype=bfloat16", "train.accumulate=2"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), metavar="GENERATION:SHAPE", help="%(default)s")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="%(default)s")
    parser.add_argument("--settings", metavar="'KEY=VALUE ...'", help="compiled in place of those that are meant to fit")
    return parser


def cases(args: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    chosen = []
    for model in args.models:
        for topology in args.topologies:
            meant = FITTING.get((model, topology.split(":")[0]), ())
            settings = meant if args.settings is None else tuple(args.settings.split())
            chosen.append(Case(model, topology, settings))
    return chosen


def measure(case: Case) -> dict:
    """Compiles one case."""
    run = build((f"model.name={case.model}", *TASK, *case.settings), topology_devices(case.topology))
    result, chip = attempt(run), CHIPS[case.topology.split(":")[0]]
    memory = memory_of(result.compiled)._asdict() if result.compiled else {}
    return case._asdict() | {
        "chips": run.shardings.mesh.size,
        "fits": result.compiled is not None and result.needed_bytes <= chip.hbm_bytes,
        "bytes_per_chip": result.needed_bytes,
        **{f"{name}_bytes": size for name, size in memory.items()},
        "hbm_bytes": chip.hbm_bytes,
        "compile_s": result.seconds,
    }


def line(result: dict) -> str:
    """A result as a line of the table."""
    parts = [f"{name} {result[f'{name}_bytes'] / GIB:.2f}" for name in ("arguments", "temporary", "program") if result["fits"]]
    verdict = "fits" if result["fits"] else "does not fit"
    used = f"{result['bytes_per_chip'] / GIB:6.2f} of {result['hbm_bytes'] / GIB:.0f} GiB"
    return (
        f"{result['model']:10} {result['topology']:8} {used} {verdict:12} {result['compile_s']:5.0f} s  "
        f"{' '.join(result['settings'])}" + (f"  ({', '.join(parts)} GiB)" if parts else "")
    )


def failures(results: list[dict]) -> list[dict]:
    """Those that were meant to fit and do not."""
    return [result for result in results if result["meant_to_fit"] and not result["fits"]]


def main() -> None:
    args, results = parser().parse_args(), []
    for case in cases(args):
        try:
            results.append(measure(case))
        except NoTopology as error:
            sys.exit(f"error: {error}")
        print(line(results[-1]), flush=True)
    print(json.dumps({"prototypes": 65_536, "batch_size": 1024, "cases": results}))
    sys.exit(1 if failures(results) else 0)


if __name__ == "__main__":
    main()
