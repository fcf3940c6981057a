"""Architectures of the named models; apart from the modules, so that flags are checked without loading flax."""

from typing import Literal, NamedTuple, get_args

Scoring = Literal["gated", "attention", "class_token", "mean"]
UNLEARNED: tuple[Scoring, ...] = ("class_token", "mean")  # MIL scorers without parameters of their own


# Options of a ViT, see `models.vit.ViT`.
Positions = Literal["class_patches", "all", "patches", "rotary"]
ResampleRule = Literal["dino", "size", "antialiased", "esvit"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
QKVBias = Literal["qkv", "qv", "none"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
RESAMPLE_RULES: tuple[ResampleRule, ...] = ("dino", "size", "antialiased")
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
QKV_BIASES: tuple[QKVBias, ...] = get_args(QKVBias)


class ViTSize(NamedTuple):
    """Architecture of a named ViT."""

    width: int
    depth: int
    heads: int


# "micro" is ours, for two CPU cores; the others are those of DINO, MAE and DINOv2.
VIT_SIZES = {
    "vit_micro": ViTSize(96, 2, 3),
    "vit_tiny": ViTSize(192, 12, 3),
    "vit_small": ViTSize(384, 12, 6),
    "vit_base": ViTSize(768, 12, 12),
    "vit_large": ViTSize(1024, 24, 16),
    "vit_huge": ViTSize(1280, 32, 16),
    "vit_giant": ViTSize(1536, 40, 24),
}
VIT = "vit"  # of any other size
DEFAULT_MODEL = "vit_small"


class SwinSize(NamedTuple):
    """Architecture of a named Swin: width of the first stage, blocks and heads of each of the four."""

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]


# "micro" is ours, for CPU cores; the others are Swin's.
SWIN_SIZES = {
    "swin_micro": SwinSize(24, (1, 1, 2, 1), (1, 2, 4, 8)),
    "swin_tiny": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_large": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
SWIN_PATCH_PX = 4  # of all named sizes
SWIN_STRIDE_PX = 32  # side in pixels of a token of the last of four stages
