"""What the files beside the weights say of a network: `config.json` and `preprocessor_config.json` of transformers and timm."""

import json
import os
from typing import Any, NamedTuple

from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.models.sizes import VIT_SIZES
from cmd_jax.normalization import statistics_of, text_of

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_ERF_GELU = ("gelu", "gelu_python")


class Facts(NamedTuple):
    """What shapes of arrays cannot say; None where no file does.

    Attributes:
        num_heads: attention heads of a ViT's block.
        layer_norm_eps: epsilon of the norms.
        normalization: mean and standard deviation as `data.normalization` takes them.
    """

    num_heads: int | None = None
    layer_norm_eps: float | None = None
    normalization: str | None = None


_KEYS = {"num_heads": "model.num_heads", "layer_norm_eps": "model.layer_norm_eps", "normalization": "data.normalization"}


def follow(facts: Facts, config: ConfigDict, source: str) -> ConfigDict:
    """A configuration whose open keys say what the files beside the weights say.

    Args:
        facts: of the files.
        config: not resolved; keys that are None are open.
        source: where the facts are from, for messages.

    Raises:
        ConfigError: a key that is not open says something else.
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


def read_facts(config_path: str | None, preprocessor_path: str | None) -> Facts:
    """Reads the two files of a model directory.

    Args:
        config_path: of a `config.json` of transformers or timm; None: there is none.
        preprocessor_path: of a `preprocessor_config.json`; None: there is none.

    Raises:
        WeightsError: a file is damaged, or asks for what the models here cannot do.
    """
    config = _read(config_path) if config_path else {}
    preprocessor = _read(preprocessor_path) if preprocessor_path else {}
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


def _read(path: str) -> dict[str, Any]:
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


def find_beside(path: str) -> tuple[str | None, str | None]:
    """Paths of the two files in the directory of weights that bear the hub's name, None where they are not there."""
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    paths = (os.path.join(directory, name) for name in (CONFIG, PREPROCESSOR))
    return tuple(path if os.path.isfile(path) else None for path in paths)
