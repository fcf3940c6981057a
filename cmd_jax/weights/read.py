"""From what a user names (a file, a directory, a model on Hugging Face) to arrays under that project's names."""

import os
import re

from cmd_jax.weights.errors import WeightsError
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.names import Arrays
from cmd_jax.weights.pickled import read_pickled

HUB_PREFIX = "hf:"
SAFETENSORS = "model.safetensors"  # of a directory or repository of transformers and timm
_PICKLED = (".pth", ".pt", ".bin")
_WORD = r"\w(?:[\w.-]*\w)?"
_HUB_NAME = re.compile(rf"{HUB_PREFIX}(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>{_WORD}(?:/{_WORD})*))?", re.ASCII)


def read_source(source: str, network: str) -> Arrays:
    """Reads the arrays of one network.

    Args:
        source: a `.safetensors` file, a directory with `model.safetensors`, a pickled PyTorch checkpoint (.pth, .pt,
            .bin), or hf:OWNER/NAME[@REVISION].
        network: "teacher" or "student", for checkpoints that hold both.

    Returns:
        name -> array as in the file, float32.

    Raises:
        WeightsError: there is nothing there that can be read.
    """
    path = _download(source) if source.startswith(HUB_PREFIX) else source
    if os.path.isdir(path):
        path = os.path.join(path, SAFETENSORS)
        if not os.path.exists(path):
            raise WeightsError(f"{source} has no {SAFETENSORS} (nor config.json with checkpoints/ of a run); name a file")
    if not os.path.exists(path):
        raise WeightsError(f"{source} does not exist; give a file, a directory or {HUB_PREFIX}OWNER/NAME")
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    if path.endswith(_PICKLED):
        return read_pickled(path, network)
    raise WeightsError(f"{source} is of no known kind; give a .safetensors, {', '.join(_PICKLED)} or a directory")


def _download(source: str) -> str:
    """Fetches the arrays of a repository, or finds them in the local cache."""
    # Both become parts of paths in the cache.
    asked = _HUB_NAME.fullmatch(source)
    if not asked or ".." in source:
        raise WeightsError(f"{source} names no model; give {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME@REVISION")
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"{source} needs huggingface_hub: pip install huggingface-hub, or download {SAFETENSORS} yourself and give its path"
        ) from None
    try:
        return huggingface_hub.hf_hub_download(asked["repository"], SAFETENSORS, revision=asked["revision"])
    except (OSError, ValueError) as error:  # offline, no such repository or file, not a name
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WeightsError(
            f"{source} cannot be downloaded ({reason}); check the name and the connection, or "
            f"download {SAFETENSORS} yourself and give its path"
        ) from error
