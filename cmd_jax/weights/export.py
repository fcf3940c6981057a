"""Writes a backbone under timm's names, or as a Hugging Face directory that `transformers` loads: the family that its options
are those of."""

import json
import math
import os
from typing import Any

import numpy as np

from cmd_jax.config import ConfigDict
from cmd_jax.errors import WeightsError
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import write_safetensors
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import Arrays, to_theirs
from cmd_jax.weights.preparation import FILTERS
from cmd_jax.weights.read import CONFIG, METADATA, PREPROCESSOR, SAFETENSORS

_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
# What a family's networks may be: attribute of a ViT -> the values that they have.
_HF_HOLDS = {
    "ViTModel": {
        "class_token": (True,),
        "registers": (0,),
        "positions": ("class_patches",),
        "gated_mlp": (False,),
        "qkv_bias": ("qkv", "none"),
    },
    "Dinov2Model": {"class_token": (True,), "positions": ("class_patches",), "qkv_bias": ("qkv", "none")},
    "DINOv3ViTModel": {"class_token": (True,), "layer_scale": (True,), "pre_norm": (False,)},
    "CLIPVisionModel": {
        "class_token": (True,),
        "registers": (0,),
        "positions": ("class_patches",),
        "layer_scale": (False,),
        "gated_mlp": (False,),
        "qkv_bias": ("qkv",),
    },
}
_TIMM_HOLDS = {
    "VisionTransformer": {"qkv_bias": ("qkv", "none")},
    "Eva": {"class_token": (True,), "pre_norm": (False,), "qkv_bias": ("qv", "none")},
}


