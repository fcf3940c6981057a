"""Initial weights of a run, from files of other projects or from another run, and work directories made of them."""

import os

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import BY_WEIGHTS, ConfigDict, validate
from cmd_jax.errors import CheckpointError
from cmd_jax.models.build import Params, init_params, make_network
from cmd_jax.models.network import Network
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.lock import hold
from cmd_jax.training.run import replace_arrays
from cmd_jax.training.sharding import all_hardware
from cmd_jax.weights.fit import Fitted, fit
from cmd_jax.weights.layouts import OURS
from cmd_jax.weights.names import Arrays, Named
from cmd_jax.weights.read import follow, read_source, recognise_source
from cmd_jax.weights.recognise import Recognised


def initial_weights(config: ConfigDict, network: Network) -> Fitted:
    """Reads `init.weights` and fits it to the network.

    Args:
        config: resolved; `init.weights` is set.
        network: of the configuration.

    Returns:
        Arrays of the backbone, and with `init.heads` of the heads and the centers that belong to them; both student and teacher
        start from them.

    Raises:
        WeightsError: it cannot be read or does not fit.
        CheckpointError: it is a work directory without checkpoints.
    """
    source = config.init.weights
    if _is_run(source):
        params, centers = _read_run(source, config.init.network, config.init.heads)
        named = Named(flatten_dict(params, sep="/"), OURS)
    else:
        named, _, centers = read_source(source, config.init.network)
    shapes = jax.eval_shape(lambda: init_params(config, network))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}
    fitted = fit(named, shapes, source, config.init.heads)
    if not config.init.heads:
        return fitted
    flat = {name: np.asarray(center, np.float32).reshape(-1) for name, center in centers.items()}
    return fitted._replace(centers={name: center for name, center in flat.items() if center.size == config.head.prototypes})


def follow_source(config: ConfigDict, whole_crop: bool = False) -> tuple[ConfigDict, str]:
    """Fills the open keys of a configuration with what `init.weights` are.

    Args:
        config: as given, not resolved.
        whole_crop: see `read.follow`.

    Returns:
        (a copy with these keys, one line that says what the weights are; empty without them).

    Raises:
        WeightsError: there is nothing there, or it is nothing that the models here can do.
        ConfigError: a key contradicts the weights.
    """
    source = config.init.weights
    if not source:
        return config, ""
    recognised = _of_run(source) if _is_run(source) else recognise_source(source, config.init.network)
    return follow(recognised, config, source, whole_crop), f"{source} is {recognised.line}"


def _is_run(source: str) -> bool:
    return files.exists(os.path.join(source, "checkpoints"))


def _of_run(workdir: str) -> Recognised:
    config = config_lib.resolve(config_lib.load(os.path.join(workdir, "config.json")), train_images=0)
    values = config_lib.flatten(config)
    keys = {key: values[key] for key in (*BY_WEIGHTS, "eval.crop_px") if key != "views.global_px" and values[key] is not None}
    return Recognised(keys, f"a run of {config.model.name}/{config.model.patch_size}, features at {config.eval.crop_px} px")


def _read_run(workdir: str, network: str, heads: bool) -> tuple[Params, Arrays]:
    """A network of a run's result, and with its heads the centers of its teacher's logits."""
    path = os.path.join(workdir, "config.json")
    best_metric = config_lib.load(path).train.best_metric if files.exists(path) else None
    checkpoints = Checkpoints(workdir, best_metric=best_metric, read_only=True)
    try:
        step, params = checkpoints.read_network(network)
        return params, checkpoints.read_centers(step) if heads else {}
    finally:
        checkpoints.close()


def import_run(config: ConfigDict, workdir: str) -> list[str]:
    """Makes a work directory from weights: `config.json` and step 0 with the teacher, ready for evaluation and export.

    No data is opened; keys that depend on the number of images get the values for few.

    Args:
        config: as given; `init.weights` is set.
        workdir: a new directory.

    Returns:
        What it is, what was taken, resampled and left out; a sentence each.

    Raises:
        ConfigError: a value cannot work, or another process trains in the directory.
        CheckpointError: the directory has checkpoints.
        WeightsError: the checkpoint cannot be read or does not fit.
    """
    validate(config)
    config, line = follow_source(config_lib.absolute_paths(config), whole_crop=True)
    config = config_lib.resolve(config, train_images=0)
    validate(config)
    if files.exists(os.path.join(workdir, "checkpoints")):
        raise CheckpointError(f"{workdir} is the directory of a run; choose another --workdir")
    network = make_network(config_lib.for_inference(config, all_hardware()))
    weights = initial_weights(config, network)
    teacher = replace_arrays(jax.jit(lambda: init_params(config, network))(), weights.arrays)
    with hold(workdir):
        checkpoints = Checkpoints(workdir)
        checkpoints.save_teacher(teacher, config)
        checkpoints.close()
        config_lib.save(config, os.path.join(workdir, "config.json"))
    return [line, *weights.notes]
