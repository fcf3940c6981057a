"""From what a user names (a file, a directory, a model on Hugging Face) to arrays under that project's names, and facts."""

import os
import re
from typing import NamedTuple

from cmd_jax.errors import WeightsError
from cmd_jax.weights.beside import CONFIG, PREPROCESSOR, Facts, find_beside, read_facts
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.names import Arrays
from cmd_jax.weights.pickled import read_pickled

HUB_PREFIX = "hf:"
SAFETENSORS = "model.safetensors"  # of a directory or repository of transformers and timm
_PICKLED = (".pth", ".pt", ".bin")
_HUB_NAMES = (SAFETENSORS, "pytorch_model.bin")
_WORD = r"\w(?:[\w.-]*\w)?"
_HUB_NAME = re.compile(rf"{HUB_PREFIX}(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>{_WORD}(?:/{_WORD})*))?", re.ASCII)


class Pretrained(NamedTuple):
    """A network of another project.

    Attributes:
        arrays: name -> array as in the file, float32.
        facts: what the files beside it say.
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
    path, beside = _find(source)
    if path.endswith(".safetensors"):
        arrays = read_safetensors(path)
    elif path.endswith(_PICKLED):
        arrays = read_pickled(path, network)
    else:
        raise WeightsError(f"{source} is of no known kind; give a .safetensors, {', '.join(_PICKLED)} or a directory")
    return Pretrained(arrays, read_facts(*beside))


def read_source_facts(source: str) -> Facts:
    """What the files beside the weights say; the weights are not read.

    Raises:
        WeightsError: there is nothing there, or a file is damaged or asks for what the models here cannot do.
    """
    return read_facts(*_find(source)[1])


def _find(source: str) -> tuple[str, tuple[str | None, str | None]]:
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
    # A file of another name may lie among those of other networks.
    return path, find_beside(path) if os.path.basename(path) in _HUB_NAMES else (None, None)


def _download(source: str) -> tuple[str, tuple[str | None, str | None]]:
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
        return fetch(SAFETENSORS), (fetch_if_there(CONFIG), fetch_if_there(PREPROCESSOR))
    except (OSError, ValueError) as error:  # offline, no such repository or file, not a name
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(
            f"{source} cannot be downloaded ({reason}); check the name and the connection, or "
            f"download {SAFETENSORS} yourself and give its path"
        ) from error
