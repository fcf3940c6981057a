"""The real train step compiled for TPU slices that are not here: does it fit, and with which settings?

    make tpu-compile
    python -m benchmarks.tpu_compile --topologies=v5e:2x4 --models=swin_tiny --settings="train.accumulate=8"

CMD with K = 65,536 prototypes and 1,024 images a step, compiled by the compiler inside libtpu, which refuses what does not fit
its memory: more than ten minutes a case on two cores. Nothing runs. Each line has the settings as `--config.SETTING` takes
them, the memory on one chip and the seconds of the compiler. The program ends with 1 if a case does not fit. The last line is
one JSON object.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from benchmarks.timing import set_values
from cmd_jax import config as config_lib
from cmd_jax.config import Hardware
from cmd_jax.training.run import Run, build_run

IMAGES = 100_000  # size of the imagined data set, on which schedules alone depend
GIB = 2**30
TASK = ("head.prototypes=65536", "train.batch_size=1024")
HBM_BYTES = {"v5e": 16 * GIB, "v6e": 32 * GIB}  # docs.cloud.google.com/tpu/docs/v5e and /v6e
TOPOLOGIES = ("v5e:2x4", "v6e:2x4")
# Each was compiled to the end with these (docs/performance.md).
FITTING = {
    ("vit_small", "v5e"): ("model.dtype=bfloat16", "model.remat=full"),
    ("vit_small", "v6e"): ("model.dtype=bfloat16", "model.remat=full"),
    ("swin_tiny", "v5e"): ("model.dtype=bfloat16", "train.accumulate=4"),
    ("swin_tiny", "v6e"): ("model.dtype=bfloat16", "train.accumulate=2"),
}
MODELS = tuple(dict.fromkeys(model for model, _ in FITTING))


class Memory(NamedTuple):
    """Bytes on one device: arguments (state and batch; results take their place), temporary arrays, the program."""

    arguments: int
    temporary: int
    program: int


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), metavar="GENERATION:SHAPE", help="%(default)s")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="%(default)s")
    parser.add_argument("--settings", metavar="'KEY=VALUE ...'", help="instead of those that are known to fit")
    return parser


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice such as "v5e:2x4", to compile for; nothing can be put on them.

    Raises:
        SystemExit: libtpu is missing, or has no such slice.
    """
    # Without these libtpu asks a metadata server which machine it is on, writes logs to /tmp, and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # it loads the compiler

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of many kinds
        raise SystemExit(
            f"error: no topology {name}: {str(error).splitlines()[0]} (make tpu-compile installs libtpu)"
        ) from error


def build(settings: Sequence[str], devices: Sequence[jax.Device]) -> Run:
    """The run of "section.key=value" settings with the defaults of a TPU, for devices that need not be here.

    Raises:
        ConfigError: a value cannot work.
    """
    config = config_lib.default()
    set_values(config, settings)
    return build_run(config, range(IMAGES), Hardware("tpu", len(devices)), devices)  # of a source only the length counts


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Of a program whose state is donated."""
    stats = compiled.memory_analysis()
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes  # results that take no argument's place
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes + kept, stats.generated_code_size_in_bytes)


def needed_bytes(message: str) -> int | None:
    """Memory on one device from the compiler's refusal; None where it says something else."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]) if match else None


def measure(model: str, topology: str, settings: Sequence[str]) -> dict:
    """Compiles one case; one that does not fit is no error.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason.
    """
    run = build((f"model.name={model}", *TASK, *settings), topology_devices(topology))
    started = time.perf_counter()
    try:
        memory = memory_of(run.compile())._asdict()
        used = sum(memory.values())
    except jax.errors.JaxRuntimeError as error:
        memory, used = {}, needed_bytes(str(error))
        if used is None:
            raise
    hbm = HBM_BYTES[topology.split(":")[0]]
    return {
        "model": model,
        "topology": topology,
        "settings": settings,
        "chips": run.shardings.mesh.size,
        "fits": bool(memory) and used <= hbm,
        "bytes_per_chip": used,
        **{f"{name}_bytes": size for name, size in memory.items()},
        "hbm_bytes": hbm,
        "compile_s": time.perf_counter() - started,
    }


def line(result: dict) -> str:
    """A result as a line of the table."""
    parts = [f"{name} {result[f'{name}_bytes'] / GIB:.2f}" for name in Memory._fields if result["fits"]]
    used = f"{result['bytes_per_chip'] / GIB:6.2f} of {result['hbm_bytes'] / GIB:.0f} GiB"
    return (
        f"{result['model']:10} {result['topology']:8} {used} {'fits' if result['fits'] else 'does not fit':12} "
        f"{result['compile_s']:5.0f} s  {' '.join(result['settings'])}" + (f"  ({', '.join(parts)} GiB)" if parts else "")
    )


def main() -> None:
    args, results = parser().parse_args(), []
    for model in args.models:
        for topology in args.topologies:
            known = FITTING.get((model, topology.split(":")[0]), ())
            results.append(measure(model, topology, known if args.settings is None else tuple(args.settings.split())))
            print(line(results[-1]), flush=True)
    print(json.dumps({"prototypes": 65_536, "batch_size": 1024, "cases": results}))
    sys.exit(0 if all(result["fits"] for result in results) else 1)


if __name__ == "__main__":
    main()
