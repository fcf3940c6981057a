"""Models of transformers with random weights, and their state dicts under the names of DINO and EsViT.

The names are written out here a second time, so that the package's tables are not tested against themselves.
"""

import numpy as np
import torch
from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

VIT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 384, "patch_size": 8}
SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2, "drop_path_rate": 0.0}


def _randomise(model):
    """Every parameter drawn, biases and norms too, so that none can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6  # of DINO and EsViT; transformers cannot set it everywhere
    return model.eval()


def vit(image_px=32):
    return _randomise(ViTModel(ViTConfig(image_size=image_px, layer_norm_eps=1e-6, **VIT), add_pooling_layer=False))


def swin(image_px=64):
    return _randomise(SwinModel(SwinConfig(image_size=image_px, layer_norm_eps=1e-6, **SWIN), add_pooling_layer=False))


def tokens(model, images):
    """images: [B, H, W, 3] float32 -> the model's tokens after the final norm."""
    with torch.no_grad():
        return model(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).last_hidden_state.numpy()


def _packed(attention, leaf):
    return torch.cat([getattr(getattr(attention, f"{part}_proj"), leaf) for part in "qkv"])


def _module(name, module):
    return {f"{name}.{leaf}": value for leaf, value in module.state_dict().items()}


def _block(name, layer):
    return {
        **_module(f"{name}.norm1", layer.layernorm_before),
        f"{name}.attn.qkv.weight": _packed(layer.attention, "weight"),
        f"{name}.attn.qkv.bias": _packed(layer.attention, "bias"),
        **_module(f"{name}.attn.proj", layer.attention.o_proj),
        **_module(f"{name}.norm2", layer.layernorm_after),
        **_module(f"{name}.mlp.fc1", layer.mlp.fc1),
        **_module(f"{name}.mlp.fc2", layer.mlp.fc2),
    }


def dino_state(model):
    state = {
        "cls_token": model.embeddings.cls_token,
        "pos_embed": model.embeddings.position_embeddings,
        **_module("patch_embed.proj", model.embeddings.patch_embeddings.projection),
        **_module("norm", model.layernorm),
    }
    for index, layer in enumerate(model.layers):
        state |= _block(f"blocks.{index}", layer)
    return {name: value.detach() for name, value in state.items()}


def esvit_state(model):
    state = {
        **_module("patch_embed.proj", model.embeddings.patch_embeddings.projection),
        **_module("patch_embed.norm", model.embeddings.norm),
        **_module("norm", model.layernorm),
    }
    for stage, layers in enumerate(model.encoder.layers):
        for index, layer in enumerate(layers.blocks):
            name, bias = f"layers.{stage}.blocks.{index}", layer.attention.relative_position_bias
            state |= _block(name, layer)
            state[f"{name}.attn.relative_position_bias_table"] = bias.relative_position_bias_table
            state[f"{name}.attn.relative_position_index"] = bias.relative_position_index
            state[f"{name}.attn_mask"] = torch.zeros(4, 4, 4)
        if layers.downsample is not None:
            state |= _module(f"layers.{stage}.downsample.norm", layers.downsample.norm)
            state |= _module(f"layers.{stage}.downsample.reduction", layers.downsample.reduction)
    return {name: value.detach() for name, value in state.items()}


class Head(torch.nn.Module):
    """DINO's projection head by its description: hidden width 16, bottleneck 8, 24 prototypes with a gain."""

    def __init__(self, width):
        super().__init__()
        linear, gelu = torch.nn.Linear, torch.nn.GELU
        self.mlp = torch.nn.Sequential(linear(width, 16), gelu(), linear(16, 16), gelu(), linear(16, 8))
        self.last_layer = torch.nn.Module()
        self.last_layer.weight_g = torch.nn.Parameter(torch.rand(24, 1) + 0.5)
        self.last_layer.weight_v = torch.nn.Parameter(torch.randn(24, 8))

    def forward(self, x):
        z = torch.nn.functional.normalize(self.mlp(x), dim=-1)
        v, g = self.last_layer.weight_v, self.last_layer.weight_g
        return z @ (g * v / v.norm(dim=1, keepdim=True)).T
