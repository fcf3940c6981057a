"""Weights and programs out of a run, each with a model card beside it."""

import os
from collections.abc import Callable
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from cmd_jax import files
from cmd_jax.config import ConfigDict, default
from cmd_jax.errors import ConfigError
from cmd_jax.inference.load import Trained, read_trained
from cmd_jax.inference.programs import check_onnx, write_onnx, write_stablehlo
from cmd_jax.inference.run import grid_side, widths
from cmd_jax.metrics import load_metrics
from cmd_jax.models.build import make_backbone
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.card import CardFacts, model_card
from cmd_jax.weights.export import preprocessor_config, write_hugging_face, write_timm
from cmd_jax.weights.names import Arrays
from cmd_jax.weights.single import Single, write_single


class Format(NamedTuple):
    """A kind of export.

    Attributes:
        ending: of the file; "" is a directory.
        write: (path, network) -> what is written.
    """

    ending: str
    write: Callable[[str, Trained], None]


def _backbone(trained: Trained) -> Arrays:
    return flatten_dict({"backbone": trained.params["backbone"]}, sep="/")


def _write_single(path: str, trained: Trained) -> None:
    single = Single(
        flatten_dict(trained.params, sep="/"), public_config(trained.config).to_dict(), trained.step, trained.network
    )
    write_single(path, single)


def _write_hugging_face(path: str, trained: Trained) -> None:
    write_hugging_face(path, _backbone(trained), make_backbone(trained.config), preprocessor_config(trained.config))


def _write_timm(path: str, trained: Trained) -> None:
    write_timm(path, _backbone(trained), make_backbone(trained.config), trained.config)


FORMATS = {
    "safetensors": Format(".safetensors", _write_single),
    "stablehlo": Format(".stablehlo", write_stablehlo),
    "onnx": Format(".onnx", write_onnx),
    "timm": Format(".safetensors", _write_timm),
    "hf": Format("", _write_hugging_face),
}
BACKBONE_ALONE = ("timm", "hf")


def export_run(workdir: str, step: int | None, network: str, form: str, out: str) -> tuple[int, int]:
    """Writes the teacher or the student of a run for others, and a model card; nothing else of the run is read.

    Args:
        workdir: of a run.
        step: of the checkpoint; None is its result: the best by `train.best_metric`, or the newest.
        network: "teacher" or "student".
        form: a key of FORMATS.
        out: a directory for "hf", else a file with the format's ending.

    Returns:
        (step, number of parameters written).

    Raises:
        CheckpointError: there is no such step.
        ConfigError: `out` is not what the format writes, or the format's converter is not installed.
        WeightsError: the format has no place for this network.
        DatasetError: the evaluation of the step is damaged.
    """
    ending = FORMATS[form].ending
    if not (out.endswith(ending) if ending else not out.endswith((".safetensors", ".stablehlo", ".onnx"))):
        wanted = f"a file that ends in {ending}" if ending else "a directory"
        raise ConfigError(f"--out is {out!r}; --format={form} writes {wanted}")
    if form == "onnx":
        check_onnx()
    trained = read_trained(workdir, step, network=network)
    part = _backbone(trained) if form in BACKBONE_ALONE else flatten_dict(trained.params, sep="/")
    scalars = sum(array.size for array in part.values())
    card = _card(form, out, trained, scalars, workdir)
    files.make_directory(os.path.dirname(os.path.abspath(out)))
    FORMATS[form].write(out, trained)
    files.write(card_path(form, out), card)
    return trained.step, scalars


def card_path(form: str, out: str) -> str:
    """`README.md` in a directory, beside FILE `FILE.md`: exports of one name in several formats keep their cards."""
    return f"{out}.md" if FORMATS[form].ending else os.path.join(out, "README.md")


def public_config(config: ConfigDict) -> ConfigDict:
    """The configuration without the paths of this machine: folders by their last name alone."""
    public = config.copy_and_resolve_references()
    public.data.update({"data_dir": default().data.data_dir, "manual_dir": "", "cache_dir": ""})
    for section, key in (("data", "folder"), ("data", "eval_folder"), ("init", "weights")):
        value = public[section][key]
        if value and not value.startswith("hf:"):
            public[section][key] = os.path.basename(os.path.normpath(value)) or "folder"
    return public


def _card(form: str, out: str, trained: Trained, scalars: int, workdir: str) -> str:
    config = public_config(trained.config)
    shapes = widths(trained.config, trained.params)
    about = CardFacts(
        form=form,
        name=os.path.basename(os.path.normpath(out)).removesuffix(FORMATS[form].ending),
        file=os.path.basename(os.path.normpath(out)),
        config=config.to_dict(),
        step=trained.step,
        network=trained.network,
        parameters=scalars,
        feature_width=shapes["features"][0],
        grid=grid_side(config),
        fingerprint=trained.fingerprint,
        statistics=statistics_of(trained.config.data.normalization),
    )
    metrics = load_metrics(workdir, trained.step) if trained.network == "teacher" else None
    return model_card(about, [number for number in metrics.numbers if number.value is not None] if metrics else [])
