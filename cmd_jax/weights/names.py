"""Names and array layouts of DINO, EsViT, timm and Hugging Face checkpoints <-> ours.

Ours are the paths of the parameter tree of `models.network.Network`, joined by "/". Below a module, our `kernel` and
`scale` are PyTorch's `weight`. PyTorch stores a linear kernel as (out, in), ours is [in, out]; a convolution as OIHW, ours
is HWIO. The tables are in `layouts`.
"""

import functools
import re

import numpy as np

from cmd_jax.errors import WeightsError
from cmd_jax.weights.layouts import LAYOUTS, OURS, Layout

Arrays = dict[str, np.ndarray]

# Projection heads of DINO and EsViT: theirs -> (our MLP, our prototypes).
HEADS = {"head": ("image_head", "image_last_layer"), "head_dense": ("region_head", "region_last_layer")}
# Wrappers of a whole model, from the outside in: DistributedDataParallel, DINO's multi-crop wrapper, transformers.
_PREFIXES = ("module.", "backbone.", "vit.", "swin.")
# Derived from the architecture, or running statistics that the heads of training do not use.
_BUFFER = re.compile(r"(^|\.)(relative_position_index|attn_mask|running_mean|running_var|num_batches_tracked)$")
_PARTS = ("query", "key", "value")


def strip_prefixes(arrays: Arrays) -> Arrays:
    """Takes wrappers' prefixes off the names and drops buffers.

    Raises:
        WeightsError: two names become one.
    """
    stripped: Arrays = {}
    for name, array in arrays.items():
        short = name
        for prefix in _PREFIXES:
            short = short.removeprefix(prefix)
        if _BUFFER.search(short):
            continue
        if short in stripped:
            raise WeightsError(f"{name} and another array are both {short} without prefixes; keep one model in the file")
        stripped[short] = array
    return stripped


def detect_layout(names: set[str]) -> Layout:
    """The layout that knows most of the names.

    Args:
        names: prefixes stripped.

    Raises:
        WeightsError: none knows half of them.
    """
    names = {name for name in names if not name.startswith(tuple(f"{head}." for head in HEADS))}
    if any(name.startswith("backbone/") for name in names):
        return OURS
    known = {
        key: sum(_apply(layout.rules, name, to_ours=True) is not None for name in names) for key, layout in LAYOUTS.items()
    }
    best = max(known, key=known.get)
    if not names or known[best] < len(names) / 2:
        shown = ", ".join(sorted(names)[:5]) or "there are none"
        raise WeightsError(
            f"the names of the arrays ({shown}) fit no known layout; known are ViT and Swin of DINO, EsViT, timm and "
            "Hugging Face"
        )
    return LAYOUTS[best]


def to_ours(arrays: Arrays, layout: Layout) -> tuple[Arrays, list[str]]:
    """Renames and lays out a file's arrays as ours.

    Args:
        arrays: under the layout's names, prefixes stripped.
        layout: one of LAYOUTS.

    Returns:
        (arrays under our names, such as backbone/blocks_0/attn/qkv/kernel and image_head/mlp_0/kernel; the names that
        no rule knows).
    """
    if layout is OURS:
        return dict(arrays), []
    heads, rest = _heads_to_ours(arrays)
    backbone: Arrays = {}
    unknown = []
    for name, array in rest.items():
        ours = _apply(layout.rules, name, to_ours=True)
        if ours is None:
            unknown.append(name)
        else:
            backbone[_with_leaf(ours, array)] = _kernel_to_ours(array) if name.endswith(".weight") else array
    if layout.separate_qkv:
        backbone = _join_qkv(backbone)
    if "pos_embed" in backbone:
        backbone = _positions_to_ours(backbone)
    return {f"backbone/{name}": array for name, array in backbone.items()} | heads, unknown


def to_theirs(arrays: Arrays, layout: Layout) -> tuple[Arrays, list[str]]:
    """The inverse of `to_ours`.

    Args:
        arrays: under our names.
        layout: one of LAYOUTS.

    Returns:
        (arrays under the layout's names; our names that have no place in it).
    """
    if layout is OURS:
        return dict(arrays), []
    backbone = {name.removeprefix("backbone/"): array for name, array in arrays.items() if name.startswith("backbone/")}
    if {"register_tokens", "pos_embed"} <= backbone.keys() and "register_tokens" in layout.rules:
        backbone = _positions_to_timm(backbone)
    if layout.separate_qkv:
        backbone = _split_qkv(backbone)
    theirs = _heads_to_theirs(arrays)
    unplaced = [name for name in arrays if name.startswith("mil_scorer/")]
    for name, array in backbone.items():
        module, _, leaf = name.rpartition("/")
        renamed = _apply(layout.rules, name, to_ours=False)
        if renamed is None and leaf in ("kernel", "scale", "bias"):
            renamed = _apply(layout.rules, module, to_ours=False)
            renamed = renamed and f"{renamed}.{'bias' if leaf == 'bias' else 'weight'}"
        if renamed is None:
            unplaced.append(f"backbone/{name}")
        else:
            theirs[renamed] = _kernel_to_theirs(array) if leaf == "kernel" else array
    return theirs, unplaced


@functools.cache
def _pattern(template: str) -> re.Pattern:
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(rf"(?P<{piece}>\d+)" if odd % 2 else re.escape(piece) for odd, piece in enumerate(pieces)))


