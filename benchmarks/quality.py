"""With equal data, backbone, views, steps and seeds: does CMD give better fine-grained features than DINO and EsViT?

    python -m benchmarks.quality                       # the embedded birds, as configs/demo.py trains them
    python -m benchmarks.quality --preset=smoke        # minutes on two cores; it runs, and learns nothing
    python -m benchmarks.quality --folder=PHOTOS --out=runs/quality_photos
    python -m benchmarks.quality --ablations=all       # or some of those that --list prints

Trains dino, esvit, cmd and the ablations of cmd that are asked for, each for every seed, with one recipe: configs/demo.py, or
configs/folder.py:small with --folder (train/CLASS/*, test/CLASS/*), changed by --set for all of them. Keys that make the
method (method.name, image_pool, region_matching, region_weights and the weights of the terms) are set for cmd alone. Rows of a
seed start from the same backbone weights and see the same views of the same images.

Each run is a job of cmd_jax.main in OUT/NAME/seed-S, with OUT/NAME/seed-S.log. Run again, finished runs are kept, interrupted
ones go on, and what was measured is not measured again. A run takes as long as `make demo`, or as its configuration says: three
methods and three seeds take nine times that, and each ablation three more.

The feature that a row is measured with (class token, mean, MIL bag, or these joined) is chosen by leave-one-out k-NN on the
training images, mean over seeds; test images are measured with that one alone. The table has linear top-1 (logistic
regression), k-NN top-1 (k=20), Rank-1, mAP, and how often the most weighted patch is on a part: by the MIL weights, for dino by
the attention of the class token, for esvit by the patches' similarity to their mean. Written to OUT: results.md,
results.json, overlays.png (what each method looks at), curves.png. The last line is one JSON object.

Exit codes: 0 done; 1 a run failed, the table is of the others; 64 bad flag or configuration; 65 bad data or checkpoint; 75
stopped by SIGTERM or Ctrl-C, run again to continue.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
from absl import logging

from benchmarks import quality_pictures, quality_table
from benchmarks.quality_jobs import Job, run_jobs
from benchmarks.quality_measure import STATES, Measurement, choose
from benchmarks.quality_plan import BASELINES, COMPARED, OURS, PRESETS, Plan, Run, listing, make_plan
from cmd_jax import files
from cmd_jax.errors import BadImage, CheckpointError, ConfigError, DatasetError
from cmd_jax.evaluation.splits import spread

FAILED, BAD_CONFIG, BAD_DATA, STOPPED = 1, 64, 65, 75
SHOWN = 8  # test images in the picture


class Parser(argparse.ArgumentParser):
    """Ends with the project's code for a bad flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_CONFIG, f"error: {message}; --help lists the flags\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="full", help=f"{' or '.join(PRESETS)} (%(default)s)")
    add("--folder", default=None, metavar="PHOTOS", help="in the place of the embedded birds")
    add(
        "--out", default=None, metavar="DIR", help="of runs and results; default runs/quality, with _smoke or the folder's name"
    )
    add("--seeds", nargs="+", type=int, default=None, metavar="S", help="default 0 1 2, of smoke 0")
    add("--ablations", nargs="+", default=[], metavar="NAME", help="of cmd, or all; --list prints them")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe, section.key=value; may be repeated")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (%(default)s); they share the cores")
    add("--list", action="store_true", help="print presets, methods and ablations with what they change, and stop")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = parser().parse_args(arguments)
    if args.list:
        print(listing())
        return 0
    logging.set_verbosity(logging.ERROR)  # of Orbax
    # Programs that the main jobs compiled are read where they keep them.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join("~", ".cache", "cmd_jax"))
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    # Both stop it in the same way, SIGINT also where a shell that started it in the background had it ignored.
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
        DatasetError, CheckpointError: the data, or a finished run, cannot be read.
    """
    if args.jobs < 1:
        raise ConfigError(f"--jobs={args.jobs} runs nothing; use at least 1")
    out = args.out or default_out(args.preset, args.folder)
    seeds = args.seeds if args.seeds is not None else PRESETS.get(args.preset, PRESETS["full"]).seeds
    plan = make_plan(args.preset, args.folder, args.set, args.ablations, seeds, out)
    for name in plan.same:
        print(f"{name} is left out: {OURS} is so already")
    with locked(out):
        waiting = [run for run in plan.runs if not run.finished()]
        print(f"{len(plan.runs)} runs in {out}, {len(plan.runs) - len(waiting)} of them finished", flush=True)
        say = lambda text: print(text, flush=True)
        failed = run_jobs([Job(run.title, run.command, run.log) for run in waiting], args.jobs, say)
        rows, columns = measure(plan)
        report(plan, args, out, rows, columns, failed)
    if failed:
        print(f"error: {len(failed)} of {len(plan.runs)} runs failed: {', '.join(failed)}; run again", file=sys.stderr)
    return FAILED if failed else 0


def default_out(preset: str, folder: str | None) -> str:
    """Runs of other data or length have another directory."""
    data = "" if folder is None else "_" + os.path.basename(os.path.abspath(folder))
    return os.path.join("runs", f"quality{data}{'' if preset == 'full' else f'_{preset}'}")


@contextlib.contextmanager
def locked(out: str) -> Iterator[None]:
    """Keeps a second command out of the directory.

    Raises:
        ConfigError: it is in use, or cannot be one.
    """
    if files.is_remote(out):
        raise ConfigError(f"--out={out} is no local directory; give one")
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


def measure(plan: Plan) -> tuple[list[quality_table.Row], list[quality_pictures.Maps]]:
    """Rows of the table that have a finished run, and columns of the picture."""
    shown = spread(len(plan.splits.test), SHOWN).tolist()
    rows, columns = [], []
    for name in dict.fromkeys(run.name for run in plan.runs):
        done = {run.seed: Measurement(run, plan.splits, shown) for run in of_row(plan, name) if run.finished()}
        if not done:
            continue
        feature = choose([measured.selection() for measured in done.values()])
        tests: dict[int, dict] = {}
        for seed, measured in done.items():
            tests[seed] = measured.tests(feature)
            if name in COMPARED and not tests.keys() - {seed}:
                columns.append(quality_pictures.Maps(f"{name}: {measured.looks}", of_row(plan, name)[0], measured.maps()))
            measured.close()
        keys = (*quality_table.COLUMNS, "pointing_chance")
        start, trained = ({key: {seed: found[state][key] for seed, found in tests.items()} for key in keys} for state in STATES)
        seconds = {seed: measured.seconds_per_step() for seed, measured in done.items()}
        looks = next(iter(done.values())).looks
        rows.append(quality_table.Row(name, feature, looks, trained, start, seconds))
    return rows, columns


def of_row(plan: Plan, name: str) -> list[Run]:
    """Runs of all seeds."""
    return [run for run in plan.runs if run.name == name]


def report(
    plan: Plan,
    args: argparse.Namespace,
    out: str,
    rows: list[quality_table.Row],
    columns: list[quality_pictures.Maps],
    failed: dict[str, int],
) -> None:
    """Prints the tables and writes them and the pictures; the JSON object comes last."""
    if not rows:
        return
    seeds = list(dict.fromkeys(run.seed for run in plan.runs))
    train, test = map(len, plan.splits)
    first = plan.runs[0]
    head = (
        f"{plan.data}: {train:,} training and {test:,} test images, {len(plan.splits.train.class_names)} classes. {plan.base}, "
        f"preset {args.preset}{''.join(f', {item}' for item in args.set)}; {first.config.model.name}, {first.steps:,} steps of "
        f"{first.config.train.batch_size}; seeds {', '.join(map(str, seeds))}."
    )
    missing = f"Failed, and not in the table: {', '.join(failed)}.\n\n" if failed else ""
    text = f"{head}\n\n{missing}{quality_table.markdown(rows, BASELINES, OURS)}"
    differences = quality_table.compare(rows, BASELINES, OURS)
    result = {
        "data": plan.data,
        "base": plan.base,
        "preset": args.preset,
        "set": args.set,
        "seeds": seeds,
        "train_images": train,
        "test_images": test,
        "unit": "percent",
        "rows": {row.name: row._asdict() for row in rows},
        "differences_points": differences,
        "targets": quality_table.targets(rows, differences, BASELINES, OURS),
        "failed": failed,
        "same_as_cmd": plan.same,
    }
    print(f"\n{text}", flush=True)
    files.write(os.path.join(out, "results.md"), text)
    files.write(os.path.join(out, "results.json"), json.dumps(result, indent=2) + "\n")
    pictures = {"curves.png": quality_pictures.curves({name: finished(plan, name) for name in COMPARED})}
    if columns:
        shown = spread(len(plan.splits.test), SHOWN).tolist()
        pictures["overlays.png"] = quality_pictures.overlays(plan.splits.test, shown, columns)
    for name, content in pictures.items():
        files.write(os.path.join(out, name), content)
    print(f"wrote results.md, results.json, {' and '.join(sorted(pictures))} to {out}")
    print(json.dumps(result))


def finished(plan: Plan, name: str) -> list[Run]:
    """Runs of a row that are done."""
    return [run for run in of_row(plan, name) if run.finished()]


if __name__ == "__main__":
    sys.exit(main())
