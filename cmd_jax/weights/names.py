"""Names and array layouts of the files of other projects <-> ours, by the tables of `layouts`.

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
from cmd_jax.weights.layouts import HEADS, LAYOUTS, OURS, QKV, Layout

Arrays = dict[str, np.ndarray]

# Where files keep student and teacher side by side: DINOv2's training, MoCo v3.
_NETWORKS = {"teacher": r"(module\.)?(teacher|momentum_encoder)\.", "student": r"(module\.)?(student|base_encoder)\."}
# The image towers of CLIP: all else in such a file is the other tower.
_TOWERS = r"(module\.)?(vision_model|visual)\."
# Wrappers of a whole model, from the outside in: DistributedDataParallel, DINO's multi-crop wrapper, transformers.
_PREFIXES = ("module.", "backbone.", "vit.", "swin.", "dinov2.", "dinov2_with_registers.")
# What has two names in the same family: (pattern, replacement). DINOv2's training splits the blocks into chunks.
_SPELLINGS = ((r"blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"dino_head\.", "head."), (r"ibot_head\.", "head_dense."))
# Derived from the architecture, or running statistics that the heads of training do not use.
_BUFFER = re.compile(
    r"(^|\.)(relative_position_index|attn_mask|running_mean|running_var|num_batches_tracked|position_ids|bias_mask|"
    r"rope_embed\.periods)$"
)
# What other projects put on a backbone or use for other losses: named in a note, never an error.
_IGNORED = re.compile(
    r"(head\.(weight|bias|fc\..*|\d+\..*|probe|(attention|layernorm|mlp\.fc\d)\..*)"
    r"|(fc|classifier|pooler|predictor|attn_pool|local_cls_norm|decoder(_\w+)?)\..*"
    r"|decoder_pos_embed|((embeddings|decoder)\.)?mask_token|masked_embed|proj|logit_scale|logit_bias)"
)
_GATED = ("gate", "fc1")
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of a kernel by its rank
_TO_THEIRS = {2: (1, 0), 4: (3, 2, 0, 1)}


class Named(NamedTuple):
    """The arrays of one network of a file.

    Attributes:
        arrays: under the layout's names, without wrappers' prefixes and buffers.
        layout: that most of the names have.
        ignored: names of what is no part of the networks here.
        seen: whole name -> shape of everything in the file: buffers and other networks tell families apart.
    """

    arrays: Arrays
    layout: Layout
    ignored: tuple[str, ...] = ()
    seen: dict[str, tuple[int, ...]] = {}


def identify(arrays: Arrays, network: str, source: str) -> Named:
    """Takes one network out of a file, without wrappers' prefixes, and finds the layout that has most of its names.

    Args:
        arrays: under the file's names.
        network: "teacher" or "student", for files that hold both side by side; others give the one they hold.
        source: where they are from, for messages.

    Raises:
        WeightsError: two names become one, or no layout has half of them.
    """
    if any(name.startswith("backbone/") for name in arrays):
        return Named(dict(arrays), OURS)
    chosen, ignored = _one_network(arrays, network)
    kept: Arrays = {}
    for name, array in chosen.items():
        short = _without_prefixes(name)
        if _BUFFER.search(short) or not array.size:  # transformers has a table of no registers
            continue
        if short in kept:
            raise WeightsError(f"{name} and another array are both {short} without prefixes; keep one model in the file")
        kept[short] = array
    unused = [name for name in kept if _IGNORED.fullmatch(name)]
    kept = {name: array for name, array in kept.items() if name not in unused}
    return Named(
        kept, _detect(kept, set(arrays), source), (*unused, *ignored), {name: array.shape for name, array in arrays.items()}
    )


def _one_network(arrays: Arrays, network: str) -> tuple[Arrays, list[str]]:
    """(the arrays of one network without what tells it from others, names of the rest)."""
    prefixes = [_NETWORKS[network], *(prefix for other, prefix in _NETWORKS.items() if other != network), _TOWERS]
    chosen, rest = arrays, []
    for prefix in (next((prefix for prefix in prefixes[:2] if _starts(chosen, prefix)), None), prefixes[2]):
        if prefix and _starts(chosen, prefix):
            rest += [name for name in chosen if not re.match(prefix, name)]
            chosen = {re.sub(f"^{prefix}", "", name): array for name, array in chosen.items() if re.match(prefix, name)}
    of_others = re.compile("|".join(_NETWORKS.values()))
    return chosen, [name for name in rest if not of_others.match(name)]


def _starts(names: Iterable[str], prefix: str) -> bool:
    return any(re.match(prefix, name) for name in names)


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for pattern, spelling in _SPELLINGS:
        name = re.sub(f"^{pattern}", spelling, name)
    return name


def _detect(arrays: Arrays, all_names: set[str], source: str) -> Layout:
    names = {name for name in arrays if not name.startswith(tuple(f"{head}." for head in HEADS))}
    known = {
        key: sum(any(_name_in_ours(name, rules) for rules in (layout.rules, layout.gated)) for name in names)
        for key, layout in LAYOUTS.items()
    }
    most = max(known.values())
    best = [key for key, count in known.items() if count == most]
    if 2 * most <= len(names):
        shown = ", ".join(sorted(all_names)[:5]) or "there are none"
        raise WeightsError(
            f"{source}: the names of the arrays ({shown}) fit no known layout; known are ViT and Swin of DINO, DINOv2, DINOv3, "
            "MAE, MoCo v3, EsViT, timm, transformers (ViT, DINOv2, DINOv3, CLIP, SigLIP, Swin) and OpenCLIP"
        )
    return LAYOUTS["timm" if "timm" in best and _is_packed(arrays) else best[0]]


def _is_packed(arrays: Arrays) -> bool:
    """Whether fc1 holds gate and values of a gated MLP, one below the other."""
    into, out = arrays.get("blocks.0.mlp.fc1.weight"), arrays.get("blocks.0.mlp.fc2.weight")
    return into is not None and out is not None and into.ndim == out.ndim == 2 and into.shape[0] == 2 * out.shape[1]


def to_ours(arrays: Arrays, layout: Layout) -> tuple[Arrays, list[str]]:
    """Renames and transposes a file's arrays to ours.

    Args:
        arrays: under the layout's names, as `identify` returns them.
        layout: one of LAYOUTS, or OURS.

    Returns:
        (arrays under our names, such as backbone/blocks_0/attn/qkv/kernel and image_head/mlp_0/kernel; the names that
        no rule knows).
    """
    if layout is OURS:
        return dict(arrays), []
    heads, rest = _heads_to_ours(arrays)
    rules = layout.gated if _is_gated(rest, layout) else layout.rules
    backbone: Arrays = {}
    unknown = []
    for name, array in rest.items():
        ours = _name_in_ours(name, rules)
        if ours is None:
            unknown.append(name)
            continue
        ours = _with_our_leaf(ours, array)
        if ours.endswith("/kernel"):
            array = _transposed(array, _TO_OURS)
        elif layout.flat and ours in ("cls_token", "pos_embed"):
            array = array.reshape(1, -1, array.shape[-1]) if array.ndim else array
        backbone[ours] = array
    backbone = _split_gate(_join_qkv(backbone))
    return {f"backbone/{name}": array for name, array in backbone.items()} | heads, unknown


def to_theirs(arrays: Arrays, layout: Layout, key_bias: bool = True) -> tuple[Arrays, list[str]]:
    """Inverts `to_ours`.

    Args:
        arrays: under our names.
        layout: one of LAYOUTS, or OURS.
        key_bias: False leaves out the bias of the keys, where a layout has the three biases of attention apart.

    Returns:
        (arrays under the layout's names; our names that have no place in it).
    """
    if layout is OURS:
        return dict(arrays), []
    backbone = {name.removeprefix("backbone/"): array for name, array in arrays.items() if name.startswith("backbone/")}
    rules = layout.gated or layout.rules if any("/mlp/gate/" in name for name in backbone) else layout.rules
    backbone = _split_qkv(_join_gate(backbone, rules), rules, key_bias)
    theirs = _heads_to_theirs(arrays)
    unplaced = [name for name in arrays if name.startswith("mil_scorer/")]
    for name, array in backbone.items():
        renamed = _name_in_theirs(name, rules)
        if renamed is None:
            unplaced.append(f"backbone/{name}")
        elif layout.flat and name in ("cls_token", "pos_embed"):
            theirs[renamed] = array[0, 0] if name == "cls_token" else array[0]
        else:
            theirs[renamed] = _transposed(array, _TO_THEIRS) if name.endswith("/kernel") else array
    return theirs, unplaced


def _is_gated(arrays: Arrays, layout: Layout) -> bool:
    if layout is LAYOUTS["timm"]:
        return _is_packed(arrays)
    return bool(layout.gated) and any(
        _name_in_ours(name, layout.gated) and not _name_in_ours(name, layout.rules) for name in arrays
    )


def _name_in_ours(name: str, rules: dict[str, str]) -> str | None:
    """Our name of a parameter, with PyTorch's leaf; None if no rule knows it."""
    backwards = [(theirs, ours) for ours, theirs in rules.items()]
    renamed = _rename(name, backwards)
    module, _, leaf = name.rpartition(".")
    if renamed is None and leaf in ("weight", "bias"):
        renamed = _rename(module, backwards)
        renamed = renamed and f"{renamed}/{leaf}"
    return renamed


def _name_in_theirs(name: str, rules: dict[str, str]) -> str | None:
    """The layout's name of our parameter; None if no rule knows it."""
    module, _, leaf = name.rpartition("/")
    if leaf not in ("kernel", "scale", "bias"):
        return _rename(name, rules.items())
    leaf = "bias" if leaf == "bias" else "weight"
    renamed = _rename(f"{module}/{leaf}", rules.items())
    if renamed is None:
        renamed = _rename(module, rules.items())
        renamed = renamed and f"{renamed}.{leaf}"
    return renamed


def stand_ins(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Arrays of these shapes without memory, for what needs no numbers."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


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
    """Query, key and value side by side, in this order, wherever they are there and of one shape; keys without a bias of their
    own get zeros."""
    joined = dict(arrays)
    for name in arrays:
        if "/attn/query/" in name:
            parts = [name.replace("/query/", f"/{part}/") for part in QKV]
            found = [joined.get(part) for part in parts]
            if found[1] is None and name.endswith("/bias"):
                found[1] = np.zeros_like(found[0])
            if len({None if part is None else part.shape for part in found}) == 1:
                joined[name.replace("/query/", "/qkv/")] = np.concatenate(found, axis=-1)
                for part in parts:
                    joined.pop(part, None)
    return joined


def _split_qkv(arrays: Arrays, rules: dict[str, str], key_bias: bool) -> Arrays:
    split: Arrays = {}
    for name, array in arrays.items():
        if "/attn/qkv/" in name and _name_in_theirs(name, rules) is None:
            for part, piece in zip(QKV, np.split(array, 3, axis=-1), strict=True):
                if key_bias or part != "key" or not name.endswith("/bias"):
                    split[name.replace("/qkv/", f"/{part}/")] = piece
        else:
            split[name] = array
    return split


def _split_gate(arrays: Arrays) -> Arrays:
    """Gate and values of MLPs that lie side by side, in this order."""
    split: Arrays = {}
    for name, array in arrays.items():
        if "/mlp/gate_fc1/" in name and array.shape[-1] % 2 == 0:
            for part, piece in zip(_GATED, np.split(array, 2, axis=-1), strict=True):
                split[name.replace("/gate_fc1/", f"/{part}/")] = piece
        else:
            split[name] = array
    return split


def _join_gate(arrays: Arrays, rules: dict[str, str]) -> Arrays:
    joined = dict(arrays)
    for name in arrays:
        packed = name.replace("/mlp/gate/", "/mlp/gate_fc1/")
        other = name.replace("/mlp/gate/", "/mlp/fc1/")
        if (
            packed != name
            and _name_in_theirs(packed, rules)
            and arrays.get(other, arrays[name][:0]).shape == arrays[name].shape
        ):
            joined[packed] = np.concatenate([joined.pop(name), joined.pop(other)], axis=-1)
    return joined


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
            found = re.fullmatch(rf"{theirs}\.last_layer(2)?\.(weight_[vg])", name)
            if found:  # iBOT's head has a second last layer, for patches
                heads[f"{HEADS['head_dense'][1] if found[1] else last_layer}/{found[2]}"] = rest.pop(name)
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
