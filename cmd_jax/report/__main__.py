"""Report binary: `python -m cmd_jax.report --workdir=DIR`; the page of a run, or a page that compares several."""

import os

from absl import flags

from cmd_jax import cli, files
from cmd_jax.errors import ConfigError

USAGE = """Writes the report of a run, or one page that compares several.

  python -m cmd_jax.report --workdir=runs/demo
  python -m cmd_jax.report --workdir=runs/cmd --workdir=runs/dino --out=runs/comparison

One --workdir: restores its teacher, measures k-NN and label-free numbers again, and writes DIR/report/index.html. Several:
reads their numbers, curves and configurations from disk, restores nothing, and writes OUT/index.html. A page is one file; it
opens without a network.
Exit codes: 0 done, 64 bad flag or out of memory, 65 bad data or checkpoint, or disk full, 130 interrupted. --debug shows
the traceback of an error."""

QUICK = ("knn", "label_free")  # protocols of seconds; numbers of the others are kept as they were measured

_WORKDIRS = flags.DEFINE_multi_string("workdir", [], "directory of a run; again for each run to compare")
_STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; that of the result by default", lower_bound=0)
_BEST = flags.DEFINE_bool("best", False, "take the best step by the run's train.best_metric")
_OUT = flags.DEFINE_string("out", None, "directory for the page that compares runs")


def main() -> None:
    if not _WORKDIRS.value:
        raise ConfigError(
            "--workdir is missing; pass the directory of a run such as --workdir=runs/demo, again for each to compare"
        )
    for workdir in _WORKDIRS.value:
        if not files.exists(os.path.join(workdir, "config.json")):
            raise ConfigError(f"{workdir} has no config.json; give the --workdir of a run of cmd_jax.main")
    several = len(_WORKDIRS.value) > 1
    if several != (_OUT.value is not None):
        raise ConfigError("--out=DIR is for the page that compares several --workdir; pass both or neither")
    if several and (_STEP.value is not None or _BEST.value):
        raise ConfigError("--step and --best are for one --workdir; a comparison reads the last evaluation of every run")
    if _BEST.value and _STEP.value is not None:
        raise ConfigError(f"--best and --step={_STEP.value} name two steps; pass one of them")
    cli.check_workdir(_OUT.value if several else _WORKDIRS.value[0])
    if several:
        from cmd_jax.report.compare import write_comparison  # imported after the flags are checked: it loads a chart library

        for path in write_comparison(_WORKDIRS.value, _OUT.value):
            print(f"wrote {path}")
    else:
        cli.start_jax()
        from cmd_jax.evaluation import restore
        from cmd_jax.report.page import write_report

        restore.evaluate_run(_WORKDIRS.value[0], _STEP.value, _BEST.value, QUICK, write_report=write_report)


if __name__ == "__main__":
    cli.run(main, USAGE)
