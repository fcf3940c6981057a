"""With equal data, backbone, views, steps and seeds: does CMD give better fine-grained features than DINO, EsViT and iBOT?

    python -m benchmarks.quality                       # the embedded birds, as configs/demo.py trains them
    python -m benchmarks.quality --preset=smoke        # minutes on two cores; shows that it runs
    python -m benchmarks.quality --folder=PHOTOS --out=runs/quality_photos
    python -m benchmarks.quality --folder=PHOTOS --weights=SOURCE
    python -m benchmarks.quality --ablations=all       # or some of those that --list prints

Trains dino, esvit, ibot, cmd and the chosen ablations of cmd, each for every seed, with one shared configuration:
configs/demo.py, or configs/folder.py:small with --folder (train/CLASS/*, test/CLASS/*) or :continue_small with --weights too,
changed by --set for all of them. The values that make the method (method.name, image_pool, region_matching, region_weights, the
weights of the terms, head.share_mlp and share_prototypes) are set for cmd alone. Rows of a seed start from the same backbone
weights and see the same views of the same images.

Each run is a process of cmd_jax.main in OUT/NAME/seed-S, with the log OUT/NAME/seed-S.log. The same command again keeps
finished runs, continues interrupted ones, and measures nothing twice. A run takes as long as `make demo`, or as its
configuration says: four methods and three seeds take twelve times that, and each ablation three times more.

The feature that a row is measured with (class token, mean, MIL bag, or several concatenated) is chosen by leave-one-out k-NN on
the training images, mean over seeds; test images are measured with that one alone. The table has linear top-1 (logistic
regression), k-NN top-1 (k=20), Rank-1, mAP, Recall@1 among all images of the second half of the classes (class-disjoint
retrieval), clustering accuracy (k-means), and how often the most weighted patch is on a part: by the MIL weights, for dino and
ibot by the attention of the class token, for esvit by the patches' similarity to their mean. Written to OUT: results.md,
results.json, and the runs' curves beside each other in index.html (cmd_jax.report). The last line is one JSON object.

Exit codes: 0 done; 1 a run failed, the table has the others; 64 bad flag or configuration; 65 bad data or checkpoint; 75
stopped by SIGTERM or Ctrl-C, run again to continue.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
from absl import logging

from benchmarks import quality_table
from benchmarks.quality_measure import Measurement, choose
from benchmarks.quality_plan import BASELINES, OURS, PRESETS, ROOT, Plan, Run, listing, make_plan
from cmd_jax import files
from cmd_jax.errors import BadImage, CheckpointError, ConfigError, DatasetError
from cmd_jax.progress import clock
from cmd_jax.report.compare import write_comparison

FAILED, BAD_CONFIG, BAD_DATA, STOPPED = 1, 64, 65, 75
TAIL = 12  # lines of the log of a failed run that are printed


class Parser(argparse.ArgumentParser):
    """Exits with the project's code for a bad flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_CONFIG, f"error: {message}; --help lists the flags\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="full", help=f"{' or '.join(PRESETS)} (%(default)s)")
    add("--folder", metavar="PHOTOS", help="instead of the embedded birds")
    add("--weights", metavar="SOURCE", help="that all rows start from, with configs/folder.py:continue_small; needs --folder")
    add("--out", metavar="DIR", help="of runs and results; default runs/quality, with _smoke or the folder's name")
    add("--seeds", nargs="+", type=int, metavar="S", help="default 0 1 2, with --preset=smoke 0")
    add("--baselines", nargs="+", choices=BASELINES, default=BASELINES, metavar="NAME", help="beside cmd; default all")
    add("--ablations", nargs="+", default=[], metavar="NAME", help="of cmd, or all; --list prints them")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="section.key=value for all rows; may be repeated")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (%(default)s); they share the cores")
    add("--list", action="store_true", help="print presets, methods and ablations with what they change")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_args(arguments)
    if args.list:
        print(listing())
        return 0
    logging.set_verbosity(logging.ERROR)  # of Orbax
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join("~", ".cache", "cmd_jax"))
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    # SIGINT too, which a shell ignores for commands in the background.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return run(args)
    except (ConfigError, DatasetError, BadImage, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIG if isinstance(error, ConfigError) else BAD_DATA
    except KeyboardInterrupt:
        print("stopped as asked; run again, it continues", file=sys.stderr)
        return STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    """Trains, measures, prints and writes; returns the exit code.

    Raises:
        ConfigError: before anything is trained.
        DatasetError, CheckpointError: the data or a finished run cannot be read.
    """
    if args.jobs < 1:
        raise ConfigError(f"--jobs={args.jobs} must be at least 1")
    data = "" if args.folder is None else "_" + os.path.basename(os.path.abspath(args.folder))
    data += "" if args.weights is None else "_continued"
    out = args.out or os.path.join("runs", f"quality{data}{'' if args.preset == 'full' else f'_{args.preset}'}")
    seeds = args.seeds if args.seeds is not None else PRESETS.get(args.preset, PRESETS["full"]).seeds
    plan = make_plan(args.preset, args.folder, args.set, args.ablations, seeds, out, args.weights, args.baselines)
    for name in plan.same:
        print(f"{name} is left out: {OURS} has these values already")
    with locked(out):
        waiting = [run for run in plan.runs if not run.finished()]
        print(f"{len(plan.runs)} runs in {out}, {len(plan.runs) - len(waiting)} of them finished", flush=True)
        failed = train(waiting, args.jobs)
        rows = measure(plan)
        if rows:
            report(plan, args, out, seeds, rows, failed)
    if failed:
        print(f"error: {len(failed)} of {len(plan.runs)} runs failed: {', '.join(failed)}; run again", file=sys.stderr)
    return FAILED if failed else 0


@contextlib.contextmanager
def locked(out: str) -> Iterator[None]:
    """Keeps a second command out of the directory.

    Raises:
        ConfigError: it is in use, or cannot be written.
    """
    if files.is_remote(out):
        raise ConfigError(f"--out={out} must be a local directory")
    try:
        os.makedirs(out, exist_ok=True)
        lock = open(os.path.join(out, ".lock"), "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written ({error.strerror}); choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--out={out} is in use by another benchmarks.quality; wait for it, or choose another") from error
        yield


def train(runs: Sequence[Run], jobs: int) -> dict[str, int]:
    """Trains runs in processes of their own, some side by side; a failed one does not end the others.

    Interrupted (KeyboardInterrupt), it sends SIGTERM to the processes and waits for them to save.

    Returns:
        Exit codes of the failed runs by name.
    """
    environment = dict(os.environ)
    if jobs > 1:  # the first process would take the whole memory of a GPU
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    processes: list[subprocess.Popen] = []
    done: list[str] = []
    stopping = threading.Event()

    def one(run: Run) -> int:
        os.makedirs(os.path.dirname(run.workdir), exist_ok=True)
        print(f"started   {run.name} ({len(done)} of {len(runs)} done)", flush=True)
        started = time.monotonic()
        with open(f"{run.workdir}.log", "ab") as log:
            # In a session of its own, so that Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                run.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes.append(process)
            if stopping.is_set():
                process.terminate()
            code = process.wait()
        done.append(run.name)
        took = clock(time.monotonic() - started)
        if code:
            tail = files.read(f"{run.workdir}.log").splitlines()[-TAIL:]
            print(f"failed    {run.name} with code {code} after {took}; {run.workdir}.log ends:", *tail, sep="\n    ")
        else:
            print(f"finished  {run.name} in {took} ({len(done)} of {len(runs)} done)", flush=True)
        return code

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {run.name: pool.submit(one, run) for run in runs}
        try:
            codes = {name: future.result() for name, future in futures.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            stopping.set()
            for process in processes:
                process.terminate()
            raise
    return {name: code for name, code in codes.items() if code}


def measure(plan: Plan) -> list[quality_table.Row]:
    """The rows that have a finished run."""
    rows = []
    for name, runs in plan.rows.items():
        measured = {run.seed: Measurement(run, plan.splits) for run in runs if run.finished()}
        if not measured:
            continue
        feature = choose([of_seed.selection() for of_seed in measured.values()])
        tests = {seed: of_seed.tests(feature) for seed, of_seed in measured.items()}
        start, trained = (
            {
                key: {seed: found[state][key] for seed, found in tests.items()}
                for key in (*quality_table.COLUMNS, "pointing_chance")
            }
            for state in ("start", "trained")
        )
        seconds = {run.seed: quality_table.seconds_per_step(run) for run in runs if run.seed in measured}
        looks = next(iter(measured.values())).map
        rows.append(quality_table.Row(name, feature, looks, trained, start, seconds))
    return rows


def report(
    plan: Plan,
    args: argparse.Namespace,
    out: str,
    seeds: Sequence[int],
    rows: list[quality_table.Row],
    failed: dict[str, int],
) -> None:
    """Prints and writes the tables and the curves; the JSON object comes last."""
    train, test = map(len, plan.splits)
    config, steps = plan.runs[0].config, plan.runs[0].steps
    head = (
        f"{plan.data}: {train:,} training and {test:,} test images, {len(plan.splits.train.class_names)} classes. {plan.base}, "
        f"preset {args.preset}{''.join(f', {item}' for item in args.set)}; {config.model.name}, {steps:,} steps of "
        f"{config.train.batch_size}; seeds {', '.join(map(str, seeds))}."
    )
    missing = f"Failed, and not in the table: {', '.join(failed)}.\n\n" if failed else ""
    text = f"{head}\n\n{missing}{quality_table.markdown(rows)}"
    result = {
        "data": plan.data,
        "base": plan.base,
        "preset": args.preset,
        "set": args.set,
        "seeds": list(seeds),
        "train_images": train,
        "test_images": test,
        "unit": "percent",
        "rows": {row.name: row._asdict() for row in rows},
        "differences_points": quality_table.compare(rows),
        "failed": failed,
        "same_as_cmd": plan.same,
    }
    compared = [run.workdir for name in (*args.baselines, OURS) for run in plan.rows[name] if run.finished()]
    print(f"\n{text}", flush=True)
    files.write(os.path.join(out, "results.md"), text)
    files.write(os.path.join(out, "results.json"), json.dumps(result, indent=2) + "\n")
    if compared:
        write_comparison(compared, out)
    print(f"wrote results.md, results.json and index.html to {out}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