def _apply(rules: dict[str, str], name: str, to_ours: bool) -> str | None:
    """The other side's name of a parameter or module; to ours, PyTorch's leaf `weight` or `bias` is kept after a "/"."""
    module, leaf = name, ""
    if to_ours and name.endswith((".weight", ".bias")):
        module, _, leaf = name.rpartition(".")
    for ours, theirs in rules.items():
        source, result = (theirs, ours) if to_ours else (ours, theirs)
        found = _pattern(source).fullmatch(module)
        if found:
            numbers = {key: int(value) for key, value in found.groupdict().items()}
            if "next" in numbers:
                numbers["i"] = numbers["next"] - 1
                if numbers["i"] < 0:
                    return None
            elif "i" in numbers:
                numbers["next"] = numbers["i"] + 1
            return result.format(**numbers) + (f"/{leaf}" if leaf else "")
    return None


def _with_leaf(name: str, array: np.ndarray) -> str:
    """Our leaf for PyTorch's: a `weight` of one dimension is a norm's scale."""
    if not name.endswith("/weight"):
        return name
    return f"{name.removesuffix('weight')}{'scale' if array.ndim == 1 else 'kernel'}"


def _kernel_to_ours(array: np.ndarray) -> np.ndarray:
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}
    return array.transpose(axes[array.ndim]) if array.ndim in axes else array


def _kernel_to_theirs(array: np.ndarray) -> np.ndarray:
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}
    return array.transpose(axes[array.ndim]) if array.ndim in axes else array


def _join_qkv(arrays: Arrays) -> Arrays:
    """Query, key and value side by side, in this order, wherever all three are there and of one shape."""
    joined = dict(arrays)
    for name in arrays:
        if "/attn/query/" in name:
            parts = [name.replace("/query/", f"/{part}/") for part in _PARTS]
            if len({arrays[part].shape if part in arrays else None for part in parts}) == 1:
                joined[name.replace("/query/", "/qkv/")] = np.concatenate([joined.pop(part) for part in parts], axis=-1)
    return joined


def _split_qkv(arrays: Arrays) -> Arrays:
    split: Arrays = {}
    for name, array in arrays.items():
        if "/attn/qkv/" in name:
            for part, piece in zip(_PARTS, np.split(array, 3, axis=-1), strict=True):
                split[name.replace("/qkv/", f"/{part}/")] = piece
        else:
            split[name] = array
    return split


def _positions_to_ours(arrays: Arrays) -> Arrays:
    """Position tables of timm: one may span the register tokens too, or leave out the class token.

    Ours has a slot for the class token and none for registers: what a table adds to a register is added to it.
    """
    table = arrays["pos_embed"]
    registers = arrays.get("register_tokens", np.zeros((1, 0, table.shape[-1]), np.float32))
    if table.ndim != 3 or registers.ndim != 3 or table.shape[-1] != registers.shape[-1]:
        return arrays
    count, extra = table.shape[1], registers.shape[1]
    if _is_square(count - 1 - extra):
        if not extra:
            return arrays
        slots = {"register_tokens": registers + table[:, 1 : 1 + extra]}
        return arrays | slots | {"pos_embed": np.concatenate([table[:, :1], table[:, 1 + extra :]], axis=1)}
    if _is_square(count):
        return arrays | {"pos_embed": np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)}
    return arrays


def _positions_to_timm(arrays: Arrays) -> Arrays:
    table, registers = arrays["pos_embed"], arrays["register_tokens"]
    return arrays | {"pos_embed": np.concatenate([table[:, :1], np.zeros_like(registers), table[:, 1:]], axis=1)}


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count


def _heads_to_ours(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(projection heads under our names, all other arrays).

    The place of a layer in PyTorch's sequence depends on what stands between: linear layers are counted by their two
    dimensions, the batch norm after layer k has one.
    """
    heads: Arrays = {}
    rest = dict(arrays)
    for theirs, (mlp, last_layer) in HEADS.items():
        layers: dict[int, Arrays] = {}
        for name in arrays:
            found = re.fullmatch(rf"{theirs}\.mlp(?:\.(\d+))?\.(weight|bias)", name)
            if found:
                layers.setdefault(int(found[1] or 0), {})[found[2]] = rest.pop(name)
            elif name in (f"{theirs}.last_layer.weight_v", f"{theirs}.last_layer.weight_g"):
                heads[f"{last_layer}/{name.rpartition('.')[2]}"] = rest.pop(name)
        linear = -1
        for _, layer in sorted(layers.items()):
            norm = "weight" in layer and layer["weight"].ndim == 1
            linear += not norm
            for leaf, array in layer.items():
                ours = _with_leaf(f"{mlp}/{'norm' if norm else 'mlp'}_{linear}/{leaf}", array)
                heads[ours] = _kernel_to_ours(array) if leaf == "weight" else array
    return heads, rest


def _heads_to_theirs(arrays: Arrays) -> Arrays:
    heads: Arrays = {}
    for theirs, (mlp, last_layer) in HEADS.items():
        layers = [name for name in arrays if name.startswith(f"{mlp}/")]
        stride = 3 if any("/norm_" in name for name in layers) else 2
        single = not any("/mlp_1/" in name for name in layers)
        for name in layers:
            kind, index, leaf = re.fullmatch(rf"{mlp}/(mlp|norm)_(\d+)/(\w+)", name).groups()
            place = "" if single else f".{stride * int(index) + (kind == 'norm')}"
            array = arrays[name]
            weight = _kernel_to_theirs(array) if leaf == "kernel" else array
            heads[f"{theirs}.mlp{place}.{'bias' if leaf == 'bias' else 'weight'}"] = weight
        for leaf in ("weight_v", "weight_g"):
            if f"{last_layer}/{leaf}" in arrays:
                heads[f"{theirs}.last_layer.{leaf}"] = arrays[f"{last_layer}/{leaf}"]
    return heads
