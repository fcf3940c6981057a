"""How the families of files name a backbone: one table each, read in both directions by `names`."""

from typing import NamedTuple

# Projection heads of DINO and EsViT: theirs -> (our MLP, our prototypes).
HEADS = {"head": ("image_head", "image_last_layer"), "head_dense": ("region_head", "region_last_layer")}
QKV = ("query", "key", "value")


class Layout(NamedTuple):
    """How one family of files names a backbone.

    Attributes:
        title: for messages.
        backbone: "vit" or "swin".
        rules: our module, or our array with PyTorch's leaf -> theirs. {i} and {j} are numbers, {next} is i + 1. Modules that
            we do not have stand for parts of ours, or for several side by side: attn/query, attn/key, attn/value of attn/qkv;
            mlp/gate_fc1 of mlp/gate and mlp/fc1.
        gated: the rules where MLPs are gated, if that changes them.
        flat: class token [D] and positions [P, D], where ours are [1, 1, D] and [1, P, D].
    """

    title: str
    backbone: str
    rules: dict[str, str]
    gated: dict[str, str] = {}
    flat: bool = False


def _blocks(ours: str, theirs: str, parts: dict[str, str]) -> dict[str, str]:
    return {f"{ours}/{part}": f"{theirs}.{name}" for part, name in parts.items()}


def _vit_blocks(theirs: str, *parts: dict[str, str]) -> dict[str, str]:
    return {ours: name for each in parts for ours, name in _blocks("blocks_{i}", theirs, each).items()}


def _with_mlp(rules: dict[str, str], theirs: str, parts: dict[str, str]) -> dict[str, str]:
    """Rules with another MLP."""
    return {ours: name for ours, name in rules.items() if "/mlp/" not in ours} | _blocks("blocks_{i}", theirs, parts)


