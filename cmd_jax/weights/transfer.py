"""Initial weights of a run, from files of other projects or from another run, and work directories made of them."""

import os

import jax
from flax.traverse_util import flatten_dict

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import ConfigDict, validate
from cmd_jax.errors import CheckpointError
from cmd_jax.models.build import Params, init_params, make_network
from cmd_jax.models.network import Network
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.lock import hold
from cmd_jax.training.run import replace_arrays
from cmd_jax.training.sharding import all_hardware
from cmd_jax.weights.fit import Fitted, fit
from cmd_jax.weights.read import Facts, follow, read_source, read_source_facts


def initial_weights(config: ConfigDict, network: Network) -> Fitted:
    """Reads `init.weights` and fits it to the network.

    Args:
        config: resolved; `init.weights` is set.
        network: of the configuration.

    Returns:
        Arrays of the backbone, and with `init.heads` of the heads; both student and teacher start from them.

    Raises:
        WeightsError: it cannot be read or does not fit.
        CheckpointError: it is a work directory without checkpoints.
    """
    source = config.init.weights
    if files.exists(os.path.join(source, "checkpoints")):
        arrays = flatten_dict(_read_run(source, None, config.init.network)[1], sep="/")
    else:
        arrays = read_source(source, config.init.network).arrays
    shapes = jax.eval_shape(lambda: init_params(config, network))
    return fit(arrays, {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}, source, config.init.heads)


def follow_source(config: ConfigDict) -> ConfigDict:
    """Fills the open keys of a configuration from the files beside `init.weights`.

    Args:
        config: as given, not resolved.

    Raises:
        WeightsError: there is nothing there, or the files ask for what the models here cannot do.
        ConfigError: a key contradicts the files.
    """
    source = config.init.weights
    if not source:
        return config
    if not files.exists(os.path.join(source, "checkpoints")):
        return follow(read_source_facts(source), config, source)
    path = os.path.join(source, "config.json")
    if not files.exists(path):
        return config
    of_run = config_lib.load(path)
    facts = Facts(of_run.model.num_heads, of_run.model.layer_norm_eps, of_run.data.normalization)
    return follow(facts, config, source)


def _read_run(workdir: str, step: int | None, network: str) -> tuple[int, Params]:
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.read_network(network, step)
    finally:
        checkpoints.close()


def import_run(config: ConfigDict, workdir: str) -> list[str]:
    """Makes a work directory from weights: `config.json` and step 0 with the teacher, ready for evaluation and export.

    No data is opened; keys that depend on the number of images get the values for few.

    Args:
        config: as given; `init.weights` is set.
        workdir: a new directory.

    Returns:
        What was taken, resampled and left out; a sentence each.

    Raises:
        ConfigError: a value cannot work, or another process trains in the directory.
        CheckpointError: the directory has checkpoints.
        WeightsError: the checkpoint cannot be read or does not fit.
    """
    validate(config)
    config = config_lib.resolve(follow_source(config_lib.absolute_paths(config)), train_images=0)
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
    return list(weights.notes)
