"""Names and array layouts of DINO, EsViT, timm and Hugging Face checkpoints <-> ours, from one table for each layout.

Ours are the paths of the parameter tree of `models.network.Network`, joined by "/". Below a module, our `kernel` and
`scale` are PyTorch's `weight`. PyTorch stores a linear kernel as (out, in), ours is [in, out]; a convolution as OIHW, ours
is HWIO.
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import WeightsError

Arrays = dict[str, np.ndarray]

# Projection heads of DINO and EsViT: theirs -> (our MLP, our prototypes).
HEADS = {"head": ("image_head", "image_last_layer"), "head_dense": ("region_head", "region_last_layer")}
# Wrappers of a whole model, from the outside in: DistributedDataParallel, DINO's multi-crop wrapper, transformers.
_PREFIXES = ("module.", "backbone.", "vit.", "swin.")
# Derived from the architecture, or running statistics that the heads of training do not use.
_BUFFER = re.compile(r"(^|\.)(relative_position_index|attn_mask|running_mean|running_var|num_batches_tracked)$")
_QKV = ("query", "key", "value")
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of a kernel by its rank
_TO_THEIRS = {2: (1, 0), 4: (3, 2, 0, 1)}


class Layout(NamedTuple):
    """How one family of files names a backbone.

    Attributes:
        title: for messages.
        backbone: "vit" or "swin".
        rules: our module -> theirs, or a parameter that belongs to none. {i} and {j} are numbers, {next} is i + 1.
    """

    title: str
    backbone: str
    rules: dict[str, str]

    def separate_qkv(self) -> bool:
        """Whether query, key and value are three modules."""
        return any(name.endswith("/query") for name in self.rules)


def _blocks(ours: str, theirs: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{ours}/{part}": f"{theirs}.{name}" for part, name in parts.items()}


_BLOCK = {part: part.replace("/", ".") for part in ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")}
_TABLE = "attn/relative_position_bias_table"
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_VIT = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens": "reg_token",
    "patch_embed": "patch_embed.proj",
    **_blocks("blocks_{i}", "blocks.{i}", _BLOCK),
    "norm": "norm",
}
_HF_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    **_blocks("blocks_{i}", "encoder.layer.{i}", _HF_BLOCK),
    **_blocks("blocks_{i}", "encoder.layer.{i}", {f"attn/{part}": f"attention.attention.{part}" for part in _QKV}),
    "norm": "layernorm",
}
_SWIN = {
    "patch_embed": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    **_blocks("layers_{i}_blocks_{j}", "layers.{i}.blocks.{j}", _BLOCK | {_TABLE: _TABLE.replace("/", ".")}),
    **_blocks("layers_{i}_downsample", "layers.{i}.downsample", {"norm": "norm", "reduction": "reduction"}),
    "norm": "norm",
}
_HF_SWIN_QKV = {f"attn/{part}": f"attention.self.{part}" for part in (*_QKV, "relative_position_bias_table")}
_HF_SWIN = {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "patch_norm": "embeddings.norm",
    **_blocks("layers_{i}_blocks_{j}", "encoder.layers.{i}.blocks.{j}", _HF_BLOCK | _HF_SWIN_QKV),
    **_blocks("layers_{i}_downsample", "encoder.layers.{i}.downsample", {"norm": "norm", "reduction": "reduction"}),
    "norm": "layernorm",
}
# timm moved the merging of patches from the end of a stage to the beginning of the next.
_TIMM_SWIN = _SWIN | _blocks("layers_{i}_downsample", "layers.{next}.downsample", {"norm": "norm", "reduction": "reduction"})

# Ours has no rules: arrays of a run's checkpoint need none.
OURS = Layout("cmd_jax", "", {})
LAYOUTS = {
    "vit": Layout("DINO or timm ViT", "vit", _VIT),
    # Before "swin", whose rules know all names of this one too, though not where they belong.
    "timm_swin": Layout("timm Swin", "swin", _TIMM_SWIN),
    "swin": Layout("EsViT Swin", "swin", _SWIN),
    "hf_vit": Layout("Hugging Face ViT", "vit", _HF_VIT),
    "hf_swin": Layout("Hugging Face Swin", "swin", _HF_SWIN),
}


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


def detect_layout(names: set[str], source: str) -> Layout:
    """Finds the layout that has most of the names.

    Args:
        names: prefixes stripped.
        source: where they are from, for messages.

    Raises:
        WeightsError: none has half of them.
    """
    names = {name for name in names if not name.startswith(tuple(f"{head}." for head in HEADS))}
    if any(name.startswith("backbone/") for name in names):
        return OURS
    known = {key: sum(_name_in_ours(name, layout) is not None for name in names) for key, layout in LAYOUTS.items()}
    best = max(known, key=known.get)
    if not names or known[best] < len(names) / 2:
        shown = ", ".join(sorted(names)[:5]) or "there are none"
        raise WeightsError(
            f"{source}: the names of the arrays ({shown}) fit no known layout; known are ViT and Swin of DINO, EsViT, timm "
            "and Hugging Face"
        )
    return LAYOUTS[best]


def to_ours(arrays: Arrays, layout: Layout) -> tuple[Arrays, list[str]]:
    """Renames and transposes a file's arrays to ours.

    Args:
        arrays: under the layout's names, prefixes stripped.
        layout: one of LAYOUTS, or OURS.

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
        ours = _name_in_ours(name, layout)
        if ours is None:
            unknown.append(name)
        else:
            backbone[_with_our_leaf(ours, array)] = _transposed(array, _TO_OURS) if name.endswith(".weight") else array
    if layout.separate_qkv():
        backbone = _join_qkv(backbone)
    if "pos_embed" in backbone:
        backbone = _positions_to_ours(backbone)
    return {f"backbone/{name}": array for name, array in backbone.items()} | heads, unknown


