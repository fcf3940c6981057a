"""Convert binary: `python -m cmd_jax.convert import|export`; weights of other projects in, and ours out."""

import os

from absl import flags
from ml_collections import config_flags

from cmd_jax import cli, files
from cmd_jax.errors import ConfigError

USAGE = """Converts weights between other projects and the directory of a run.

  python -m cmd_jax.convert import SOURCE --workdir=DIR [--config=FILE[:PRESET]]
  python -m cmd_jax.convert export --workdir=DIR --format=safetensors --out=FILE.safetensors
  python -m cmd_jax.convert export --workdir=DIR --format=stablehlo --out=FILE.stablehlo
  python -m cmd_jax.convert export --workdir=DIR --format=onnx --out=FILE.onnx
  python -m cmd_jax.convert export --workdir=DIR --format=timm --out=FILE.safetensors
  python -m cmd_jax.convert export --workdir=DIR --format=hf --out=DIRECTORY

import makes DIR the directory of a run at step 0, which cmd_jax.eval, export and --config.init.weights=DIR of cmd_jax.main
read. SOURCE is a .safetensors file or a .pth (pip install '.[torch]') of DINO, DINOv2, DINOv3, iBOT, MAE, MoCo v3 or EsViT; a
directory of transformers, timm or OpenCLIP; hf:OWNER/NAME (pip install '.[hf]'); or another run. It says itself what it is, and
what it does not say is asked for by its key. --config.init.heads continues with the projection heads too,
--config.init.network=student takes the student.
export writes the teacher of a run, and a model card beside it (FILE.md, in a directory README.md). safetensors is our own
file, for cmd_jax.load and cmd_jax.embed: backbone, MIL scorer and configuration. stablehlo (jax.export: CPU, CUDA, TPU) and
onnx (pip install '.[onnx]') are programs from uint8 crops of any number to features and MIL weights. timm and hf hold the
backbone alone, hf as the model of transformers that it is: ViTModel, Dinov2Model (WithRegisters), DINOv3ViTModel,
CLIPVisionModel or SwinModel.
Exit codes: 0 done, 64 bad flag or configuration, 65 weights or checkpoint that do not fit, or disk full."""

_COMMANDS = "import SOURCE or export"
# A path, so that --config.section.key changes the default configuration too.
_DEFAULT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", "unchanged.py")
config_flags.DEFINE_config_file("config", _DEFAULT, "configuration FILE[:PRESET] (import)", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: written by import, read by export")
_FORMAT = flags.DEFINE_enum("format", None, ["safetensors", "stablehlo", "onnx", "timm", "hf"], "what to write (export)")
_OUT = flags.DEFINE_string("out", None, "file, or directory (hf), to write (export)")
_STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; that of the result by default (export)", lower_bound=0)
_NETWORK = flags.DEFINE_enum("network", "teacher", ["teacher", "student"], "which to write (export)")


def main(command: str = "", source: str = "") -> None:
    if command not in ("import", "export"):
        raise ConfigError(f"unknown command {command!r}; use {_COMMANDS}" if command else f"no command; use {_COMMANDS}")
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is missing; pass the directory of a run such as --workdir=runs/dino")
    if command == "import":
        _import(source, _WORKDIR.value)
    else:
        _export(source, _WORKDIR.value)


def _import(source: str, workdir: str) -> None:
    if not source:
        raise ConfigError("import needs a source: python -m cmd_jax.convert import SOURCE --workdir=DIR")
    config = cli.given_config(source)
    cli.start_jax()
    from cmd_jax.weights import transfer

    print("\n".join(transfer.import_run(config, workdir)))
    print(f"wrote {workdir}: evaluate with python -m cmd_jax.eval --workdir={workdir}")


def _export(source: str, workdir: str) -> None:
    if source:
        raise ConfigError(f"unexpected argument {source!r}; export reads --workdir")
    if not files.exists(os.path.join(workdir, "config.json")):
        raise ConfigError(f"{workdir} has no config.json; give the --workdir of a run of cmd_jax.main or of an import")
    if _FORMAT.value is None or _OUT.value is None:
        raise ConfigError("export needs --format=safetensors, stablehlo, onnx, timm or hf, and --out=PATH")
    cli.start_jax()
    from cmd_jax.inference import export

    step, scalars = export.export_run(workdir, _STEP.value, _NETWORK.value, _FORMAT.value, _OUT.value)
    print(f"wrote {_OUT.value}: {_NETWORK.value} of step {step}, {scalars:,} parameters")
    print(f"wrote {export.card_path(_FORMAT.value, _OUT.value)}, its model card: fill in the licence")


if __name__ == "__main__":
    cli.run(main, USAGE, words=2)
