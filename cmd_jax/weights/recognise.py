"""What a file of another project is: the values of the configuration that names, shapes and the files beside it show."""

import math
import re
from typing import Any, NamedTuple

from cmd_jax.errors import WeightsError
from cmd_jax.models.sizes import SWIN_PATCH_PX, SWIN_SIZES, SWIN_STRIDE_PX, VIT, VIT_SIZES
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import Arrays, Named, is_square, stand_ins, to_ours
from cmd_jax.weights.preparation import Beside, prepared, side_px, usual_preparation

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
# Heads where they are not those of the named size, by width: DINOv3's H+ and 7B, MoCo v3's ViT-S.
_HEADS = {"DINOv3": {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}, "MoCo v3": {384: 12, 768: 12}}
# timm's architectures of no named size.
_ARCHITECTURES = {
    r"vit_medium_": 8,
    r"vit_betwixt_": 10,
    r"vit_so400m_": 16,
    r"vit_giant_patch14_clip": 16,
    r"vit_gigantic_": 16,
}
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layer|layers|resblocks)\.(\d+)\.")


# Keys that shapes do not show; of a Swin also those that its tables are resampled for.
_GUESSED = {
    "model.num_heads",
    "model.resample_rule",
    "model.rope_base",
    "model.activation",
    "model.layer_norm_eps",
    "data.normalization",
}
_FREE_OF_SWIN = {"model.window", "model.table_px"}


class Recognised(NamedTuple):
    """What a file is.

    Attributes:
        keys: keys of the configuration -> the file's values; `eval.crop_px` and `eval.resize_px` are of its preparation.
        line: the same in words.
        usual: those of the keys that neither shapes nor files say; their values are usual for such a network.
    """

    keys: dict[str, Any]
    line: str
    usual: frozenset[str] = frozenset()


def recognise(named: Named, beside: Beside, source: str) -> Recognised:
    """Finds out what weights are.

    Args:
        named: the arrays, of which shapes alone count.
        beside: the files beside them.
        source: where they are from, for messages, and for names that say quickgelu.

    Raises:
        WeightsError: the files ask for what the models here cannot do, or have values of other types.
    """
    try:
        swin = named.layout.backbone == "swin"
        keys, said, line = (_swin if swin else _vit)(named, beside, source)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(f"{source}: the files beside it, or its shapes, are of no known form ({reason})") from error
    usual = frozenset(_GUESSED - said | (_FREE_OF_SWIN if swin else set()))
    return Recognised({key: value for key, value in keys.items() if value is not None}, line, usual)


def _vit(named: Named, beside: Beside, source: str) -> tuple[dict[str, Any], set[str], str]:
    """(values of keys, those of them that files say, the line)."""
    sample, depth = _first_block(named, source)
    model = _model_config(beside)
    width, patch = sample["patch_embed/kernel"].shape[-1], sample["patch_embed/kernel"].shape[0]
    class_token, gated = "cls_token" in sample, "blocks_0/mlp/gate/kernel" in sample
    registers = sample["register_tokens"].shape[1] if "register_tokens" in sample else 0
    family, words = _family(named, sample, beside, registers)
    positions, table_px = ("rotary", None) if family == "DINOv3" else _positions(sample, patch, class_token, registers, source)
    named_size = next((name for name, size in VIT_SIZES.items() if (size.width, size.depth) == (width, depth)), None)
    heads = _said_heads(named, model, beside, width)
    found, said = prepared(beside), _said(model, beside) | ({"model.num_heads"} if heads else set())
    heads = heads or _usual_heads(model, family, width, named_size)
    keys = {
        "model.name": named_size or VIT,
        "model.width": width,
        "model.depth": depth,
        "model.num_heads": heads,
        "model.mlp_dim": sample["blocks_0/mlp/fc1/kernel"].shape[-1],
        "model.patch_size": patch,
        "model.table_px": table_px,
        "model.class_token": class_token,
        "model.registers": registers,
        "model.positions": positions,
        "model.resample_rule": None if positions == "rotary" else _resample_rule(named, model, family, registers),
        "model.rope_base": float(model.get("rope_theta", 100.0)) if positions == "rotary" else None,
        "model.layer_scale": "blocks_0/ls1" in sample,
        "model.gated_mlp": gated,
        "model.activation": _activation(named, model, beside, family, gated, source),
        "model.pre_norm": "norm_pre/scale" in sample,
        "model.qkv_bias": _qkv_bias(named, sample),
        "model.layer_norm_eps": _eps(model, family),
        **_prepared(found, family, table_px or side_px(model.get("image_size"))),
    }
    size = f"ViT-{named_size.removeprefix('vit_')}" if named_size else "ViT"
    parts = [f"{words}: {size}/{patch}", f"width {width}", f"{depth} blocks"]
    parts += [f"{heads} heads"] if heads else []
    parts += ["LayerScale"] if keys["model.layer_scale"] else []
    parts += ["gated MLPs"] if gated else []
    parts += ["no class token"] if not class_token else []
    parts += ["rotary positions" if positions == "rotary" else f"table of {table_px} px"]
    return keys, said | found.keys(), ", ".join(parts)


