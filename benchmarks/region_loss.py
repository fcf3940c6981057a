"""The streamed objective against the plain forms that store every logit, in JAX and in PyTorch: time and memory on a CPU.

    python -m benchmarks.region_loss

Every form computes value and gradient (for the student's bottlenecks, prototypes and, in "cmd", MIL weights), matched patches
included, on the same random inputs: `region` is L_R alone, the field's region loss, `cmd` all four terms at the paper's
weights. Each form is a process of its own on one core, single-threaded, and they take turns. Seconds are CPU seconds: median,
smallest and largest round. Losses and norms of their gradients must agree.

Temporary memory is the compiler's figure for the JAX forms (without inputs and results) and for PyTorch the growth of the
process's peak resident memory over what it had before its first step (gradients included). The last line is one JSON object;
its ratios are streamed / plain at the largest K, smaller is better.
"""

import argparse
import functools
import json
import math
import platform
import sys

import jax
import jax.numpy as jnp

from benchmarks import region_problem, timing
from cmd_jax.method.chunk_size import default_chunk
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.objective import cmd_objective
from cmd_jax.method.types import Centers, PrototypePair, TermWeights, Views

TOLERANCE = 1e-4  # relative, of values and gradient norms
ONE_THREAD = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(timing.ROOT),
}


def views_of(problem: dict, name: str) -> Views:
    return Views(*(problem[f"{name}.{field}"] for field in region_problem.VIEW_FIELDS))


def levels_of(problem: dict, name: str) -> tuple:
    return tuple(problem[f"{name}.{level}"] for level in region_problem.LEVELS)


def loss_of(problem: dict, weights: TermWeights, streaming: Streaming | None) -> tuple[jax.Array, Centers]:
    """Loss [] and new centers of the objective, streamed or (None) plain, with the matching and centers around it."""
    result = cmd_objective(
        tuple(views_of(problem, name) for name in region_problem.GROUPS),
        PrototypePair(*levels_of(problem, "student_rows")),
        views_of(problem, "teacher"),
        PrototypePair(*levels_of(problem, "teacher_rows")),
        problem["inter_teacher_weights.teacher"],
        Centers(*levels_of(problem, "centers")),
        weights=weights,
        region_weights="teacher_mil",
        student_temp=region_problem.STUDENT_TEMP,
        teacher_temp=region_problem.TEACHER_TEMP,
        center_momentum=region_problem.CENTER_MOMENTUM,
        streaming=streaming,
    )
    return result.loss, result.centers


def compile_step(problem: dict, objective: str, form: str, chunk: int | None) -> tuple[jax.stages.Compiled, int | None]:
    """The compiled (trained, fixed) -> ((loss, centers), gradients), and the chunk of K."""
    weights, prototypes = TermWeights(*region_problem.OBJECTIVES[objective]), problem["student_rows.region"].shape[0]
    if form == "streamed":
        rows = sum(math.prod(problem[f"{name}.region_z"].shape[:-1]) for name in ("teacher", *region_problem.GROUPS))
        chunk = chunk or default_chunk(rows, prototypes, "cpu")
        # as `cmd_jax.config.resolve` chooses on a CPU
        streaming = Streaming(chunk, targets="gathered" if chunk < prototypes else "expected")
    else:
        streaming = chunk = None
    loss = functools.partial(loss_of, weights=weights, streaming=streaming)
    step = jax.value_and_grad(lambda trained, fixed: loss({**trained, **fixed}), has_aux=True)
    return jax.jit(step).lower(*split(problem, objective)).compile(), chunk


def split(problem: dict, objective: str) -> tuple[dict, dict]:
    """(inputs with a gradient, other inputs)."""
    names = region_problem.trained(objective)
    return {name: problem[name] for name in names}, {name: x for name, x in problem.items() if name not in names}


def serve(args: argparse.Namespace) -> None:
    """The process of a JAX form."""
    replies = timing.claim_stdout()
    (prototypes,), (objective,) = args.prototypes, args.objectives
    problem = region_problem.make(args, prototypes)
    compiled, chunk = compile_step(problem, objective, args.serve, args.chunk)
    arguments = jax.device_put(split(problem, objective))
    step = lambda: jax.block_until_ready(compiled(*arguments))
    (loss, _), gradients = step()
    norm = sum(float(jnp.vdot(x, x)) for x in gradients.values()) ** 0.5
    info = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes, "chunk": chunk, "jax": jax.__version__}
    del problem, gradients
    timing.serve(step, info | {"loss": float(loss), "gradient_norm": norm}, replies)


