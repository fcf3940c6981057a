"""Fits the arrays of a checkpoint to a model: resamples windows, and lists all differences in one error."""

import difflib
import math
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import WeightsError
from cmd_jax.models.vit import bicubic_matrix
from cmd_jax.weights.layouts import HEADS, OURS, Layout
from cmd_jax.weights.names import Arrays, Named, is_square, stand_ins, to_ours, to_theirs

Shapes = dict[str, tuple[int, ...]]
SHOWN = 3  # differences of a kind in a message
LISTED = 6  # names of ignored arrays in a note
_RELATIVE = "relative_position_bias_table"


class Fitted(NamedTuple):
    """Arrays for a model.

    Attributes:
        arrays: under our names, float32, of the model's shapes.
        notes: what was taken, resampled, left out and left as initialised; a sentence each.
        centers: of the teacher's logits, that belong to the heads; "centers/image" and "centers/region" -> [K].
    """

    arrays: Arrays
    notes: tuple[str, ...]
    centers: Arrays = {}


def fit(named: Named, model: Shapes, source: str, heads: bool) -> Fitted:
    """Renames the arrays of a checkpoint, and checks them against a model. Relative positions of a Swin's other window are
    resampled; a ViT's table of positions has the model's size.

    Args:
        named: the arrays, and what their names are.
        model: our name -> shape of every parameter of the network.
        source: where the arrays are from, for messages.
        heads: take the projection heads (and of our own runs the MIL scorer and the mask token) too, not the backbone alone.

    Raises:
        WeightsError: arrays are missing, left over or of other shapes; all are listed.
    """
    layout = named.layout
    kind = "swin" if "backbone/patch_norm/scale" in model else "vit"
    if layout is not OURS and layout.backbone != kind:
        raise WeightsError(f"{source} holds a {layout.title}, but model.name is a {kind}; set model.name to one of its kind")
    notes: list[str] = []
    used = _without_heads(named, heads, notes)
    check_numbers(used, source)
    ours, unknown = to_ours(used, layout)
    if not heads:
        ours = {name: array for name, array in ours.items() if name.startswith("backbone/")}
    elif not any(name.startswith("image_head/") for name in ours):
        raise WeightsError(f"{source} has no projection heads; leave init.heads=False")
    else:
        ours = {name: array for name, array in ours.items() if name in model or name != "mask_token"}  # of another method
        ours = _without_unit_gain(_with_one_last_layer(ours, model, source), model, source)
    taken = sorted({_part(name) for name in ours})
    wanted = {name: shape for name, shape in model.items() if _part(name) in taken}
    ours = _resample(ours, wanted, notes)
    _check(ours, wanted, layout, unknown, source)
    started = sorted({_part(name) for name in model} - set(taken))
    notes.insert(0, f"{len(ours)} arrays of {source} ({layout.title}): {', '.join(taken)}")
    if started:
        notes.append(f"from the seed: {', '.join(started)}")
    return Fitted({name: np.ascontiguousarray(array, np.float32) for name, array in ours.items()}, tuple(notes))


def check_numbers(arrays: Arrays, source: str) -> None:
    """Refuses quantised arrays, NaN and infinities.

    Args:
        arrays: name -> array.
        source: where they are from, for messages.

    Raises:
        WeightsError: naming the first array.
    """
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise WeightsError(
                f"{source}: {name} holds {array.dtype} numbers; quantised weights are not read, use a float32, float16 or "
                "bfloat16 file"
            )
    bad = {name: int(np.sum(~np.isfinite(array))) for name, array in arrays.items() if not np.all(np.isfinite(array))}
    if bad:
        first, count = next(iter(bad.items()))
        raise WeightsError(
            f"{source}: {first} has {count:,} of {arrays[first].size:,} numbers that are NaN or infinite (arrays like it: "
            f"{len(bad)}); it is damaged, or overflowed in half precision: use another copy or an earlier checkpoint"
        )


def _part(name: str) -> str:
    return name.partition("/")[0]


def _without_heads(named: Named, heads: bool, notes: list[str]) -> Arrays:
    if named.ignored:
        more = f" and {len(named.ignored) - LISTED} more" if len(named.ignored) > LISTED else ""
        notes.append(f"ignored, not a part of the networks here: {', '.join(named.ignored[:LISTED])}{more}")
    projection = [name for name in named.arrays if name.partition(".")[0] in HEADS]
    if not projection or heads:
        return named.arrays
    notes.append(f"not used: {len(projection)} arrays of projection heads; init.heads=True continues with them")
    return {name: array for name, array in named.arrays.items() if name not in projection}