def to_theirs(arrays: Arrays, layout: Layout) -> tuple[Arrays, list[str]]:
    """Inverts `to_ours`.

    Args:
        arrays: under our names.
        layout: one of LAYOUTS, or OURS.

    Returns:
        (arrays under the layout's names; our names that have no place in it).
    """
    if layout is OURS:
        return dict(arrays), []
    backbone = {name.removeprefix("backbone/"): array for name, array in arrays.items() if name.startswith("backbone/")}
    if {"register_tokens", "pos_embed"} <= backbone.keys() and "register_tokens" in layout.rules:
        backbone = _positions_to_timm(backbone)
    if layout.separate_qkv():
        backbone = _split_qkv(backbone)
    theirs = _heads_to_theirs(arrays)
    unplaced = [name for name in arrays if name.startswith("mil_scorer/")]
    for name, array in backbone.items():
        renamed = _name_in_theirs(name, layout)
        if renamed is None:
            unplaced.append(f"backbone/{name}")
        else:
            theirs[renamed] = _transposed(array, _TO_THEIRS) if name.endswith("/kernel") else array
    return theirs, unplaced


def _name_in_ours(name: str, layout: Layout) -> str | None:
    """Our name of a parameter, with PyTorch's leaf; None if no rule knows it."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return _rename(name, [(theirs, ours) for ours, theirs in layout.rules.items()])
    renamed = _rename(module, [(theirs, ours) for ours, theirs in layout.rules.items()])
    return renamed and f"{renamed}/{leaf}"


def _name_in_theirs(name: str, layout: Layout) -> str | None:
    """The layout's name of our parameter; None if no rule knows it."""
    module, _, leaf = name.rpartition("/")
    if leaf not in ("kernel", "scale", "bias"):
        return _rename(name, layout.rules.items())
    renamed = _rename(module, layout.rules.items())
    return renamed and f"{renamed}.{'bias' if leaf == 'bias' else 'weight'}"


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """Applies the first of the rules (from, to) that fits."""
    for source, target in rules:
        found = _pattern(source).fullmatch(name)
        if found:
            numbers = {key: int(value) for key, value in found.groupdict().items()}
            index = numbers.get("i", numbers.get("next", 1) - 1)
            return target.format(**numbers | {"i": index, "next": index + 1}) if index >= 0 else None
    return None


@functools.cache
def _pattern(template: str) -> re.Pattern:
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(rf"(?P<{piece}>\d+)" if odd % 2 else re.escape(piece) for odd, piece in enumerate(pieces)))


def _with_our_leaf(name: str, array: np.ndarray) -> str:
    """Our leaf for PyTorch's: a `weight` of one dimension is a norm's scale."""
    if not name.endswith("/weight"):
        return name
    return f"{name.removesuffix('weight')}{'scale' if array.ndim == 1 else 'kernel'}"


def _transposed(array: np.ndarray, axes: dict[int, tuple[int, ...]]) -> np.ndarray:
    return array.transpose(axes[array.ndim]) if array.ndim in axes else array


def _join_qkv(arrays: Arrays) -> Arrays:
    """Query, key and value side by side, in this order, wherever all three are there and of one shape."""
    joined = dict(arrays)
    for name in arrays:
        if "/attn/query/" in name:
            parts = [name.replace("/query/", f"/{part}/") for part in _QKV]
            if len({arrays[part].shape if part in arrays else None for part in parts}) == 1:
                joined[name.replace("/query/", "/qkv/")] = np.concatenate([joined.pop(part) for part in parts], axis=-1)
    return joined


def _split_qkv(arrays: Arrays) -> Arrays:
    split: Arrays = {}
    for name, array in arrays.items():
        if "/attn/qkv/" in name:
            for part, piece in zip(_QKV, np.split(array, 3, axis=-1), strict=True):
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
    if is_square(count - 1 - extra):
        if not extra:
            return arrays
        slots = {"register_tokens": registers + table[:, 1 : 1 + extra]}
        return arrays | slots | {"pos_embed": np.concatenate([table[:, :1], table[:, 1 + extra :]], axis=1)}
    if is_square(count):
        return arrays | {"pos_embed": np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)}
    return arrays


def _positions_to_timm(arrays: Arrays) -> Arrays:
    table, registers = arrays["pos_embed"], arrays["register_tokens"]
    return arrays | {"pos_embed": np.concatenate([table[:, :1], np.zeros_like(registers), table[:, 1:]], axis=1)}


def is_square(count: int) -> bool:
    """Whether a number of patches or positions fills a square."""
    return count > 0 and math.isqrt(count) ** 2 == count


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
                ours = _with_our_leaf(f"{mlp}/{'norm' if norm else 'mlp'}_{linear}/{leaf}", array)
                heads[ours] = _transposed(array, _TO_OURS) if leaf == "weight" else array
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
            array = _transposed(arrays[name], _TO_THEIRS) if leaf == "kernel" else arrays[name]
            heads[f"{theirs}.mlp{place}.{'bias' if leaf == 'bias' else 'weight'}"] = array
        for leaf in ("weight_v", "weight_g"):
            if f"{last_layer}/{leaf}" in arrays:
                heads[f"{theirs}.last_layer.{leaf}"] = arrays[f"{last_layer}/{leaf}"]
    return heads
