"""Parameter trees <-> flat dicts of arrays under names joined by "/"."""

from typing import Any

import jax
import numpy as np

from cmd_jax.weights.errors import WeightsError
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.names import Arrays, detect_layout, strip_prefixes, to_ours


def flatten(tree: Any) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def read_tree(path: str) -> dict[str, Any]:
    """A `.safetensors` file of any known layout as a parameter tree.

    Args:
        path: of the file.

    Returns:
        {"backbone": ..., and "image_head", "image_last_layer", "region_head", "region_last_layer" where the file has
        them}, float32.

    Raises:
        WeightsError: the file cannot be read, has no known layout, or has arrays that the layout does not know.
    """
    arrays: Arrays = strip_prefixes(read_safetensors(path))
    layout = detect_layout(set(arrays))
    ours, unknown = to_ours(arrays, layout)
    if unknown:
        raise WeightsError(f"{path} has arrays that a {layout.title} does not: {', '.join(unknown)}")
    return unflatten({name: np.ascontiguousarray(array) for name, array in ours.items()})
