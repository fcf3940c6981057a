"""Reads a file, a directory or a model on Hugging Face: arrays under that project's names, and facts.

Facts are what shapes cannot show: `config.json` and `preprocessor_config.json` of transformers and timm hold them.
"""

import json
import os
import re
from typing import Any, NamedTuple

from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.models.sizes import VIT_SIZES
from cmd_jax.normalization import statistics_of, text_of
from cmd_jax.weights.files import read_pickled, read_safetensors
from cmd_jax.weights.names import Arrays

HUB_PREFIX = "hf:"
# Of a directory or repository of transformers and timm.
SAFETENSORS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_PICKLED = (".pth", ".pt", ".bin")
_HUB_NAMES = (SAFETENSORS, "pytorch_model.bin")
_WORD = r"\w(?:[\w.-]*\w)?"
_HUB_NAME = re.compile(rf"{HUB_PREFIX}(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>{_WORD}(?:/{_WORD})*))?", re.ASCII)
_ERF_GELU = ("gelu", "gelu_python")


class Facts(NamedTuple):
    """What shapes of arrays cannot show; None where no file says it.

    Attributes:
        num_heads: attention heads of a ViT's block.
        layer_norm_eps: epsilon of the norms.
        normalization: mean and standard deviation as `data.normalization` takes them.
    """

    num_heads: int | None = None
    layer_norm_eps: float | None = None
    normalization: str | None = None


_KEYS = {"num_heads": "model.num_heads", "layer_norm_eps": "model.layer_norm_eps", "normalization": "data.normalization"}


class Pretrained(NamedTuple):
    """A network of another project.

    Attributes:
        arrays: name -> array as in the file, float32.
        facts: of the files beside it.
    """

    arrays: Arrays
    facts: Facts


def read_source(source: str, network: str) -> Pretrained:
    """Reads the arrays of one network and the files beside them.

    Args:
        source: a `.safetensors` file, a directory with `model.safetensors`, a pickled PyTorch checkpoint (.pth, .pt,
            .bin), or hf:OWNER/NAME[@REVISION].
        network: "teacher" or "student", for checkpoints that hold both.

    Raises:
        WeightsError: there is nothing there that can be read.
    """
    path, *beside = _find(source)
    if path.endswith(".safetensors"):
        arrays = read_safetensors(path)
    elif path.endswith(_PICKLED):
        arrays = read_pickled(path, network)
    else:
        raise WeightsError(f"{source} is of no known kind; give a .safetensors, {', '.join(_PICKLED)} or a directory")
    return Pretrained(arrays, read_facts(*beside))


def read_source_facts(source: str) -> Facts:
    """Reads the files beside the weights alone.

    Raises:
        WeightsError: there is nothing there, or a file is damaged or asks for what the models here cannot do.
    """
    _, *beside = _find(source)
    return read_facts(*beside)


def _find(source: str) -> tuple[str, str | None, str | None]:
    """Paths of the weights, and of `config.json` and `preprocessor_config.json` where they are there."""
    if source.startswith(HUB_PREFIX):
        return _download(source)
    path = source
    if os.path.isdir(path):
        path = os.path.join(path, SAFETENSORS)
        if not os.path.exists(path):
            raise WeightsError(f"{source} has no {SAFETENSORS} (nor config.json with checkpoints/ of a run); name a file")
    if not os.path.exists(path):
        raise WeightsError(f"{source} does not exist; give a file, a directory or {HUB_PREFIX}OWNER/NAME")
    if os.path.basename(path) not in _HUB_NAMES:  # a file of another name may lie among those of other networks
        return path, None, None
    beside = (os.path.join(os.path.dirname(path), name) for name in (CONFIG, PREPROCESSOR))
    return path, *(name if os.path.isfile(name) else None for name in beside)


def _download(source: str) -> tuple[str, str | None, str | None]:
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
        return fetch(SAFETENSORS), fetch_if_there(CONFIG), fetch_if_there(PREPROCESSOR)
    except (OSError, ValueError) as error:  # offline, no such repository or file, not a name
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(
            f"{source} cannot be downloaded ({reason}); check the name and the connection, or "
            f"download {SAFETENSORS} yourself and give its path"
        ) from error


def read_facts(config_path: str | None, preprocessor_path: str | None) -> Facts:
    """Reads the two files of a model directory.

    Args:
        config_path: of a `config.json` of transformers or timm; None: there is none.
        preprocessor_path: of a `preprocessor_config.json`; None: there is none.

    Raises:
        WeightsError: a file is damaged, or asks for what the models here cannot do.
    """
    config = _read_json(config_path) if config_path else {}
    preprocessor = _read_json(preprocessor_path) if preprocessor_path else {}
    model = config | config.get("model_args", {})  # timm's arguments beyond its named architecture
    activation = model.get("hidden_act", "gelu")
    if activation not in _ERF_GELU:
        raise WeightsError(f"{config_path} has hidden_act {activation!r}; only 'gelu' (erf) is supported; use other weights")
    try:
        heads = model.get("num_attention_heads", model.get("num_heads"))  # a Swin has a list, which its size fixes
        eps = model.get("layer_norm_eps")
        return Facts(
            num_heads=int(heads) if isinstance(heads, int | float) else None,
            layer_norm_eps=float(eps) if eps is not None else None,
            normalization=_normalization(preprocessor, config.get("pretrained_cfg", {})),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{config_path or preprocessor_path} has values of other types ({error}); download it again"
        ) from error


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); download it again, or remove it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a JSON object; download it again, or remove it")
    return content


def _normalization(preprocessor: dict[str, Any], pretrained: dict[str, Any]) -> str | None:
    """(pixels * factor - mean) / std of transformers, in terms of pixels in 0..1; timm's mean and std are of those."""
    if not {"image_mean", "image_std", "do_normalize", "do_rescale"} & preprocessor.keys():
        both = {"mean", "std"} <= pretrained.keys()
        return text_of(pretrained["mean"], pretrained["std"]) if both else None
    identity = [0.0] * 3, [1.0] * 3
    given = preprocessor.get("image_mean") or [0.485, 0.456, 0.406], preprocessor.get("image_std") or [0.229, 0.224, 0.225]
    mean, std = given if preprocessor.get("do_normalize", True) else identity
    factor = float(preprocessor.get("rescale_factor", 1 / 255)) if preprocessor.get("do_rescale", True) else 1.0
    scale = 1.0 if abs(255 * factor - 1) < 1e-4 else 255 * factor  # files round 1/255
    return text_of([value / scale for value in mean], [value / scale for value in std])


def follow(facts: Facts, config: ConfigDict, source: str) -> ConfigDict:
    """Sets the open keys of a configuration to the facts of the files beside the weights.

    Args:
        facts: of the files.
        config: not resolved; keys that are None are open. It stays as it is.
        source: where the facts are from, for messages.

    Returns:
        A copy with these keys.

    Raises:
        ConfigError: a key that is not open has another value.
    """
    config = config.copy_and_resolve_references()
    for field, key in _KEYS.items():
        value, (section, name) = getattr(facts, field), key.split(".")
        if value is None or (field == "num_heads" and config.model.name not in VIT_SIZES):
            continue
        given = config[section][name]
        if given is None:
            config[section][name] = value
        elif given != value and not (field == "normalization" and statistics_of(given) == statistics_of(value)):
            raise ConfigError(f"{key} is {given!r}, but the files beside {source} say {value!r}; leave {key} out, or use that")
    return config