def write_timm(path: str, arrays: Arrays, backbone: ViT | Swin, config: ConfigDict) -> None:
    """Writes a `.safetensors` file that timm's VisionTransformer, Eva (rotary positions) or SwinTransformer loads. Its metadata
    has, as `config`, what timm's config.json says: architecture and arguments of the model, image side, mean and deviation.

    Args:
        path: of the file; its directory is made.
        arrays: the backbone's, under our names (backbone/...).
        backbone: their module.
        config: resolved, of their run.

    Raises:
        WeightsError: timm has no such model.
    """
    about = {"architecture": _architecture(backbone), "num_classes": 0, "pretrained_cfg": _pretrained_cfg(config)}
    about |= _beyond_timm(backbone)
    if isinstance(backbone, Swin):
        layout, about["model_args"] = LAYOUTS["timm_swin"], _timm_swin_args(backbone)
    else:
        layout = LAYOUTS["timm" if backbone.positions != "rotary" else "timm_eva"]
        _check_timm(backbone)
        arrays, positions = _folded(arrays, backbone)
        about["model_args"] = _timm_args(backbone, positions)
    theirs, _ = to_theirs(arrays, layout, key_bias=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_safetensors(path, theirs, {METADATA: json.dumps(about)})  # of two texts the order would be random


def write_hugging_face(directory: str, arrays: Arrays, backbone: ViT | Swin, preprocessor: dict[str, Any] | None) -> None:
    """Writes a directory for a model of transformers (`hugging_face_model`): weights and two JSON files.

    The features are ours at the image size of the table of positions, and at others where the family resamples it by the rule
    of the model (`model.resample_rule`). SwinModel's norms after the patch embedding and in the mergings have epsilon 1e-5,
    ours that of the configuration.

    Args:
        directory: is made.
        arrays: the backbone's, under our names (backbone/...).
        backbone: their module.
        preprocessor: of `preprocessor_config`; None where transformers has none that prepares images as ours.

    Raises:
        WeightsError: transformers has no such model.
    """
    model = hugging_face_model(backbone)
    if isinstance(backbone, Swin):
        layout, config = LAYOUTS["hf_swin"], _swin_config(backbone, _common_window(arrays, backbone))
    else:
        key, make_config = {
            "ViTModel": ("hf_vit", _vit_config),
            "Dinov2Model": ("hf_dinov2", _dinov2_config),
            "Dinov2WithRegistersModel": ("hf_dinov2", _dinov2_config),
            "DINOv3ViTModel": ("hf_dinov3", _dinov3_config),
            "CLIPVisionModel": ("hf_clip", _clip_config),
        }[model]
        layout, config = LAYOUTS[key], make_config(backbone) | _vit_sizes(backbone)
    theirs, _ = to_theirs(arrays, layout, key_bias=isinstance(backbone, Swin) or backbone.qkv_bias != "qv")
    theirs |= _unused(model, backbone)
    if model == "CLIPVisionModel":
        theirs = {f"vision_model.{name}": array for name, array in theirs.items()}
    os.makedirs(directory, exist_ok=True)
    write_safetensors(os.path.join(directory, SAFETENSORS), theirs)
    config = {"architectures": [model], **config, **_common_config(backbone)}
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        if content:
            with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
                file.write("\n")


def hugging_face_model(backbone: ViT | Swin) -> str:
    """The class of transformers whose networks a backbone is one of.

    Raises:
        WeightsError: there is none.
    """
    if isinstance(backbone, Swin):
        return "SwinModel"
    if backbone.positions == "rotary":
        model = "DINOv3ViTModel"
    elif backbone.pre_norm:
        model = "CLIPVisionModel"
    else:
        model = "Dinov2Model" if backbone.layer_scale else "ViTModel"
    _check(backbone, f"transformers' {model}", _HF_HOLDS[model], "timm" if _timm_holds(backbone) else "safetensors")
    return "Dinov2WithRegistersModel" if model == "Dinov2Model" and backbone.registers else model


def _check(backbone: ViT, model: str, holds: dict[str, tuple], other: str) -> None:
    for name, values in holds.items():
        value = getattr(backbone, name)
        if value not in values:
            raise WeightsError(
                f"{model} has model.{name} {' or '.join(map(repr, values))} alone, and this is {value!r}; pass --format={other}"
            )


def _check_timm(backbone: ViT) -> None:
    model = "Eva" if backbone.positions == "rotary" else "VisionTransformer"
    _check(backbone, f"timm's {model}", _TIMM_HOLDS[model], "safetensors")
    if backbone.gated_mlp and backbone.activation != "silu":
        raise WeightsError(
            f"timm's gated MLPs have model.activation 'silu' alone, and this is {backbone.activation!r}; pass "
            "--format=safetensors"
        )


def _timm_holds(backbone: ViT) -> bool:
    try:
        _check_timm(backbone)
    except WeightsError:
        return False
    return True


def _folded(arrays: Arrays, backbone: ViT) -> tuple[Arrays, str]:
    """(arrays, positions): with registers timm has rows for all tokens or for patches alone; that of the class token is then
    added to it, as in timm's DINOv2."""
    if not (backbone.registers and backbone.positions == "class_patches"):
        return arrays, backbone.positions
    token, table = arrays["backbone/cls_token"], arrays["backbone/pos_embed"]
    return arrays | {"backbone/cls_token": token + table[:, :1], "backbone/pos_embed": table[:, 1:]}, "patches"


def _timm_args(backbone: ViT, positions: str) -> dict[str, Any]:
    """Arguments of timm.create_model."""
    units = backbone.mlp_dim * (2 if backbone.gated_mlp and positions != "rotary" else 1)  # gate and values in one layer
    ratio = units / backbone.width
    common = {
        "img_size": backbone.table_px,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.width,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": ratio if int(ratio * backbone.width) == units else (units + 0.5) / backbone.width,  # timm cuts the product
        "init_values": 1e-5 if backbone.layer_scale else None,
        "qkv_bias": backbone.qkv_bias != "none",
    }
    if positions == "rotary":
        return common | {
            "num_reg_tokens": backbone.registers,
            "swiglu_mlp": backbone.gated_mlp,
            "swiglu_align_to": int(backbone.gated_mlp),  # gate and values are two layers if it is not 0
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_temperature": backbone.rope_base,
            "rope_rotate_half": True,
            "use_fc_norm": False,
            "dynamic_img_size": True,
        }
    return common | {
        "act_layer": backbone.activation,
        "class_token": backbone.class_token,
        "global_pool": "token" if backbone.class_token else "avg",
        "fc_norm": False,
        "reg_tokens": backbone.registers,
        "no_embed_class": positions == "patches",
        "pre_norm": backbone.pre_norm,
    }


def _architecture(backbone: ViT | Swin) -> str:
    """timm's name of a model of the same kind, which the arguments make the same."""
    if isinstance(backbone, Swin):
        return "swin_tiny_patch4_window7_224"
    if backbone.positions == "rotary":
        return "vit_small_patch16_dinov3"
    if backbone.pre_norm:
        return "vit_base_patch16_clip_224"
    return "vit_giant_patch14_dinov2" if backbone.gated_mlp else "vit_small_patch16_224"


def _timm_swin_args(backbone: Swin) -> dict[str, Any]:
    return {
        "img_size": backbone.table_px,
        "patch_size": backbone.patch_size,
        "window_size": backbone.window,
        "embed_dim": backbone.width,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
    }


def _beyond_timm(backbone: ViT | Swin) -> dict[str, Any]:
    """What the network is and timm's arguments cannot say; under the names of transformers."""
    about = {"layer_norm_eps": backbone.layer_norm_eps, "image_size": backbone.table_px}
    if isinstance(backbone, ViT):
        about |= {"resample_rule": backbone.resample_rule, "rope_theta": backbone.rope_base}
    return about


def _pretrained_cfg(config: ConfigDict) -> dict[str, Any]:
    """Preparation as timm describes it, as far as it can."""
    crop, resize = config.eval.crop_px, config.eval.resize_px
    share = crop / resize
    about = {
        "input_size": [3, crop, crop],
        "interpolation": config.eval.interpolation,
        # timm cuts the quotient to a whole number
        "crop_pct": share if math.floor(crop / share) == resize else crop / (resize + 0.5),
        "crop_mode": "squash" if config.eval.resize_mode == "squash" else "center",
    }
    statistics = statistics_of(config.data.normalization)
    return about | ({"mean": list(statistics[0]), "std": list(statistics[1])} if statistics else {})


def preprocessor_config(config: ConfigDict) -> dict[str, Any] | None:
    """Describes preprocessing as transformers does; None for local contrast and luma, which it lacks."""
    statistics = statistics_of(config.data.normalization)
    if statistics is None or config.data.grayscale:
        return None
    mean, std = map(list, statistics)
    crop, resize = config.eval.crop_px, config.eval.resize_px
    squash = config.eval.resize_mode == "squash"
    kind = ("ViTImageProcessor" if crop == resize else "DeiTImageProcessor") if squash else "BitImageProcessor"
    cut = {"do_center_crop": True, "crop_size": {"height": crop, "width": crop}} if kind != "ViTImageProcessor" else {}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resize, "width": resize} if squash else {"shortest_edge": resize},
        "resample": next(number for number, name in FILTERS.items() if number and name == config.eval.interpolation),
        **cut,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _vit_config(backbone: ViT) -> dict[str, Any]:
    return {"model_type": "vit", "intermediate_size": backbone.mlp_dim} | _rule(backbone, "size")


