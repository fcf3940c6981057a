"""A trained network ready for use: from a work directory, from our own file, or from the backbone of another project."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import ConfigDict, validate
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.models.build import Params, init_params, make_network
from cmd_jax.models.sizes import SWIN_SIZES
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.fingerprint import array_differences
from cmd_jax.training.sharding import all_hardware
from cmd_jax.weights.fit import check_numbers, fit
from cmd_jax.weights.names import Arrays, detect_layout, strip_prefixes, to_ours
from cmd_jax.weights.read import follow, read_source
from cmd_jax.weights.single import PARTS, fingerprint, is_single, read_single, settings_of

MAX_CROP_PX = 4096  # of a file from elsewhere: larger crops would take all memory
IMAGE_PX = 224


class Trained(NamedTuple):
    """What inference needs, and nothing else.

    Attributes:
        config: resolved; `eval.features` names the pools of a feature.
        params: "backbone" and, but for backbones of other projects and scorers without parameters, "mil_scorer"; NumPy float32.
        step: of the checkpoint; None for other projects' weights.
        network: "teacher" or "student".
        source: where it is from, as the user named it.
        fingerprint: of the arrays and of how images are prepared, see `weights.single.fingerprint`.
    """

    config: ConfigDict
    params: Params
    step: int | None
    network: str
    source: str
    fingerprint: str

    @property
    def has_scorer(self) -> bool:
        """Whether there are MIL weights that tell patches apart."""
        return "mil_scorer" in self.params or self.config.method.mil_scorer == "class_token"


def read_trained(
    source: str,
    step: int | None = None,
    features: str | None = None,
    model: str | None = None,
    image_px: int | None = None,
    network: str = "teacher",
) -> Trained:
    """Reads a network.

    Args:
        source: the work directory of a run; a file of `cmd_jax.convert export --format=safetensors`; or, with `model`, a
            backbone of DINO, EsViT, timm or transformers (see `weights.read.read_source` for the files).
        step: of a run's checkpoint; None is its result: the best by `train.best_metric`, or the newest.
        features: pools of a feature, "cls", "mean", "mil", "blocks" or several joined by "+"; None: as the run was evaluated,
            and of other projects' weights the class token or, of a Swin, the mean.
        model: name of the model, for weights of other projects alone.
        image_px: side of the evaluation crop, for weights of other projects alone; None is 224.
        network: "teacher" or "student", of a run.

    Raises:
        ConfigError: arguments that do not fit the source, or a configuration that cannot work.
        CheckpointError: the run has no such step.
        WeightsError: the weights cannot be read, or are of another model.
    """
    if files.exists(os.path.join(source, "config.json")) and files.exists(os.path.join(source, "checkpoints")):
        _refuse(source, "is a run, which knows its model", model=model, image_px=image_px)
        return _of_run(source, step, features, network)
    _refuse(source, "is no work directory of a run", step=step)
    if source.endswith(".safetensors") and os.path.isfile(source) and is_single(source):
        _refuse(source, "knows its model", model=model, image_px=image_px)
        return _of_file(source, features)
    return _of_others(source, features, model, image_px or IMAGE_PX, network)


def _refuse(source: str, why: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{source} {why}; leave {name}={value} out")


def _of_run(source: str, step: int | None, features: str | None, network: str) -> Trained:
    config = _checked(config_lib.load(os.path.join(source, "config.json")), features)
    checkpoints = Checkpoints(source, best_metric=config.train.best_metric, read_only=True)
    try:
        step, params = checkpoints.read_network(network, step)
    finally:
        checkpoints.close()
    arrays = {name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items() if name.startswith(PARTS)}
    return _fitted(arrays, config, step, network, source)


def _of_file(source: str, features: str | None) -> Trained:
    single = read_single(source)
    try:
        config = _checked(config_lib.from_dict(single.config), features)
    except ConfigError as error:
        raise WeightsError(f"{source}: {error}") from error
    except Exception as error:  # ml_collections raises many types on a section that is none
        raise WeightsError(f"{source} has a configuration that is none ({type(error).__name__}); export it again") from error
    if config.eval.crop_px > MAX_CROP_PX or config.eval.resize_px > 2 * MAX_CROP_PX:
        raise WeightsError(f"{source} asks for crops of {config.eval.crop_px} px; at most {MAX_CROP_PX} are read from a file")
    return _fitted(single.arrays, config, single.step, single.network, source)


def _checked(config: ConfigDict, features: str | None) -> ConfigDict:
    if features is not None:
        config.eval.features = features
    validate(config)
    return config_lib.resolve(config, train_images=0)  # fills what an older version did not know


def _shapes(config: ConfigDict) -> Params:
    """Of the parameters of a resolved configuration, which may be of a run on other hardware."""
    network = make_network(config_lib.for_inference(config, all_hardware()))
    return jax.eval_shape(lambda: init_params(config, network))


def _fitted(arrays: Arrays, config: ConfigDict, step: int, network: str, source: str) -> Trained:
    check_numbers(arrays, source)
    shapes = _shapes(config)
    wanted = {part: shapes[part] for part in ("backbone", "mil_scorer") if part in shapes}
    found = {name: (array.shape, str(array.dtype), "") for name, array in arrays.items()}
    wrong = array_differences(wanted, found)
    if wrong:
        raise WeightsError(
            f"{source} does not fit its own configuration: {len(wrong)} arrays differ, first {'; '.join(wrong[:3])}; use the "
            "configuration that it was trained with"
        )
    return Trained(config, unflatten_dict(arrays, sep="/"), step, network, source, _fingerprint(arrays, config))


def _of_others(source: str, features: str | None, model: str | None, image_px: int, network: str) -> Trained:
    arrays, facts = read_source(source, network)
    if model is None:
        raise ConfigError(f"{source} is of another project and does not say its model; name it, for example model=vit_small")
    config = config_lib.default()
    config.model.name = model
    config.views.global_px = image_px
    config.views.local_count = 0
    config.views.local_px = image_px
    config.method.image_pool = "mean" if model in SWIN_SIZES else "cls"
    config.eval.features = config.method.image_pool
    _read_shapes(config, arrays, source)
    config = _checked(follow(facts, config, source), features)
    _no_scorer(source, config.eval.features)
    shapes = _shapes(config)
    fitted = fit(arrays, {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}, source, heads=False)
    return Trained(config, unflatten_dict(fitted.arrays, sep="/"), None, network, source, _fingerprint(fitted.arrays, config))


def _no_scorer(source: str, features: str) -> None:
    if "mil" in features.split("+"):
        raise ConfigError(f"features={features} need the MIL scorer, which {source} does not hold; use cls, mean or blocks")


def _read_shapes(config: ConfigDict, arrays: Arrays, source: str) -> None:
    """What a model's name leaves open and the arrays show: patch side, registers, window."""
    given = strip_prefixes(arrays)
    ours, _ = to_ours(given, detect_layout(set(given), source))
    kernel, registers = ours.get("backbone/patch_embed/kernel"), ours.get("backbone/register_tokens")
    if kernel is not None and kernel.ndim == 4:
        config.model.patch_size = int(kernel.shape[0])
    if registers is not None and registers.ndim == 3:
        config.model.registers = int(registers.shape[1])
    tables = [table.shape[0] for name, table in ours.items() if name.endswith("relative_position_bias_table") and table.ndim]
    if tables:
        config.model.window = (round(max(tables) ** 0.5) + 1) // 2


def _fingerprint(arrays: Arrays, config: ConfigDict) -> str:
    return fingerprint(arrays, settings_of(config.to_dict()))