def _said(model: dict, beside: Beside) -> set[str]:
    """Keys that the files say beside heads and preparation."""
    keys = {
        "resample_rule": "model.resample_rule",
        "rope_theta": "model.rope_base",
        "hidden_act": "model.activation",
        "act_layer": "model.activation",
        "layer_norm_eps": "model.layer_norm_eps",
    }
    return {key for name, key in keys.items() if name in model} | ({"model.activation"} if beside.open_clip else set())


def _prepared(found: dict[str, Any], family: str, image_px: int | None) -> dict[str, Any]:
    rest = usual_preparation(family, image_px)
    if "eval.crop_px" in found:  # how its images get their size is said
        rest = {"data.normalization": rest["data.normalization"]}
    return rest | found


def _first_block(named: Named, source: str) -> tuple[Arrays, int]:
    """(our names below the backbone -> shapes, but for later blocks; number of blocks)."""
    blocks = [int(found[1]) for name in named.arrays if (found := _BLOCK.search(name))]
    wanted = {
        name: array.shape for name, array in named.arrays.items() if not _BLOCK.search(name) or _BLOCK.search(name)[1] == "0"
    }
    ours, _ = to_ours(stand_ins(wanted), named.layout)
    sample = {name.removeprefix("backbone/"): array for name, array in ours.items()}
    kernel, hidden = sample.get("patch_embed/kernel"), sample.get("blocks_0/mlp/fc1/kernel")
    if kernel is None or kernel.ndim != 4 or hidden is None or hidden.ndim != 2:
        raise WeightsError(
            f"{source} ({named.layout.title}) is no whole backbone: its patch embedding or its first MLP is missing, or of "
            "another shape; use another copy"
        )
    return sample, 1 + max(blocks)


def _model_config(beside: Beside) -> dict[str, Any]:
    """The part of the files that describes the backbone: of a CLIP its image tower, of timm also what it adds to the named
    architecture."""
    config = beside.config
    return (
        config | config.get("vision_config", {}) | config.get("model_args", {}) | beside.open_clip_model().get("vision_cfg", {})
    )


