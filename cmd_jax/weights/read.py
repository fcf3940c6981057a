"""Reads a file, a directory or a model on Hugging Face: the arrays of one network, and what it is."""

import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.models.sizes import VIT
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import (
    read_metadata,
    read_pickled,
    read_pickled_shapes,
    read_safetensors,
    read_safetensors_shapes,
)
from cmd_jax.weights.names import Arrays, Named, identify, stand_ins
from cmd_jax.weights.preparation import USUAL_PX, Beside
from cmd_jax.weights.recognise import Recognised, recognise

HUB_PREFIX = "hf:"
# Of a directory or repository of transformers and timm.
SAFETENSORS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_OPEN_CLIP = "open_clip_config.json"
_INDEX = ".safetensors.index.json"  # names the parts of a network in several files
_PICKLED = (".pth", ".pt", ".bin", ".tar")
# In a directory or repository, the first that is there.
_HUB_NAMES = (
    SAFETENSORS,
    f"model{_INDEX}",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WORD = r"\w(?:[\w.-]*\w)?"
_HUB_NAME = re.compile(rf"{HUB_PREFIX}(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>{_WORD}(?:/{_WORD})*))?", re.ASCII)
_PART = re.compile(rf"{_WORD}\.safetensors", re.ASCII)  # becomes a part of a path
CENTERS = ("centers/image", "centers/region")
METADATA = "config"  # of our own exports for timm: its config.json


class Pretrained(NamedTuple):
    """A network of another project.

    Attributes:
        named: the arrays, float32.
        recognised: what it is.
        centers: of the teacher's logits at both levels, by the names of CENTERS; those that the file holds.
    """

    named: Named
    recognised: Recognised
    centers: Arrays


class _Found(NamedTuple):
    """Local paths of a source: of its weights, in one file or several, and of the JSON files beside them, None where there is
    none."""

    weights: list[str]
    config: str | None = None
    preprocessor: str | None = None
    open_clip: str | None = None


def read_source(source: str, network: str) -> Pretrained:
    """Reads the arrays of one network, and the files beside them.

    Args:
        source: a `.safetensors` file, or `.safetensors.index.json` of several; a pickled PyTorch checkpoint (.pth, .pt, .bin,
            .tar); a directory of transformers, timm or OpenCLIP; or hf:OWNER/NAME[@REVISION].
        network: "teacher" or "student", for checkpoints that hold both.

    Raises:
        WeightsError: there is nothing there that can be read, or its names are unknown.
    """
    return _read(source, network, read_safetensors, read_pickled)


def recognise_source(source: str, network: str) -> Recognised:
    """What `read_source` recognises, from the shapes alone.

    Raises:
        WeightsError: as `read_source`.
    """
    of_pickled = lambda path, network: stand_ins(read_pickled_shapes(path, network))
    return _read(source, network, lambda path: stand_ins(read_safetensors_shapes(path)), of_pickled).recognised


def _read(source: str, network: str, read: Callable[[str], Arrays], read_pickle: Callable[[str, str], Arrays]) -> Pretrained:
    found = _find(source)
    arrays: Arrays = {}
    for path in found.weights:
        if not path.endswith((".safetensors", *_PICKLED)):
            raise WeightsError(f"{source} is of no known kind; give a .safetensors, {', '.join(_PICKLED)} or a directory")
        arrays |= read(path) if path.endswith(".safetensors") else read_pickle(path, network)
    config = _read_json(found.config)
    if not config and len(found.weights) == 1 and path.endswith(".safetensors") and METADATA in (about := read_metadata(path)):
        config = _parse(about[METADATA], f"the metadata of {path}")
    centers = {name: arrays.pop(name) for name in CENTERS if name in arrays}
    named = identify(arrays, network, source)
    beside = Beside(config, _read_json(found.preprocessor), _read_json(found.open_clip))
    return Pretrained(named, recognise(named, beside, source), centers)


def _find(source: str) -> _Found:
    if source.startswith(HUB_PREFIX):
        return _download(source)
    path = source
    if os.path.isdir(path):
        path = next((path for name in _HUB_NAMES if os.path.exists(path := os.path.join(source, name))), None)
        if path is None:
            raise WeightsError(
                f"{source} has no {SAFETENSORS}, {', '.join(_HUB_NAMES[1:])} (nor config.json with checkpoints/ of a run); "
                "name a file"
            )
    if not os.path.exists(path):
        raise WeightsError(f"{source} does not exist; give a file, a directory or {HUB_PREFIX}OWNER/NAME")
    folder = os.path.dirname(path)
    weights = [os.path.join(folder, part) for part in _parts(path)] if path.endswith(_INDEX) else [path]
    if os.path.basename(path) not in _HUB_NAMES:  # a file of another name may lie among those of other networks
        return _Found(weights)
    beside = (os.path.join(folder, name) for name in (CONFIG, PREPROCESSOR, _OPEN_CLIP))
    return _Found(weights, *(name if os.path.isfile(name) else None for name in beside))


def _parts(path: str) -> list[str]:
    """Names of the files that an index lists."""
    listed = _read_json(path).get("weight_map")
    parts = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    wrong = [part for part in parts if not _PART.fullmatch(part)]
    if wrong or not parts:
        raise WeightsError(f"{path} names {wrong[0] if wrong else 'no files'}; a weight_map of .safetensors beside it is read")
    return parts


def _download(source: str) -> _Found:
    """Fetches the files of a repository, or finds them in the local cache."""
    # Both become parts of paths in the cache.
    asked = _HUB_NAME.fullmatch(source)
    if not asked or ".." in source:
        raise WeightsError(f"{source} names no model; give {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME@REVISION")
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise WeightsError(
            f"{source} needs huggingface_hub: pip install huggingface-hub, or download {SAFETENSORS} yourself and give its path"
        ) from None

    def fetch(name: str) -> str:
        return huggingface_hub.hf_hub_download(asked["repository"], name, revision=asked["revision"])

    def fetch_if_there(name: str) -> str | None:
        try:
            return fetch(name)
        except LocalEntryNotFoundError:  # not in the cache, and no connection: it may well be there
            raise
        except EntryNotFoundError:
            return None

    try:
        path = next((path for name in _HUB_NAMES[:-1] if (path := fetch_if_there(name))), None) or fetch(_HUB_NAMES[-1])
        weights = [fetch(part) for part in _parts(path)] if path.endswith(_INDEX) else [path]
        return _Found(weights, *map(fetch_if_there, (CONFIG, PREPROCESSOR, _OPEN_CLIP)))
    except (OSError, ValueError) as error:  # offline, no such repository or file, not a name
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(
            f"{source} cannot be downloaded ({reason}); check the name and the connection, or "
            f"download {SAFETENSORS} yourself and give its path"
        ) from error


def _read_json(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return _parse(file.read(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again, or remove it") from error


def _parse(text: str, path: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again, or remove it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a JSON object; download it again, or remove it")
    return content


def follow(recognised: Recognised, config: ConfigDict, source: str, whole_crop: bool) -> ConfigDict:
    """Sets the open keys of a configuration to what weights are.

    Args:
        recognised: of the weights.
        config: not resolved; keys that are None are open. It stays as it is.
        source: where the weights are from, for messages.
        whole_crop: open image sides are those that the weights were made for; False, for training: at most 224 px.

    Returns:
        A copy with these keys.

    Raises:
        ConfigError: a key of `model`, or the normalization, is not open and has another value than the weights say, beyond
            what is usual for their like; or nothing says how many heads there are.
    """
    config = config.copy_and_resolve_references()
    values = dict(recognised.keys)
    crop, resize = values.pop("eval.crop_px"), values.pop("eval.resize_px", None)
    if config.model.name == VIT:  # the same network by its sizes
        values["model.name"] = VIT
    for key, value in values.items():
        section, name = key.split(".")
        given = config[section][name]
        if given is None:
            config[section][name] = value
        elif _is_said(key, recognised) and given != value and not _same_normalization(key, given, value):
            raise ConfigError(f"{key} is {given!r}, but {source} says {value!r}; leave {key} out, or use that")
    if config.model.num_heads is None and "model.width" in values:
        width = values["model.width"]
        raise ConfigError(
            f"{source} does not say how many attention heads its {width} channels have; set model.num_heads (in Python "
            f"num_heads), for example {max(1, width // 64)}"
        )
    if config.views.global_px is None:
        unit = token_px(config)
        config.views.global_px = max(unit, (crop if whole_crop else min(USUAL_PX, crop)) // unit * unit)
    if config.eval.resize_px is None and resize is not None:
        side = config.eval.crop_px or config.views.global_px
        config.eval.resize_px = max(side, round(side * resize / crop))
    return config


def _is_said(key: str, recognised: Recognised) -> bool:
    """Whether a key is a fact, and not a choice."""
    return not key.startswith("eval.") and key not in recognised.usual


def _same_normalization(key: str, given: Any, value: Any) -> bool:
    return key == "data.normalization" and statistics_of(given) == statistics_of(value)
