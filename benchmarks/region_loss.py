"""The streamed objective against the naive forms that store every logit, in JAX and in PyTorch: time and memory on a CPU.

    python -m benchmarks.region_loss --torch_python=.venv-interop/bin/python

Every form computes value and gradient (for the student's bottlenecks, prototypes and, in "cmd", MIL weights), matched
patches included, on the same random inputs: `region` is L_R alone, the field's region loss, `cmd` all four terms at the
paper's weights. Each form is a process of its own on one and the same core, single-threaded, huge pages on; streamed and
PyTorch's form take turns. Seconds are CPU seconds: median, smallest and largest round. Before any timing the losses and the
norms of their gradients must agree.

Temporary memory is the compiler's figure for the JAX forms (inputs and results, the gradients, not counted) and for PyTorch
the growth of the process's peak resident memory over what it had before its first step (gradients included). The largest
batch whose temporary memory fits --budget_gib comes from the line through the figures compiled for batches of 32 and 64:
they grow linearly with the images once the chunk has its smallest size. PyTorch's is the budget over its growth per image.
The last line of the output is a JSON object; its ratios are streamed / naive at the largest K, smaller is better.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import region_problem, worker
from benchmarks.naive_loss import naive_terms
from cmd_jax.method import centers as centers_lib
from cmd_jax.method import objective as objective_lib
from cmd_jax.method.chunk_size import default_chunk
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.rows import Centers, PrototypePair, StudentRows, TeacherRows, TermWeights

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4  # relative, of values and gradient norms before timing
FITTED_BATCHES = (32, 64)
# Both sides: without huge pages most of the difference would be page faults.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
}


def views_of(problem: dict, name: str) -> objective_lib.Views:
    return objective_lib.Views(*(problem[f"{name}.{field}"] for field in region_problem.VIEW_FIELDS))


def levels_of(problem: dict, name: str) -> tuple:
    return tuple(problem[f"{name}.{level}"] for level in region_problem.LEVELS)


def streamed_loss(problem: dict, weights: TermWeights, chunk: int) -> tuple[jax.Array, Centers]:
    """Loss [] and new centers by `cmd_jax.method.prototypes.distil`, with the matching and centers around it."""
    result = objective_lib.cmd_objective(
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
        # as `cmd_jax.config.resolve` chooses on a CPU
        streaming=Streaming(chunk, targets="gathered" if chunk < problem["student_rows.region"].shape[0] else "expected"),
    )
    return result.loss, result.centers


def naive_loss(problem: dict, weights: TermWeights) -> tuple[jax.Array, Centers]:
    """The same by `naive_terms`; the compiler drops the terms of weight 0."""
    teacher, teacher_rows = views_of(problem, "teacher"), PrototypePair(*levels_of(problem, "teacher_rows"))
    groups = [views_of(problem, name) for name in region_problem.GROUPS]
    views = sum(group.image_z.shape[1] for group in groups)
    pairings = tuple(
        objective_lib.pair_views(group, teacher, first, views, "teacher_mil")
        for group, first in zip(groups, (0, 2), strict=True)
    )
    student = tuple(StudentRows(group.image_z, group.region_z, group.mil_weights) for group in groups)
    centers = Centers(*levels_of(problem, "centers"))
    rows = TeacherRows(teacher.image_z, teacher.region_z, teacher_rows, centers, jnp.float32(region_problem.TEACHER_TEMP))
    scorer = problem["inter_teacher_weights.teacher"]
    prototypes = PrototypePair(*levels_of(problem, "student_rows"))
    terms, _ = naive_terms(student, prototypes, scorer, rows, pairings, region_problem.STUDENT_TEMP)
    update = lambda center, z, w: centers_lib.update_center(center, z, w, region_problem.CENTER_MOMENTUM)
    updated = map(update, centers, (teacher.image_z, teacher.region_z), teacher_rows)
    return sum(weight * terms[name] for name, weight in weights._asdict().items() if weight), Centers(*updated)


def compile_step(problem: dict, objective: str, form: str, chunk: int | None) -> tuple[jax.stages.Compiled, int | None]:
    """The compiled (trained, fixed) -> ((loss, centers), gradients) for arrays or shapes, and the chunk of K."""
    weights, prototypes = TermWeights(*region_problem.OBJECTIVES[objective]), problem["student_rows.region"].shape[0]
    if form == "streamed":
        rows = sum(math.prod(problem[f"{name}.region_z"].shape[:-1]) for name in ("teacher", *region_problem.GROUPS))
        chunk = chunk or default_chunk(rows, prototypes, "cpu")
        loss = functools.partial(streamed_loss, weights=weights, chunk=chunk)
    else:
        loss, chunk = functools.partial(naive_loss, weights=weights), None
    step = jax.value_and_grad(lambda trained, fixed: loss({**trained, **fixed}), has_aux=True)
    return jax.jit(step).lower(*split(problem, objective)).compile(), chunk


def split(problem: dict, objective: str) -> tuple[dict, dict]:
    """(inputs with a gradient, the others)."""
    names = region_problem.trained(objective)
    return {name: problem[name] for name in names}, {name: x for name, x in problem.items() if name not in names}


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def largest_batch(problem: dict, objective: str, form: str, chunk: int | None, budget_bytes: float) -> int:
    """Images whose temporary memory fits the budget, by the line through `FITTED_BATCHES`."""
    sizes = []
    for batch in FITTED_BATCHES:
        shapes = {
            name: jax.ShapeDtypeStruct(
                x.shape if name.split(".")[0] in region_problem.PER_PROTOTYPE else (batch, *x.shape[1:]), x.dtype
            )
            for name, x in problem.items()
        }
        sizes.append(temporary_bytes(compile_step(shapes, objective, form, chunk)[0]))
    slope = (sizes[1] - sizes[0]) / (FITTED_BATCHES[1] - FITTED_BATCHES[0])
    return max(0, int(FITTED_BATCHES[0] + (budget_bytes - sizes[0]) / slope))


def serve(args: argparse.Namespace) -> None:
    """The child of a JAX form: its first line tells the memory, then it answers for steps."""
    replies = worker.claim_stdout()
    (prototypes,), (objective,) = args.prototypes, args.objectives
    problem = region_problem.make(args, prototypes)
    compiled, chunk = compile_step(problem, objective, args.serve, args.chunk)
    info = {"temporary_bytes": temporary_bytes(compiled), "chunk": chunk, "jax": jax.__version__}
    if args.budget_gib:
        info["largest_batch"] = largest_batch(problem, objective, args.serve, args.chunk, args.budget_gib * 2**30)
    if info["temporary_bytes"] > args.run_gib * 2**30:
        worker.serve(lambda: None, info, replies=replies)
        return
    arguments = jax.device_put(split(problem, objective))
    step = lambda: jax.block_until_ready(compiled(*arguments))
    (loss, _), gradients = step()
    norm = sum(float(jnp.vdot(x, x)) for x in gradients.values()) ** 0.5
    info |= {"loss": float(loss), "gradient_norm": norm}
    del problem, gradients
    worker.serve(step, info, replies=replies)


def check_equal(infos: dict[str, dict], case: str) -> None:
    """Stops where forms disagree."""
    for key in ("loss", "gradient_norm"):
        values = {form: info[key] for form, info in infos.items() if key in info}
        expected = values["streamed"]
        if any(not abs(value - expected) <= TOLERANCE * abs(expected) for value in values.values()):
            raise SystemExit(f"{case}: the forms disagree in {key} by more than {TOLERANCE:g} relative, not timed: {values}")


def measure(args: argparse.Namespace, objective: str, prototypes: int, torch_python: str | None) -> dict:
    """One case: figures by form."""
    sizes = [*region_problem.size_arguments(args), f"--prototypes={prototypes}"]
    jax_child = [sys.executable, "-m", "benchmarks.region_loss", *sizes, f"--objectives={objective}"]
    jax_child += [f"--budget_gib={args.budget_gib}", f"--run_gib={args.run_gib}"]
    commands = {
        "streamed": [*jax_child, "--serve=streamed", *([f"--chunk={args.chunk}"] if args.chunk else [])],
        "naive": [*jax_child, "--serve=naive"],
    }
    if torch_python:
        commands["torch"] = [torch_python, "-m", "benchmarks.torch_region_loss", *sizes, f"--objective={objective}"]
    workers = {}
    try:
        for form, command in commands.items():
            workers[form] = worker.Worker(command, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)})
        infos = {form: child.info for form, child in workers.items()}
        check_equal(infos, f"{objective}, K = {prototypes}")
        cpu_s = {form: [] for form, info in infos.items() if "loss" in info}
        peak_bytes = 0
        # The naive JAX form has its rounds afterwards: the gigabytes it frees would be cheap pages for whoever comes next.
        for forms in ([form for form in cpu_s if form != "naive"], [form for form in cpu_s if form == "naive"]):
            for _, form in itertools.product(range(args.rounds), forms):
                reply = workers[form].run(1)
                cpu_s[form] += reply["cpu_s"]
                if form == "torch":
                    peak_bytes = max(peak_bytes, reply["peak_rss_bytes"])
    finally:
        for child in workers.values():
            child.close()
    case = {"objective": objective, "prototypes": prototypes, "chunk": infos["streamed"]["chunk"], "forms": {}}
    for form, info in infos.items():
        figures = {"temporary_bytes": info.get("temporary_bytes"), "largest_batch": info.get("largest_batch")}
        if form == "torch":
            grown = peak_bytes - info["rss_before_bytes"]
            batch = int(args.budget_gib * 2**30 / grown * args.batch_size) if args.budget_gib else None
            figures = {"temporary_bytes": grown, "largest_batch": batch}
        if form in cpu_s:
            low, high = min(cpu_s[form]), max(cpu_s[form])
            figures |= {"cpu_s": statistics.median(cpu_s[form]), "cpu_s_min": low, "cpu_s_max": high, "loss": info["loss"]}
        case["forms"][form] = figures
    case["versions"] = {name: info[name] for info in infos.values() for name in ("jax", "torch") if name in info}
    return case | ratios(case["forms"])


def ratios(forms: dict[str, dict]) -> dict[str, float | None]:
    """Streamed / naive; None where the naive form was not run."""

    def ratio(form: str, key: str) -> float | None:
        below = forms.get(form, {}).get(key)
        return forms["streamed"][key] / below if below else None

    return {
        "memory_ratio": ratio("naive", "temporary_bytes"),
        "memory_ratio_torch": ratio("torch", "temporary_bytes"),
        "time_ratio": ratio("torch", "cpu_s"),
        "time_ratio_jax": ratio("naive", "cpu_s"),
    }


LINE = "{:<10}{:>7}  {:<15}{:>24}{:>15}{:>15}{:>12}{:>14}"
NAMES = {"streamed": "streamed", "naive": "naive JAX", "torch": "naive PyTorch"}


def print_case(case: dict) -> None:
    """A line for each form; ratios are streamed / the form of the line."""
    for form, figures in case["forms"].items():
        seconds = "not run"
        if "cpu_s" in figures:
            seconds = "{cpu_s:.3f} ({cpu_s_min:.3f}-{cpu_s_max:.3f})".format(**figures)
        time_ratio = case[{"naive": "time_ratio_jax"}.get(form, "time_ratio")]
        memory_ratio = case[{"torch": "memory_ratio_torch"}.get(form, "memory_ratio")]
        shown = [f"{ratio:.4f}" if ratio and form != "streamed" else "" for ratio in (time_ratio, memory_ratio)]
        name = f"{NAMES[form]} {case['chunk']}" if form == "streamed" else NAMES[form]
        memory, batch = f"{figures['temporary_bytes'] / 2**20:.1f}", figures["largest_batch"]
        print(LINE.format(case["objective"], case["prototypes"], name, seconds, memory, "" if batch is None else batch, *shown))
    sys.stdout.flush()


def find_torch(asked: str | None) -> str | None:
    """A python with PyTorch, or None."""
    imports = lambda python: subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0
    if asked == "none":
        return None
    if asked:
        if not imports(asked):
            raise SystemExit(f"--torch_python={asked} cannot import torch; name another one, or none")
        return asked
    beside = ROOT / ".venv-interop" / "bin" / "python"
    return next((p for p in (sys.executable, str(beside)) if os.path.exists(p) and imports(p)), None)


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
    add("--budget_gib", type=float, default=4.0, help="temporary memory for the largest batch; 0: not looked for (%(default)s)")
    add("--run_gib", type=float, default=8.0, help="a JAX form with more temporary memory is compiled only (%(default)s)")
    add("--torch_python", help="a python with PyTorch, or none (this one, else .venv-interop/bin/python)")
    add("--serve", choices=["streamed", "naive"], help=argparse.SUPPRESS)
    region_problem.add_size_options(parser)
    return parser


def main() -> None:
    """Runs the command line."""
    args = parser().parse_args()
    if args.serve:
        serve(args)
        return
    torch_python = find_torch(args.torch_python)
    if hasattr(os, "sched_setaffinity"):  # children inherit it
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if not torch_python:
        print("no python with PyTorch (--torch_python): its lines and time_ratio are left out")
    print(
        LINE.format("objective", "K", "form", "CPU s (min-max)", "temporary MiB", "largest batch", "time ratio", "memory ratio")
    )
    cases = []
    for objective in args.objectives:
        for prototypes in args.prototypes:
            cases.append(measure(args, objective, prototypes, torch_python))
            print_case(cases[-1])
    largest = max((case for case in cases if case["objective"] == args.objectives[0]), key=lambda case: case["prototypes"])
    device = f"{platform.processor() or platform.machine()}, one core"
    summary = {key: largest[key] for key in ("objective", "prototypes", *ratios(largest["forms"]), "versions")}
    settings = {"batch_size": args.batch_size, "budget_gib": args.budget_gib, "device": device}
    print(json.dumps(summary | settings | {"cases": cases}))


if __name__ == "__main__":
    main()
