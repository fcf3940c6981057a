"""Our own weights file: backbone and MIL scorer under our names, and the configuration.

A `.safetensors` file whose metadata has one key, `cmd_jax`: a JSON object of `schema`, `version` (of this package), `step`,
`network`, `fingerprint` (see `fingerprint`) and `config` (resolved). `cmd_jax.load` needs nothing else.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import __version__
from cmd_jax.errors import WeightsError
from cmd_jax.models.sizes import VIT_SIZES
from cmd_jax.weights.files import read_metadata, read_safetensors, write_safetensors
from cmd_jax.weights.names import Arrays

KEY = "cmd_jax"
SCHEMA = 1
MAX_METADATA = 2**20  # characters; a configuration takes four thousand
PARTS = ("backbone/", "mil_scorer/")
# What features depend on beside the arrays; which pools are concatenated is chosen when images are embedded.
SETTINGS = (
    "model.name",
    "model.patch_size",
    "model.registers",
    "model.window",
    "model.dtype",
    "views.global_px",
    "method.mil_temp",
    "data.grayscale",
    "data.normalization",
    "eval.resize_px",
    "eval.crop_px",
    "eval.last_blocks",
)


class Single(NamedTuple):
    """Content of a weights file.

    Attributes:
        arrays: under our names, float32.
        config: the configuration as a dict by section; not checked.
        step: of the checkpoint.
        network: "teacher" or "student".
    """

    arrays: Arrays
    config: dict[str, Any]
    step: int
    network: str


def fingerprint(arrays: Arrays, settings: dict[str, Any]) -> str:
    """Hashes a network and how images are prepared for it to 32 hexadecimal digits.

    Args:
        arrays: under our names.
        settings: values of SETTINGS.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.data.cast("B") if array.size else b"")
    return digest.hexdigest()[:32]


def is_single(path: str) -> bool:
    """Whether a `.safetensors` file was written by `write_single`.

    Raises:
        WeightsError: it is missing or damaged.
    """
    return KEY in read_metadata(path)


def write_single(path: str, content: Single) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: of the file; its directory exists.
        content: `config` is resolved.
    """
    about = {
        "schema": SCHEMA,
        "version": __version__,
        "step": content.step,
        "network": content.network,
        "fingerprint": fingerprint(content.arrays, settings_of(content.config)),
        "config": content.config,
    }
    write_safetensors(path, content.arrays, {KEY: json.dumps(about)})


def read_single(path: str) -> Single:
    """Reads a file that `write_single` wrote.

    Raises:
        WeightsError: it is damaged, of a newer version, or not of `write_single`.
    """
    text = read_metadata(path).get(KEY, "")
    remedy = "export it again (cmd_jax.convert export --format=safetensors)"
    if not 0 < len(text) <= MAX_METADATA:
        raise WeightsError(f"{path} has {len(text):,} characters of metadata, 1 to {MAX_METADATA:,} are read; {remedy}")
    try:
        about = json.loads(text)
        schema, step, network, stored = (about[key] for key in ("schema", "step", "network", "fingerprint"))
        config = dict(about["config"].items())
        settings = settings_of(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(f"{path} has damaged metadata ({reason}); {remedy}") from error
    if schema != SCHEMA:
        raise WeightsError(f"{path} has format {schema!r}, and this version reads {SCHEMA}; use the version that wrote it")
    if type(step) is not int or step < 0 or network not in ("teacher", "student"):
        raise WeightsError(f"{path} says step {step!r} of {network!r}; {remedy}")
    arrays = read_safetensors(path)
    if fingerprint(arrays, settings) != stored:
        raise WeightsError(f"{path} does not hold what was written: its fingerprint differs; copy or export it again")
    return Single(arrays, config, step, network)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Takes the values of SETTINGS from a configuration by section, and of later keys those that are not what they were before
    there were such keys: the fingerprint of an older file stays."""
    settings = {key: config[key.split(".")[0]][key.split(".")[1]] for key in SETTINGS}
    model, evaluation = config["model"], config["eval"]
    size = VIT_SIZES.get(model["name"])
    before = {
        # Once left open for the heads of the size; since there is a table_px, written down.
        "model.num_heads": size.heads if size and "table_px" in model else None,
        "model.layer_norm_eps": 1e-6,
        "model.table_px": config["views"]["global_px"],
        "model.class_token": True,
        "model.positions": "class_patches",
        "model.resample_rule": "dino",
        "model.rope_base": 100.0,
        "model.activation": "gelu",
        "model.qkv_bias": "qkv",
        "eval.resize_mode": "shorter_side",
        "eval.interpolation": "bicubic",
    }
    values = {"model": model, "eval": evaluation}
    later = {key: values[key.split(".")[0]].get(key.split(".")[1]) for key in before}
    return settings | {key: value for key, value in later.items() if value is not None and value != before[key]}
