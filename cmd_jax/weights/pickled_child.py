"""The child process of `files.read_pickled`: python -P pickled_child.py CHECKPOINT NETWORK OUT.

Loads CHECKPOINT with PyTorch's restricted unpickler and writes the arrays of NETWORK to OUT, a .safetensors file, or
their shapes, to a .json file. A checkpoint that it will not read ends with exit code 1 and the reason as the last line of the
error stream.
"""

import argparse
import json
import pickle
import re
import sys
from collections.abc import Mapping
from typing import Any

NETWORKS = ("teacher", "student")
# Under which other keys files keep the one network they hold.
_WRAPPERS = ("state_dict", "model")


def select(content: Any, network: str) -> Mapping:
    """The state dict of a network in a checkpoint's content.

    Args:
        content: what was unpickled: a state dict, or a mapping with one under "teacher", "student" or a wrapper's key.
        network: "teacher" or "student".

    Raises:
        ValueError: it is no mapping, or holds the other network only.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not names with arrays")
    held = [key for key in NETWORKS if isinstance(content.get(key), Mapping)]
    if held and network not in held:
        raise ValueError(f"it has no {network}, but a {held[0]}; set init.network={held[0]}")
    for key in (network, *_WRAPPERS):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def centers(content: Any) -> dict[str, Any]:
    """The centers of the teacher's logits in a training checkpoint of DINO, EsViT or iBOT, by the names of `read.CENTERS`."""
    found = {}
    for loss in ("dino_loss", "ibot_loss"):
        state = content.get(loss) if isinstance(content, Mapping) else None
        for theirs, ours in (("center", "image"), ("center_grid", "region"), ("center2", "region")):
            if isinstance(state, Mapping) and theirs in state:
                found[f"centers/{ours}"] = state[theirs]
    return found


def load(path: str) -> Any:
    """Unpickles arrays, plain containers and argparse.Namespace, and nothing else.

    Raises:
        ValueError: it holds something else, or is damaged.
    """
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks to run {asked[1]}" if asked else "it is damaged or holds more than arrays"
        raise ValueError(
            f"{what}; only arrays, plain containers and argparse.Namespace are read, for a pickle can run any program"
        ) from error
    except Exception as error:  # damaged bytes end in errors of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"it is damaged or no PyTorch checkpoint ({reason})") from error


def main(path: str, network: str, out: str) -> None:
    import torch
    from safetensors.torch import save_file

    try:
        content = load(path)
        state = {**select(content, network), **centers(content)}
    except ValueError as error:
        sys.exit(str(error))
    arrays = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not arrays:
        sys.exit(f"it holds no arrays, but {', '.join(map(str, state)) or 'nothing'}")
    if out.endswith(".json"):
        with open(out, "w", encoding="utf-8") as file:
            json.dump({name: list(value.shape) for name, value in arrays.items()}, file)
    else:  # copies: names that share storage are refused by the format
        save_file({name: value.detach().clone().contiguous() for name, value in arrays.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
