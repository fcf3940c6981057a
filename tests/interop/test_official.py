"""DINOv2, DINOv3 and OpenCLIP under the names of their own projects: the features of the same weights in transformers.

The names are written out here a second time, so that the package's tables are not tested against themselves.
"""

import json

import numpy as np
import pytest
import torch

from cmd_jax.weights.files import read_safetensors, write_safetensors
from tests.interop.families import FAMILIES, OTHER_PX, compare

PARTS = ("weight", "bias")


def _joined(theirs, prefix, names):
    """Layers side by side: query, key and value; or gate and values."""
    return {leaf: np.concatenate([theirs[f"{prefix}{name}.{leaf}"] for name in names]) for leaf in PARTS}


def _renamed(theirs, prefix, pairs):
    return {f"{ours}.{leaf}": theirs[f"{prefix}{name}.{leaf}"] for ours, name in pairs.items() for leaf in PARTS}


def dinov2(theirs):
    found = {"cls_token": theirs["embeddings.cls_token"], "pos_embed": theirs["embeddings.position_embeddings"]}
    if "embeddings.register_tokens" in theirs:
        found["register_tokens"] = theirs["embeddings.register_tokens"]
    found |= {"mask_token": theirs["embeddings.mask_token"]}
    found |= _renamed(theirs, "", {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"})
    for index in range(3):
        prefix, block = f"encoder.layer.{index}.", f"blocks.{index}"
        qkv = _joined(theirs, f"{prefix}attention.attention.", ("query", "key", "value"))
        found |= {f"{block}.attn.qkv.{leaf}": array for leaf, array in qkv.items()}
        gated = f"{prefix}mlp.weights_in.weight" in theirs
        mlp = (
            {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
            if gated
            else {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        )
        pairs = {"attn.proj": "attention.output.dense", "norm1": "norm1", "norm2": "norm2", **mlp}
        found |= _renamed(theirs, prefix, {f"{block}.{ours}": name for ours, name in pairs.items()})
        found |= {f"{block}.ls{i}.gamma": theirs[f"{prefix}layer_scale{i}.lambda1"] for i in (1, 2)}
    return found


def dinov3(theirs):
    found = {"cls_token": theirs["embeddings.cls_token"], "storage_tokens": theirs["embeddings.register_tokens"]}
    found |= {"mask_token": theirs["embeddings.mask_token"][0]}
    found |= _renamed(theirs, "", {"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"})
    found["rope_embed.periods"] = np.float32(100.0) ** (np.arange(4, dtype=np.float32) / 4)  # heads of 16 channels
    for index in range(3):
        prefix, block = f"layer.{index}.", f"blocks.{index}"
        weights = [theirs[f"{prefix}attention.{part}_proj.weight"] for part in "qkv"]
        found[f"{block}.attn.qkv.weight"] = np.concatenate(weights)
        query, value = (theirs[f"{prefix}attention.{part}_proj.bias"] for part in "qv")
        # What is in the keys' part does not count: it is masked.
        found[f"{block}.attn.qkv.bias"] = np.concatenate([query, np.full_like(query, 7), value])
        mask = np.concatenate([np.ones_like(query), np.zeros_like(query), np.ones_like(value)])
        found[f"{block}.attn.qkv.bias_mask"] = mask
        pairs = {"attn.proj": "attention.o_proj", "norm1": "norm1", "norm2": "norm2"}
        pairs |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
        found |= _renamed(theirs, prefix, {f"{block}.{ours}": name for ours, name in pairs.items()})
        found |= {f"{block}.ls{i}.gamma": theirs[f"{prefix}layer_scale{i}.lambda1"] for i in (1, 2)}
    return found


def open_clip(theirs):
    found = {"visual.class_embedding": theirs["embeddings.class_embedding"]}
    found["visual.positional_embedding"] = theirs["embeddings.position_embedding.weight"]
    found["visual.conv1.weight"] = theirs["embeddings.patch_embedding.weight"]
    found |= _renamed(theirs, "", {"visual.ln_pre": "pre_layrnorm", "visual.ln_post": "post_layernorm"})
    found |= {"visual.proj": np.zeros((48, 32), np.float32), "logit_scale": np.zeros((), np.float32)}
    found |= {"transformer.resblocks.0.ln_1.weight": np.ones(32, np.float32)}  # of the text tower
    for index in range(3):
        prefix, block = f"encoder.layers.{index}.", f"visual.transformer.resblocks.{index}"
        packed = _joined(theirs, f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"))
        found |= {f"{block}.attn.in_proj_{leaf}": array for leaf, array in packed.items()}
        pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
        pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        found |= _renamed(theirs, prefix, {f"{block}.{ours}": name for ours, name in pairs.items()})
    return found


CASES = {
    "Dinov2": dinov2,
    "Dinov2 gated": dinov2,
    "Dinov2WithRegisters": dinov2,
    "DINOv3 with registers": dinov3,
    "CLIP": open_clip,
}


@pytest.mark.parametrize("name", CASES)
def test_features_under_the_projects_own_names(name, tmp_path):
    model = FAMILIES[name].make()
    model.save_pretrained(tmp_path / "hf")
    arrays = CASES[name](read_safetensors(str(tmp_path / "hf" / "model.safetensors")))
    if name == "CLIP":
        (tmp_path / "clip").mkdir()
        source = tmp_path / "clip" / "open_clip_pytorch_model.bin"
        torch.save({key: torch.from_numpy(array.copy()) for key, array in arrays.items()}, source)
        vision = {"image_size": 48, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
        (source.parent / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": vision}})
        )
        source = source.parent
    elif name == "DINOv3 with registers":
        source = tmp_path / "dinov3.pth"
        torch.save({"teacher": {f"backbone.{key}": torch.from_numpy(array.copy()) for key, array in arrays.items()}}, source)
    else:
        source = tmp_path / "dinov2.safetensors"
        write_safetensors(str(source), {f"backbone.{key}": array for key, array in arrays.items()})
    heads = {} if name in ("CLIP", "DINOv3 with registers") else {"num_heads": 3}
    # DINOv2 without registers and OpenCLIP resample positions in another way than transformers.
    for side in (48, OTHER_PX) if "egisters" in name else (48,):
        worst, deviation = compare(model, name, source, side, **heads)
        assert deviation > 0.5
        assert worst < 1e-4