def _family(named: Named, sample: Arrays, beside: Beside, registers: int) -> tuple[str, str]:
    """(short name of the family, the same in words with the project whose names the file has)."""
    layout, config = named.layout, beside.config
    architecture = config.get("architecture")
    if layout is LAYOUTS["open_clip"]:
        project = "OpenCLIP"
    elif layout.title.startswith("Hugging Face"):
        project = "transformers"
    elif isinstance(architecture, str):
        project = f"timm {architecture}"
    else:
        project = "timm" if layout in (LAYOUTS["timm"], LAYOUTS["timm_eva"]) else ""
    rotary = layout in (LAYOUTS["dinov3"], LAYOUTS["timm_eva"], LAYOUTS["hf_dinov3"])
    if rotary:
        family = "DINOv3"
    elif any(re.match(r"(module\.)?(base|momentum)_encoder\.", name) for name in named.seen):
        family = "MoCo v3"
    elif "norm_pre/scale" in sample:
        family = "CLIP"
    elif layout is LAYOUTS["hf_clip"] or "siglip" in str(architecture):
        family = "SigLIP"
    elif layout is LAYOUTS["hf_dinov2"] or ("blocks_0/ls1" in sample and "deit3" not in str(architecture)):
        family = "DINOv2"
    elif config.get("model_type") == "vit_mae" or any("decoder" in name for name in named.seen):
        family = "MAE"
    else:
        family = "ViT"
    words = f"{family} with {registers} registers" if registers else family
    return family, f"{words} ({project})" if project else words


def _positions(sample: Arrays, patch: int, class_token: bool, registers: int, source: str) -> tuple[str, int | None]:
    """(model.positions, model.table_px) of the table's rows."""
    table = sample.get("pos_embed")
    if table is None:
        return "class_patches", None  # missing: said with all else that is
    rows, special = table.shape[1], int(class_token)
    kinds = {"class_patches": special, "patches": 0, "all": special + registers}
    for positions, before in kinds.items():
        if is_square(rows - before) and not (positions == "class_patches" and not class_token):
            return positions, math.isqrt(rows - before) * patch
    raise WeightsError(
        f"{source} has a table of {rows} positions, which with {special} class token and {registers} registers is no square of "
        "patches; only square tables are read"
    )


def _said_heads(named: Named, model: dict, beside: Beside, width: int) -> int | None:
    given = model.get("num_attention_heads", model.get("num_heads"))
    if given is not None:
        return int(given)
    if beside.open_clip_model():
        return width // int(model.get("head_width", 64))
    periods = next((shape for name, shape in named.seen.items() if name.endswith("rope_embed.periods")), None)
    return width // (4 * periods[0]) if periods and periods[0] else None  # a quarter of a head's channels


def _usual_heads(model: dict, family: str, width: int, named_size: str | None) -> int | None:
    if width in _HEADS.get(family, {}):
        return _HEADS[family][width]
    architecture = str(model.get("architecture", ""))
    known = next((heads for pattern, heads in _ARCHITECTURES.items() if re.match(pattern, architecture)), None)
    return known or (VIT_SIZES[named_size].heads if named_size else None)


def _resample_rule(named: Named, model: dict, family: str, registers: int) -> str:
    if "resample_rule" in model:
        return model["resample_rule"]
    if named.layout in (LAYOUTS["hf_vit"], LAYOUTS["hf_clip"]) or (named.layout is LAYOUTS["hf_dinov2"] and not registers):
        return "size"
    of_timm = named.layout is LAYOUTS["timm"] or "pretrained_cfg" in model or "architecture" in model
    return "antialiased" if of_timm or registers or family == "CLIP" else "dino"


def _activation(named: Named, model: dict, beside: Beside, family: str, gated: bool, source: str) -> str:
    if gated and (family != "DINOv3" or "hidden_act" not in model):
        return "silu"  # whatever transformers' DINOv2 says
    otherwise = "gelu"
    if named.layout is LAYOUTS["hf_clip"]:
        otherwise = "gelu_tanh" if family == "SigLIP" else "quick_gelu"  # transformers' defaults
    elif beside.open_clip_model():
        otherwise = "quick_gelu" if beside.open_clip_model().get("quick_gelu") else "gelu"
    elif family == "CLIP" and re.search("quickgelu|openai", f"{model.get('architecture', '')} {source}".lower()):
        otherwise = "quick_gelu"
    given = model.get("hidden_act", model.get("act_layer")) or otherwise
    if given not in _ACTIVATIONS:
        raise WeightsError(f"{source} has the activation {given!r}; known are {', '.join(_ACTIVATIONS)}; use other weights")
    return _ACTIVATIONS[given]