def _clip_config(backbone: ViT) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", "intermediate_size": backbone.mlp_dim} | _rule(backbone, "size")


def _dinov2_config(backbone: ViT) -> dict[str, Any]:
    model_type, rule = ("dinov2_with_registers", "antialiased") if backbone.registers else ("dinov2", "size")
    hidden = lambda ratio: (int(backbone.width * ratio * 2 / 3) + 7) // 8 * 8 if backbone.gated_mlp else backbone.width * ratio
    ratio = next((ratio for ratio in range(1, 17) if hidden(ratio) == backbone.mlp_dim), None)
    if ratio is None or (backbone.gated_mlp and backbone.activation != "silu"):
        raise WeightsError(
            f"transformers' Dinov2Model has no MLPs of {backbone.mlp_dim} units with {backbone.activation} for a width of "
            f"{backbone.width}; pass --format=timm"
        )
    about = {"model_type": model_type, "mlp_ratio": ratio, "use_swiglu_ffn": backbone.gated_mlp}
    registers = {"num_register_tokens": backbone.registers} if backbone.registers else {"use_mask_token": False}
    return about | registers | _rule(backbone, rule)


def _dinov3_config(backbone: ViT) -> dict[str, Any]:
    biases = {"qkv": "qkv", "qv": "qv", "none": ""}[backbone.qkv_bias]
    return {
        "model_type": "dinov3_vit",
        "intermediate_size": backbone.mlp_dim,
        "num_register_tokens": backbone.registers,
        "rope_theta": backbone.rope_base,
        "use_gated_mlp": backbone.gated_mlp,
        "query_bias": "q" in biases,
        "key_bias": "k" in biases,
        "value_bias": "v" in biases,
    }


def _rule(backbone: ViT, usual: str) -> dict[str, Any]:
    """Ours, where it is not the family's: transformers does not read it, `cmd_jax` does."""
    return {} if backbone.resample_rule == usual else {"resample_rule": backbone.resample_rule}


def _vit_sizes(backbone: ViT) -> dict[str, Any]:
    return {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "hidden_act": _HF_ACTIVATIONS[backbone.activation],
        "qkv_bias": backbone.qkv_bias != "none",
    }


def _unused(model: str, backbone: ViT | Swin) -> Arrays:
    """Parameters that a class has and that its features do not depend on."""
    if model == "Dinov2WithRegistersModel":
        return {"embeddings.mask_token": np.zeros((1, backbone.width), np.float32)}
    if model != "DINOv3ViTModel":
        return {}
    none = {} if backbone.registers else {"embeddings.register_tokens": np.zeros((1, 0, backbone.width), np.float32)}
    return {"embeddings.mask_token": np.zeros((1, 1, backbone.width), np.float32)} | none


def _swin_config(backbone: Swin, window: int) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": backbone.width,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
        "window_size": window,
        "mlp_ratio": backbone.mlp_ratio,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
        "qkv_bias": True,
        "hidden_act": "gelu",
    }


def _common_config(backbone: ViT | Swin) -> dict[str, Any]:
    return {
        "image_size": backbone.table_px,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "layer_norm_eps": backbone.layer_norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
    }


def _common_window(arrays: Arrays, backbone: Swin) -> int:
    """Returns the window of all stages: transformers has no Swin with several, and does not pad between stages."""
    tables = [array for name, array in arrays.items() if name.endswith("relative_position_bias_table")]
    windows = sorted({(math.isqrt(table.shape[0]) + 1) // 2 for table in tables})
    step = backbone.patch_size * 2 ** (len(backbone.depths) - 1)
    if len(windows) > 1:
        raise WeightsError(
            f"this Swin has windows of {' and '.join(map(str, windows))} tokens, transformers' SwinModel one window for all "
            "stages; pass --format=timm"
        )
    if backbone.table_px % step:
        raise WeightsError(
            f"model.table_px is {backbone.table_px}; transformers' SwinModel has our windows only at multiples of {step}; "
            "pass --format=timm"
        )
    return windows[0]