_BLOCK = {part: part.replace("/", ".") for part in ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")}
_SCALES = {"ls1": "ls1.gamma", "ls2": "ls2.gamma"}
_TABLE = "attn/relative_position_bias_table"
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
_HF_ATTENTION = {f"attn/{part}": f"attention.attention.{part}" for part in QKV}
_HF_SCALES = {"ls1": "layer_scale1.lambda1", "ls2": "layer_scale2.lambda1"}
_PROJECTIONS = {f"attn/{part}": f"{part[0]}_proj" for part in QKV}
_VIT = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens": "register_tokens",
    "patch_embed": "patch_embed.proj",
    **_vit_blocks("blocks.{i}", _BLOCK, _SCALES),
    "norm": "norm",
}
_DINOV3 = {ours: name for ours, name in _VIT.items() if ours != "pos_embed"} | {"register_tokens": "storage_tokens"}
_TIMM = _VIT | {"register_tokens": "reg_token", "norm_pre": "norm_pre"}
_EVA_ATTENTION = {"attn/qkv/weight": "attn.qkv.weight"} | {f"attn/{part}/bias": f"attn.{part[0]}_bias" for part in QKV}
_EVA = {
    "cls_token": "cls_token",
    "register_tokens": "reg_token",
    "patch_embed": "patch_embed.proj",
    **_vit_blocks(
        "blocks.{i}",
        {ours: name for ours, name in _BLOCK.items() if ours != "attn/qkv"},
        _EVA_ATTENTION,
        {"ls1": "gamma_1", "ls2": "gamma_2"},
    ),
    "norm": "norm",
}
_HF_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    **_vit_blocks("encoder.layer.{i}", _HF_BLOCK, _HF_ATTENTION),
    "norm": "layernorm",
}
_HF_DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings.projection",
    **_vit_blocks(
        "encoder.layer.{i}",
        {"norm1": "norm1", "norm2": "norm2", "attn/proj": "attention.output.dense", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"},
        _HF_ATTENTION,
        _HF_SCALES,
    ),
    "norm": "layernorm",
}
_HF_DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings",
    **_vit_blocks(
        "layer.{i}",
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "attn/proj": "attention.o_proj",
            "mlp/fc1": "mlp.up_proj",
            "mlp/fc2": "mlp.down_proj",
        },
        {ours: f"attention.{name}" for ours, name in _PROJECTIONS.items()},
        _HF_SCALES,
    ),
    "norm": "norm",
}
_HF_CLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    **_vit_blocks(
        "encoder.layers.{i}",
        {
            "norm1": "layer_norm1",
            "attn/proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp/fc1": "mlp.fc1",
            "mlp/fc2": "mlp.fc2",
        },
        {ours: f"self_attn.{name}" for ours, name in _PROJECTIONS.items()},
    ),
    "norm": "post_layernorm",
}
_OPEN_CLIP = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed": "conv1",
    "norm_pre": "ln_pre",
    **_vit_blocks(
        "transformer.resblocks.{i}",
        {
            "norm1": "ln_1",
            "attn/qkv/weight": "attn.in_proj_weight",
            "attn/qkv/bias": "attn.in_proj_bias",
            "attn/proj": "attn.out_proj",
            "norm2": "ln_2",
            "mlp/fc1": "mlp.c_fc",
            "mlp/fc2": "mlp.c_proj",
        },
        {"ls1": "ls_1.gamma", "ls2": "ls_2.gamma"},
    ),
    "norm": "ln_post",
}
_SWIN = {
    "patch_embed": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    **_blocks("layers_{i}_blocks_{j}", "layers.{i}.blocks.{j}", _BLOCK | {_TABLE: _TABLE.replace("/", ".")}),
    **_blocks("layers_{i}_downsample", "layers.{i}.downsample", {"norm": "norm", "reduction": "reduction"}),
    "norm": "norm",
}
_HF_SWIN_QKV = {f"attn/{part}": f"attention.self.{part}" for part in (*QKV, "relative_position_bias_table")}
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
# A plain ViT has the names of the first three: the first then counts, but for the packed gated MLPs that timm alone has.
LAYOUTS = {
    "dino": Layout(
        "DINO, DINOv2, MAE or timm ViT",
        "vit",
        _VIT,
        _with_mlp(_VIT, "blocks.{i}", {"mlp/gate_fc1": "mlp.w12", "mlp/fc2": "mlp.w3"}),
    ),
    "dinov3": Layout(
        "DINOv3 ViT",
        "vit",
        _DINOV3,
        _with_mlp(_DINOV3, "blocks.{i}", {"mlp/gate": "mlp.w1", "mlp/fc1": "mlp.w2", "mlp/fc2": "mlp.w3"}),
    ),
    "timm": Layout("timm ViT", "vit", _TIMM, _with_mlp(_TIMM, "blocks.{i}", {"mlp/gate_fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"})),
    "timm_eva": Layout(
        "timm Eva",
        "vit",
        _EVA,
        _with_mlp(_EVA, "blocks.{i}", {"mlp/gate": "mlp.fc1_g", "mlp/fc1": "mlp.fc1_x", "mlp/fc2": "mlp.fc2"}),
    ),
    # Before "swin", whose rules know all names of this one too, though not where they belong.
    "timm_swin": Layout("timm Swin", "swin", _TIMM_SWIN),
    "swin": Layout("EsViT Swin", "swin", _SWIN),
    "hf_vit": Layout("Hugging Face ViT", "vit", _HF_VIT),
    "hf_dinov2": Layout(
        "Hugging Face DINOv2",
        "vit",
        _HF_DINOV2,
        _with_mlp(_HF_DINOV2, "encoder.layer.{i}", {"mlp/gate_fc1": "mlp.weights_in", "mlp/fc2": "mlp.weights_out"}),
    ),
    "hf_dinov3": Layout(
        "Hugging Face DINOv3",
        "vit",
        _HF_DINOV3,
        _with_mlp(_HF_DINOV3, "layer.{i}", {"mlp/gate": "mlp.gate_proj", "mlp/fc1": "mlp.up_proj", "mlp/fc2": "mlp.down_proj"}),
    ),
    "hf_clip": Layout("Hugging Face CLIP or SigLIP", "vit", _HF_CLIP, flat=True),
    "open_clip": Layout("OpenCLIP ViT", "vit", _OPEN_CLIP, flat=True),
    "hf_swin": Layout("Hugging Face Swin", "swin", _HF_SWIN),
}