def _with_one_last_layer(ours: Arrays, model: Shapes, source: str) -> Arrays:
    """Drops the patches' prototypes where a model has the images' alone: iBOT stores those of a shared head twice."""
    if "region_last_layer/weight_v" in model:
        return ours
    second = {name: array for name, array in ours.items() if name.startswith("region_last_layer/")}
    if any(not np.array_equal(array, ours.get(name.replace("region", "image"))) for name, array in second.items()):
        raise WeightsError(f"{source} has other prototypes for patches than for images; set head.share_prototypes=False")
    return {name: array for name, array in ours.items() if name not in second}


def _without_unit_gain(ours: Arrays, model: Shapes, source: str) -> Arrays:
    """Drops gains that are all 1: DINO stores them, a model of unit rows has none."""
    kept = dict(ours)
    for _, last_layer in HEADS.values():
        name = f"{last_layer}/weight_g"
        if name in ours and name not in model:
            if not np.all(ours[name] == 1):
                raise WeightsError(
                    f"{source} has prototypes with a learned gain, the model keeps them at unit norm; "
                    "set head.norm_last_layer=False"
                )
            del kept[name]
    return kept


def resample_relative_positions(table: np.ndarray, positions: int) -> np.ndarray:
    """Fits a relative-position table to another window as Swin's own fine-tuning does: bicubic, A = -0.75.

    Args:
        table: [(2w - 1)^2, H], row-major.
        positions: (2w' - 1)^2 of the other window.

    Returns:
        [positions, H] float32.
    """
    side, other = math.isqrt(table.shape[0]), math.isqrt(positions)
    matrix = bicubic_matrix(side, other, other / side)
    square = table.reshape(side, side, -1).astype(np.float64)
    return np.einsum("ri,cj,ijh->rch", matrix, matrix, square).reshape(positions, -1).astype(np.float32)


def _resample(ours: Arrays, wanted: Shapes, notes: list[str]) -> Arrays:
    """Resamples relative positions that differ in their window alone; `_check` refuses other differences."""
    fitted = dict(ours)
    windows: dict[tuple[int, int], int] = {}
    for name, table in ours.items():
        shape = wanted.get(name, table.shape)
        if table.shape == shape or table.ndim != len(shape) or table.shape[-1] != shape[-1]:
            continue
        if name.endswith(_RELATIVE) and is_square(table.shape[0]) and is_square(shape[0]):
            fitted[name] = resample_relative_positions(table, shape[0])
            sides = tuple((math.isqrt(count) + 1) // 2 for count in (table.shape[0], shape[0]))
            windows[sides] = windows.get(sides, 0) + 1
    for (window, other), count in windows.items():
        notes.append(f"{count} relative-position tables resampled from window {window} to {other} (bicubic)")
    return fitted


def _check(ours: Arrays, wanted: Shapes, layout: Layout, unknown: list[str], source: str) -> None:
    """Compares names and shapes under the file's own names, which its owner knows."""
    theirs, more = to_theirs(ours, layout)
    given = {name: array.shape for name, array in theirs.items()}
    empty, unplaced = to_theirs(stand_ins(wanted), layout)
    expected = {name: array.shape for name, array in empty.items()} | {name: wanted[name] for name in unplaced}
    missing = sorted(expected.keys() - given.keys())
    extra = unknown + more + sorted(given.keys() - expected.keys())
    shaped = sorted(name for name in given.keys() & expected.keys() if given[name] != expected[name])
    count = len(missing) + len(extra) + len(shaped)
    if count:
        faults = [f"{name} is missing{_nearest(name, extra)}" for name in missing[:SHOWN]]
        faults += [f"{name} is not in the model{_nearest(name, list(expected))}" for name in extra[:SHOWN]]
        faults += [f"{name} is {given[name]}, the model's is {expected[name]}" for name in shaped[:SHOWN]]
        left = f"; and {count - len(faults)} more" if count > len(faults) else ""
        raise WeightsError(
            f"{source} ({layout.title}) does not fit the model; set model.* (with init.heads also head.*, "
            f"method.image_pool and method.mil_scorer) to the checkpoint's. {count} array(s) differ: {'; '.join(faults)}{left}"
        )


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=2)
    return f" (nearest: {', '.join(near)})" if near else ""
