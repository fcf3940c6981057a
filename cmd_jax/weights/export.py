"""Writes a backbone under timm's names, or as a Hugging Face directory that `transformers` loads."""

import json
import math
import os
from typing import Any

from cmd_jax.config import ConfigDict
from cmd_jax.errors import WeightsError
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.files import write_safetensors
from cmd_jax.weights.names import LAYOUTS, Arrays, to_theirs
from cmd_jax.weights.read import CONFIG, PREPROCESSOR, SAFETENSORS


def write_timm(path: str, arrays: Arrays, backbone: ViT | Swin) -> None:
    """Writes a `.safetensors` file that timm's VisionTransformer or SwinTransformer loads.

    Args:
        path: of the file; its directory is made.
        arrays: the backbone's, under our names (backbone/...).
        backbone: their module.
    """
    theirs, _ = to_theirs(arrays, LAYOUTS["timm_swin" if isinstance(backbone, Swin) else "vit"])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_safetensors(path, theirs)


def write_hugging_face(directory: str, arrays: Arrays, backbone: ViT | Swin, preprocessor: dict[str, Any] | None) -> None:
    """Writes a directory for ViTModel or SwinModel (add_pooling_layer=False) of transformers: weights and two JSON files.

    The features are ours at the image size of the configuration (`views.global_px`). SwinModel's norms after the patch
    embedding and in the mergings have epsilon 1e-5, ours that of the configuration.

    Args:
        directory: is made.
        arrays: the backbone's, under our names (backbone/...).
        backbone: their module.
        preprocessor: of `preprocessor_config`; None where transformers has none that prepares images as ours.

    Raises:
        WeightsError: transformers has no such model.
    """
    if isinstance(backbone, Swin):
        layout, config = LAYOUTS["hf_swin"], _swin_config(backbone, _common_window(arrays, backbone))
    else:
        layout, config = LAYOUTS["hf_vit"], _vit_config(backbone)
    theirs, unplaced = to_theirs(arrays, layout)
    if unplaced:
        raise WeightsError(f"transformers' ViTModel has no {', '.join(unplaced)}; pass --format=timm")
    os.makedirs(directory, exist_ok=True)
    write_safetensors(os.path.join(directory, SAFETENSORS), theirs)
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        if content:
            with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
                file.write("\n")


def preprocessor_config(config: ConfigDict) -> dict[str, Any] | None:
    """Describes preprocessing as transformers does; None for local contrast and luma, which it lacks."""
    statistics = statistics_of(config.data.normalization)
    if statistics is None or config.data.grayscale:
        return None
    mean, std = map(list, statistics)
    return {
        "image_processor_type": "BitImageProcessor",  # shorter side, then a central crop
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.eval.resize_px},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": config.eval.crop_px, "width": config.eval.crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _vit_config(backbone: ViT) -> dict[str, Any]:
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": backbone.mlp_dim,
        **_common_config(backbone),
    }


def _swin_config(backbone: Swin, window: int) -> dict[str, Any]:
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "embed_dim": backbone.width,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
        "window_size": window,
        "mlp_ratio": backbone.mlp_ratio,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
        **_common_config(backbone),
    }


def _common_config(backbone: ViT | Swin) -> dict[str, Any]:
    return {
        "image_size": backbone.table_px,
        "patch_size": backbone.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
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
            f"views.global_px is {backbone.table_px}; transformers' SwinModel has our windows only at multiples of {step}; "
            "pass --format=timm"
        )
    return windows[0]
