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
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.fingerprint import array_differences
from cmd_jax.training.sharding import all_hardware
from cmd_jax.weights.fit import check_numbers, fit
from cmd_jax.weights.names import Arrays
from cmd_jax.weights.read import follow, read_source
from cmd_jax.weights.single import PARTS, fingerprint, is_single, read_single, settings_of

MAX_CROP_PX = 4096  # of a file from elsewhere: larger crops would take all memory


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
    resize_px: int | None = None,
    num_heads: int | None = None,
) -> Trained:
    """Reads a network.

    Args:
        source: the work directory of a run; a file of `cmd_jax.convert export --format=safetensors`; or a backbone of another
            project (see `weights.read.read_source` for the files), which says itself what it is.
        step: of a run's checkpoint; None is its result: the best by `train.best_metric`, or the newest.
        features: pools of a feature, "cls", "mean", "mil", "blocks" or several joined by "+"; None: as the run was evaluated,
            and of other projects' weights the class token or, of a Swin, the mean.
        model: name of the model, for weights of other projects alone, to be compared with what they are.
        image_px: side of the evaluation crop, for weights of other projects alone; None: theirs.
        network: "teacher" or "student", of a run.
        resize_px: what images are resized to before the crop, for weights of other projects alone; None: theirs, in proportion
            to the crop.
        num_heads: attention heads, for weights of other projects that do not say it.

    Raises:
        ConfigError: arguments that do not fit the source, or a configuration that cannot work.
        CheckpointError: the run has no such step.
        WeightsError: the weights cannot be read, or are of another model.
    """
    others = {"model": model, "image_px": image_px, "resize_px": resize_px, "num_heads": num_heads}
    if files.exists(os.path.join(source, "config.json")) and files.exists(os.path.join(source, "checkpoints")):
        _refuse(source, "is a run, which knows its model", **others)
        return _of_run(source, step, features, network)
    _refuse(source, "is no work directory of a run", step=step)
    if source.endswith(".safetensors") and os.path.isfile(source) and is_single(source):
        _refuse(source, "knows its model", **others)
        return _of_file(source, features)
    return _of_others(source, features, network, **others)


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
    _check_crop(config, source)
    return _fitted(single.arrays, config, single.step, single.network, source)


def _check_crop(config: ConfigDict, source: str) -> None:
    if config.eval.crop_px > MAX_CROP_PX or config.eval.resize_px > 2 * MAX_CROP_PX:
        raise WeightsError(f"{source} asks for crops of {config.eval.crop_px} px; at most {MAX_CROP_PX} are read from a file")


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


def _of_others(
    source: str,
    features: str | None,
    network: str,
    model: str | None,
    image_px: int | None,
    resize_px: int | None,
    num_heads: int | None,
) -> Trained:
    named, recognised, _ = read_source(source, network)
    config = config_lib.default()
    config.model.name, config.model.num_heads = model, num_heads
    config.views.global_px, config.eval.resize_px = image_px, resize_px
    config_lib.check_values(config)
    config = follow(recognised, config, source, whole_crop=True)
    config.views.local_count = 0
    config.views.local_px = config.views.global_px
    config.method.image_pool = "cls" if config_lib.has_class_token(config) else "mean"
    config.eval.features = config.method.image_pool
    config = _checked(config, features)
    _check_crop(config, source)
    _no_scorer(source, config.eval.features)
    shapes = _shapes(config)
    fitted = fit(named, {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}, source, heads=False)
    return Trained(config, unflatten_dict(fitted.arrays, sep="/"), None, network, source, _fingerprint(fitted.arrays, config))


def _no_scorer(source: str, features: str) -> None:
    if "mil" in features.split("+"):
        raise ConfigError(f"features={features} need the MIL scorer, which {source} does not hold; use cls, mean or blocks")


def _fingerprint(arrays: Arrays, config: ConfigDict) -> str:
    return fingerprint(arrays, settings_of(config.to_dict()))