def measure(args: argparse.Namespace, objective: str, prototypes: int, python: str | None) -> dict:
    """One case: figures by form, and ratios streamed / form."""
    sizes = [*region_problem.size_arguments(args), f"--prototypes={prototypes}"]
    ours = [sys.executable, "-m", "benchmarks.region_loss", *sizes, f"--objectives={objective}"]
    chunk = [f"--chunk={args.chunk}"] if args.chunk else []
    sides = {"streamed": ([*ours, *chunk, "--serve=streamed"], ONE_THREAD), "plain": ([*ours, "--serve=plain"], ONE_THREAD)}
    if python:
        theirs = [python, "-m", "benchmarks.torch_region_loss", *sizes, f"--objective={objective}"]
        sides["torch"] = (theirs, ONE_THREAD)
    timed = timing.alternate(sides, args.rounds)
    for key in ("loss", "gradient_norm"):
        values = {form: side.info[key] for form, side in timed.items()}
        if any(not abs(value - values["streamed"]) <= TOLERANCE * abs(values["streamed"]) for value in values.values()):
            raise SystemExit(f"{objective}, K = {prototypes}: {key} differs by more than {TOLERANCE:g} relative: {values}")
    forms = {}
    for form, side in timed.items():
        cpu_s = timing.spread_of(side.seconds("cpu_s"))
        temporary = side.info["temporary_bytes"] if form != "torch" else side.peak_bytes() - side.info["rss_before_bytes"]
        seconds = {"cpu_s": cpu_s.median, "cpu_s_min": cpu_s.low, "cpu_s_max": cpu_s.high}
        forms[form] = {"temporary_bytes": temporary, **seconds, "loss": side.info["loss"]}
    ratio = lambda form, key: forms["streamed"][key] / forms[form][key] if form in forms else None
    return {
        "objective": objective,
        "prototypes": prototypes,
        "chunk": timed["streamed"].info["chunk"],
        "forms": forms,
        "versions": {name: side.info[name] for side in timed.values() for name in ("jax", "torch") if name in side.info},
        "memory_ratio": ratio("plain", "temporary_bytes"),
        "memory_ratio_torch": ratio("torch", "temporary_bytes"),
        "time_ratio": ratio("torch", "cpu_s"),
        "time_ratio_jax": ratio("plain", "cpu_s"),
    }


LINE = "{:<10}{:>7}  {:<10}{:>24}{:>15}"


def print_case(case: dict) -> None:
    """A line for each form."""
    for form, figures in case["forms"].items():
        seconds = "{cpu_s:.3f} ({cpu_s_min:.3f}-{cpu_s_max:.3f})".format(**figures)
        print(LINE.format(case["objective"], case["prototypes"], form, seconds, f"{figures['temporary_bytes'] / 2**20:.1f}"))
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.region_loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prototypes", type=int, nargs="+", default=[4096, 16_384, 65_536], help="values of K (%(default)s)")
    add("--objectives", nargs="+", choices=list(region_problem.OBJECTIVES), default=["region", "cmd"], help="(%(default)s)")
    add("--chunk", type=int, help="prototypes in a chunk of the streamed form (cmd_jax.method.chunk_size.default_chunk)")
    add("--rounds", type=int, default=5, help="timed steps of each form (%(default)s)")
    add("--torch_python", help="a Python with PyTorch, or none; default: .venv-interop's or this one")
    add("--serve", choices=["streamed", "plain"], help=argparse.SUPPRESS)
    region_problem.add_size_options(parser)
    return parser


def main() -> None:
    """Runs the command line."""
    args = parser().parse_args()
    if args.serve:
        serve(args)
        return
    timing.use_one_core()
    python = timing.torch_python(args.torch_python)
    print(LINE.format("objective", "K", "form", "CPU s (min-max)", "temporary MiB"))
    cases = []
    for objective in args.objectives:
        for prototypes in args.prototypes:
            cases.append(measure(args, objective, prototypes, python))
            print_case(cases[-1])
    largest = max((case for case in cases if case["objective"] == args.objectives[0]), key=lambda case: case["prototypes"])
    summary = {key: value for key, value in largest.items() if key not in ("chunk", "forms")}
    device = f"{platform.processor() or platform.machine()}, one core"
    print(json.dumps(summary | {"batch_size": args.batch_size, "device": device, "cases": cases}))


if __name__ == "__main__":
    main()