def _qkv_bias(named: Named, sample: Arrays) -> str:
    if "blocks_0/attn/qkv/bias" not in sample:
        return "none"
    apart = named.layout in (LAYOUTS["hf_dinov3"], LAYOUTS["timm_eva"])
    has_key = any(name.endswith(("k_proj.bias", "attn.k_bias")) for name in named.arrays)
    masked = any(name.endswith("qkv.bias_mask") for name in named.seen)
    return "qv" if masked or (apart and not has_key) else "qkv"


def _eps(model: dict, family: str) -> float:
    if model.get("layer_norm_eps") is not None:
        return float(model["layer_norm_eps"])
    if model.get("model_type") in ("vit", "vit_mae", "vit_msn"):
        return 1e-12
    return 1e-5 if family in ("DINOv3", "CLIP") else 1e-6


def _swin(named: Named, beside: Beside, source: str) -> tuple[dict[str, Any], set[str], str]:
    """As `_vit`."""
    ours, _ = to_ours(stand_ins({name: array.shape for name, array in named.arrays.items()}), named.layout)
    kernel = ours.get("backbone/patch_embed/kernel")
    tables: dict[int, list[tuple[int, int]]] = {}
    for name, array in ours.items():
        found = re.fullmatch(r"backbone/layers_(\d+)_blocks_\d+/attn/relative_position_bias_table", name)
        if found:
            tables.setdefault(int(found[1]), []).append(((math.isqrt(array.shape[0]) + 1) // 2, array.shape[-1]))
    if kernel is None or kernel.ndim != 4 or not tables:
        raise WeightsError(
            f"{source} ({named.layout.title}) is no whole backbone: it lacks patch embedding or relative positions"
        )
    width, stages = kernel.shape[-1], [tables[stage] for stage in sorted(tables)]
    depths, heads = tuple(map(len, stages)), tuple(stage[0][1] for stage in stages)
    name = next((name for name, size in SWIN_SIZES.items() if tuple(size) == (width, depths, heads)), None)
    if name is None:
        sizes = ", ".join(f"{name} ({size.width}, {size.depths}, {size.heads})" for name, size in SWIN_SIZES.items())
        raise WeightsError(
            f"{source} is a Swin of width {width}, {depths} blocks and {heads} heads; there are {sizes}; use "
            "weights of one of them"
        )
    model = _model_config(beside)
    if _ACTIVATIONS.get(model.get("hidden_act", "gelu")) != "gelu":
        raise WeightsError(f"{source} has the activation {model['hidden_act']!r}, a Swin here gelu; use other weights")
    windows = [stage[0][0] for stage in stages]
    window = max(windows)
    # A stage whose map is smaller than the window has a table of its side, which tells the image's.
    whole = next((side * SWIN_PATCH_PX << stage for stage, side in enumerate(windows) if side < window), None)
    table_px = whole or side_px(model.get("image_size")) or window * SWIN_STRIDE_PX
    found = prepared(beside)
    of_esvit = named.layout is LAYOUTS["swin"]
    project = "EsViT" if of_esvit else "timm" if named.layout is LAYOUTS["timm_swin"] else "transformers"
    keys = {
        "model.name": name,
        "model.patch_size": kernel.shape[0],
        "model.table_px": table_px,
        "model.window": window,
        "model.layer_norm_eps": float(model.get("layer_norm_eps", 1e-6 if of_esvit else 1e-5)),
        **_prepared(found, "Swin", table_px),
    }
    line = f"Swin ({project}): {name}, width {width}, {'-'.join(map(str, depths))} blocks, window {window}"
    return keys, _said(model, beside) | found.keys(), line
