"""Small models of every family of transformers, every parameter drawn wide: norms, gates, layer scales, biases."""

import numpy as np
import torch
import transformers as hf

import cmd_jax
from cmd_jax.normalization import statistics_of

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8, "image_size": 48}
MLP = {"intermediate_size": 96}
OTHER_PX = 80  # of images for which positions are resampled
SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2, "image_size": 64}
NO_POOLER = {"add_pooling_layer": False}


def draw(model, seed=0):
    """Draws every parameter, so that none can be mixed up or left out unnoticed; returns the model for evaluation.

    Scales of norms and of branches are in 0.5..1.5, tokens, positions and biases have a deviation of 0.5, kernels keep the
    deviation of what they multiply.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if (module in factors and leaf == "weight") or leaf in ("lambda1", "gamma", "gamma_1", "gamma_2"):
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            kernel = leaf == "weight" and "position" not in module
            spread = float(np.prod(parameter.shape[1:])) ** -0.5 if kernel else 0.5
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip_tokens(model, x):
    """The patches of CLIP are normed for us, and not in its own output."""
    return model.post_layernorm(model(x, interpolate_pos_encoding=True).last_hidden_state)


def interpolated(model, x):
    return model(x, interpolate_pos_encoding=True).last_hidden_state


def plain(model, x):
    return model(x).last_hidden_state


class Family:
    """A model and how its tokens after the final norm are asked for."""

    def __init__(self, model, config, tokens, wrapper=None, **arguments):
        self.model, self.config, self.tokens, self.wrapper, self.arguments = model, config, tokens, wrapper, arguments

    def make(self):
        return draw(self.model(self.config, **self.arguments))


FAMILIES = {
    "ViT": Family(hf.ViTModel, hf.ViTConfig(**SIZES, **MLP, hidden_act="gelu_pytorch_tanh"), interpolated, **NO_POOLER),
    "ViT without biases": Family(hf.ViTModel, hf.ViTConfig(**SIZES, **MLP, qkv_bias=False), interpolated, **NO_POOLER),
    "ViTMSN": Family(hf.ViTMSNModel, hf.ViTMSNConfig(**SIZES, **MLP), interpolated),
    "Dinov2": Family(hf.Dinov2Model, hf.Dinov2Config(**SIZES, mlp_ratio=2), plain),
    "Dinov2 gated": Family(hf.Dinov2Model, hf.Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True), plain),
    "Dinov2WithRegisters": Family(
        hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3), plain
    ),
    "DINOv3": Family(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**SIZES, **MLP), plain),
    "DINOv3 with registers": Family(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**SIZES, **MLP, num_register_tokens=4), plain),
    "DINOv3 gated": Family(
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig(**SIZES, **MLP, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", key_bias=True),
        plain,
    ),
    "CLIP": Family(hf.CLIPVisionModel, hf.CLIPVisionConfig(**SIZES, **MLP), clip_tokens),
    "CLIP with gelu": Family(hf.CLIPVisionModel, hf.CLIPVisionConfig(**SIZES, **MLP, hidden_act="gelu"), clip_tokens),
    "SigLIP": Family(hf.SiglipVisionModel, hf.SiglipVisionConfig(**SIZES, **MLP), interpolated),
    "Swin": Family(hf.SwinModel, hf.SwinConfig(**SWIN, drop_path_rate=0.0), plain, **NO_POOLER),
}
# Whose special tokens (class token, registers) stand before the patches.
SPECIAL = {"SigLIP": 0, "Swin": 0, "Dinov2WithRegisters": 4, "DINOv3 with registers": 5, "DINOv3 gated": 5}


def pixels(side, count=2):
    """[count, side, side, 3] uint8 with structure at two scales."""
    rng = np.random.default_rng(side)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)).repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    return np.clip(coarse + rng.integers(-60, 61, (count, side, side, 3)), 0, 255).astype(np.uint8)


def tensor(images, statistics):
    """[N, H, W, 3] uint8 and (mean, deviation) -> what a model reads, [N, 3, H, W] float32."""
    mean, std = map(np.array, statistics)
    return torch.from_numpy(np.moveaxis((images / 255 - mean) / std, -1, 1).astype(np.float32).copy())


def reference(family, model, images, statistics):
    """The model's tokens after the final norm: (class token [N, D] or None, patches [N, P, D])."""
    with torch.no_grad():
        tokens = FAMILIES[family].tokens(model, tensor(images, statistics)).numpy()
    special = SPECIAL.get(family, 1)
    return (tokens[:, 0] if special else None), tokens[:, special:]


def compare(model, name, source, side, **arguments):
    """The greatest difference of our class token and patches to the model's, and their deviation."""
    ours = cmd_jax.load(source, image_px=side, resize_px=side, **arguments)
    images = pixels(side)
    token, patches = reference(name, model, images, statistics_of(ours.config.data.normalization))
    found = ours.patch_tokens(images)
    worst = np.abs(found.reshape(patches.shape) - patches).max()
    if token is not None:
        unit = token / np.linalg.norm(token, axis=-1, keepdims=True)
        worst = max(worst, np.abs(ours.embed(images) - unit).max())
    return worst, patches.std()
