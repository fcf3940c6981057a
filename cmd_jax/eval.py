"""Eval binary: `python -m cmd_jax.eval --workdir=DIR`; restores the teacher alone, in a process of its own."""

import os

from absl import flags

from cmd_jax import cli, files
from cmd_jax.config import EVAL_PROTOCOLS
from cmd_jax.errors import ConfigError

USAGE = """Evaluates the teacher of a run: k-NN, retrieval, linear probes, clustering, few-shot, labelling effort, label-free
quality, accuracy of every class, the pairs of classes that are confused most, and pointing where parts are known.

  python -m cmd_jax.eval --workdir=runs/demo
  python -m cmd_jax.eval --workdir=runs/demo --step=300
  python -m cmd_jax.eval --workdir=runs/demo --best
  python -m cmd_jax.eval --workdir=runs/demo --protocols=linear
  python -m cmd_jax.eval --workdir=runs/demo --folder=OTHER_PHOTOS

Prints each number with its 95 % interval and protocol, beside the one at the start of the run where that was measured; writes
DIR/eval/STEP/metrics.json, where numbers of earlier evaluations with other protocols are kept, and the report
DIR/report/index.html. On other data the numbers go to DIR/eval/STEP/on_DATA/metrics.json, and there is no report; --folder
with the images of the run, which were moved, is its own data. Without labels the label-free numbers are all there is.
Exit codes: 0 done, 64 bad flag or out of memory, 65 bad data or checkpoint, or disk full, 130 interrupted. --debug shows
the traceback of an error."""

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run")
_STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; that of the result by default", lower_bound=0)
_BEST = flags.DEFINE_bool("best", False, "take the best step by the run's train.best_metric")
_PROTOCOLS = flags.DEFINE(
    cli.TupleParser(), "protocols", None, f"some of {','.join(EVAL_PROTOCOLS)}; by default the run's eval.protocols"
)
_SOURCE = flags.DEFINE_string("source", None, "labelled data to evaluate on, as data.source; by default the run's")
_FOLDER = flags.DEFINE_string("folder", None, "other images, train/CLASS/* and test/CLASS/*, or the run's own, moved")


def main() -> None:
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is missing; pass the directory of a run such as --workdir=runs/demo")
    cli.check_workdir(_WORKDIR.value)
    if not files.exists(os.path.join(_WORKDIR.value, "config.json")):
        raise ConfigError(f"{_WORKDIR.value} has no config.json; give the --workdir of a run of cmd_jax.main")
    if _BEST.value and _STEP.value is not None:
        raise ConfigError(f"--best and --step={_STEP.value} name two steps; pass one of them")
    cli.join_processes()
    cli.start_jax()
    from cmd_jax.evaluation import restore
    from cmd_jax.report.page import write_report

    data = (_SOURCE.value, _FOLDER.value)
    restore.evaluate_run(_WORKDIR.value, _STEP.value, _BEST.value, _PROTOCOLS.value, *data, write_report)


if __name__ == "__main__":
    cli.run(main, USAGE)
