"""Train binary: `python -m cmd_jax.main --config=configs/cub.py --workdir=DIR`."""

from absl import flags
from ml_collections import config_flags

from cmd_jax import cli
from cmd_jax.errors import ConfigError

USAGE = """Trains a teacher without labels and evaluates it; run again with the same --workdir, it continues.

  python -m cmd_jax.main --config=configs/demo.py --workdir=runs/demo
  python -m cmd_jax.main --config=configs/folder.py --config.data.folder=PHOTOS --workdir=runs/photos
  python -m cmd_jax.main --config=configs/cub.py --workdir=runs/cub --config.train.batch_size=128 --dry_run

The configuration is a Python file, with a preset after a colon (configs/demo.py:smoke); every value of it can be set by
--config.SECTION.KEY=VALUE. Written to --workdir: config.json, metrics.jsonl, checkpoints/, tb/ (TensorBoard), eval/STEP/,
report/. SIGTERM or Ctrl-C saves the state behind the current step and stops with code 75; a second one stops at once.
Exit codes: 0 done; 64 bad flag or configuration, or out of memory; 65 bad data or checkpoint, or disk full; 70 loss not finite
or teacher collapsed; 75 stopped as asked and saved, run again to continue; 130 stopped by Ctrl-C before the run began; any
other: run again. --debug shows the traceback of an error."""

config_flags.DEFINE_config_file("config", None, "configuration FILE[:PRESET]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; one with checkpoints is continued")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check everything, print data, shapes, memory and arithmetic, and stop")


def main() -> None:
    config = cli.given_config()
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise ConfigError("--workdir is missing; pass a directory such as --workdir=runs/demo")
    if _WORKDIR.value is not None:
        cli.check_workdir(_WORKDIR.value)
    cli.join_processes()
    cli.start_jax()
    from cmd_jax.train_and_evaluate import describe_run, train_and_evaluate

    if _DRY_RUN.value:
        print(describe_run(config, _WORKDIR.value))
    else:
        train_and_evaluate(config, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, USAGE)
