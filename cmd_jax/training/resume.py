"""Resuming a run: which values it keeps, and which may not change."""

import os
from typing import Any

from ml_collections import ConfigDict

from cmd_jax import config as config_lib
from cmd_jax import files
from cmd_jax.config import BY_HARDWARE, BY_WEIGHTS, flatten
from cmd_jax.data import identity
from cmd_jax.data.identity import Split
from cmd_jax.errors import ConfigError

# Keys that may change between two starts of a run: they change its speed, the place of its data, its output and the choice of
# protocols, but no value that is learned or measured.
RESUMABLE_KEYS = frozenset(
    {
        "method.prototype_chunk",
        "method.matched_targets",
        "model.packed_views",
        "model.scan_blocks",
        "model.attention",
        "model.remat",
        "data.data_dir",
        "data.manual_dir",
        "data.decode_threads",
        "data.cache",
        "data.cache_dir",
        "data.prefetch_batches",
        "mesh.data",
        "mesh.shard_state",
        "train.log_every_steps",
        "train.checkpoint_every_epochs",
        "train.keep_checkpoints",
        "train.best_metric",
        "train.stop_on_collapse",
        "eval.protocols",
        "eval.protocols_between",
        "eval.every_epochs",
        "eval.batch_size",
    }
)
# May change too where the work directory records its images, which are compared themselves.
FOLDERS = frozenset({"data.folder", "data.eval_folder"})


def config_differences(stored: dict[str, Any], config: ConfigDict, free: frozenset[str] = RESUMABLE_KEYS) -> list[str]:
    """Lists the values that differ between a `config.json` and a resolved configuration; a phrase each.

    Keys that only one of the two has come from another version of the project and are not compared.

    Args:
        stored: by section.
        config: resolved.
        free: keys that may differ.
    """
    before, now = flatten(ConfigDict(stored)), flatten(config)
    method = config.method
    across_images = method.koleo_weight or method.relation_weight or method.centering == "sinkhorn" or config.head.batch_norm
    free = free if across_images else free | {"train.accumulate"}  # what looks across images sees a part at a time
    plain = lambda value: list(value) if isinstance(value, tuple | list) else value
    return [
        f"{key} is {before[key]!r} there and {now[key]!r} here"
        for key in sorted(before.keys() & now.keys() - free)
        if plain(before[key]) != plain(now[key])
    ]


def has_steps(workdir: str) -> bool:
    """Whether a work directory has a configuration and steps to continue from."""
    steps = any(name.isdigit() for name in files.names(os.path.join(workdir, "checkpoints")))
    return steps and files.exists(os.path.join(workdir, "config.json"))


def with_stored_values(config: ConfigDict, workdir: str) -> ConfigDict:
    """Fills keys that are left to the hardware or to `init.weights` with the values that a run was started with.

    So a run that was started on 16 GPUs keeps its batch size and precision on 4, and needs its initial weights no more.

    Args:
        config: as given, not resolved.
        workdir: of a run that `has_steps`.

    Returns:
        A copy in which values of BY_HARDWARE and BY_WEIGHTS that were None are those of the `config.json`.
    """
    config = config.copy_and_resolve_references()
    stored = flatten(ConfigDict(config_lib.read_json(os.path.join(workdir, "config.json"))))
    with config.ignore_type():
        for key in BY_HARDWARE + BY_WEIGHTS:
            section, name = key.split(".")
            if config[section][name] is None:
                config[section][name] = stored.get(key)
    return config


def check_unchanged(config: ConfigDict, workdir: str, images: dict[str, Split]) -> None:
    """Raises if a run would be resumed with other values or images than it was started with.

    Args:
        config: resolved, with absolute paths.
        workdir: of a run that has begun. Without a `config.json`, or a `data.json`, there is nothing to compare.
        images: the splits that the run would read, by their keys in `identity.SPLITS`.

    Raises:
        ConfigError: naming the first three values, or the first images, that differ.
    """
    path, knows_images = os.path.join(workdir, "config.json"), identity.is_recorded(workdir)
    if files.exists(path):
        stored = config_lib.read_json(path)
        if not knows_images and "data" in stored:  # of an earlier version, which stored paths as they were given
            earlier = config_lib.absolute_paths(config_lib.load(path)).data
            stored["data"] = {key: earlier[key] if f"data.{key}" in FOLDERS else value for key, value in stored["data"].items()}
        found = config_differences(stored, config, RESUMABLE_KEYS | FOLDERS if knows_images else RESUMABLE_KEYS)
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"{path} is of another run: {'; '.join(found[:3])}{more}; give the old values or another --workdir, or edit "
                "the file where the change is meant"
            )
    found = identity.differences(workdir, images) if knows_images else []
    if found:
        raise ConfigError(
            f"{workdir} was started with other images: {'; '.join(found)}; restore the images, or start a new run from this "
            f"one with another --workdir and --config.init.weights={workdir}"
        )
