"""How DINO, EsViT, timm and Hugging Face name a backbone's parameters, one table for each layout.

Ours are the paths of the parameter tree of `models.vit` and `models.swin`, joined by "/". A rule maps a module, or a
parameter that belongs to none. {i} and {j} are numbers, {next} is i + 1.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """How one family of files names a backbone.

    Attributes:
        title: for messages.
        backbone: "vit" or "swin".
        rules: our module or parameter -> theirs.
        separate_qkv: query, key and value are three modules.
    """

    title: str
    backbone: str
    rules: dict[str, str]
    separate_qkv: bool = False


_VIT = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "register_tokens": "reg_token",
    "patch_embed": "patch_embed.proj",
    "blocks_{i}/norm1": "blocks.{i}.norm1",
    "blocks_{i}/attn/qkv": "blocks.{i}.attn.qkv",
    "blocks_{i}/attn/proj": "blocks.{i}.attn.proj",
    "blocks_{i}/norm2": "blocks.{i}.norm2",
    "blocks_{i}/mlp/fc1": "blocks.{i}.mlp.fc1",
    "blocks_{i}/mlp/fc2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
}
_SWIN = {
    "patch_embed": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    "layers_{i}_blocks_{j}/norm1": "layers.{i}.blocks.{j}.norm1",
    "layers_{i}_blocks_{j}/attn/qkv": "layers.{i}.blocks.{j}.attn.qkv",
    "layers_{i}_blocks_{j}/attn/proj": "layers.{i}.blocks.{j}.attn.proj",
    "layers_{i}_blocks_{j}/attn/relative_position_bias_table": "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
    "layers_{i}_blocks_{j}/norm2": "layers.{i}.blocks.{j}.norm2",
    "layers_{i}_blocks_{j}/mlp/fc1": "layers.{i}.blocks.{j}.mlp.fc1",
    "layers_{i}_blocks_{j}/mlp/fc2": "layers.{i}.blocks.{j}.mlp.fc2",
    "layers_{i}_downsample/norm": "layers.{i}.downsample.norm",
    "layers_{i}_downsample/reduction": "layers.{i}.downsample.reduction",
    "norm": "norm",
}
# timm moved the merging of patches from the end of a stage to the beginning of the next.
_TIMM_SWIN = _SWIN | {
    "layers_{i}_downsample/norm": "layers.{next}.downsample.norm",
    "layers_{i}_downsample/reduction": "layers.{next}.downsample.reduction",
}
_HF_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "blocks_{i}/norm1": "encoder.layer.{i}.layernorm_before",
    "blocks_{i}/attn/query": "encoder.layer.{i}.attention.attention.query",
    "blocks_{i}/attn/key": "encoder.layer.{i}.attention.attention.key",
    "blocks_{i}/attn/value": "encoder.layer.{i}.attention.attention.value",
    "blocks_{i}/attn/proj": "encoder.layer.{i}.attention.output.dense",
    "blocks_{i}/norm2": "encoder.layer.{i}.layernorm_after",
    "blocks_{i}/mlp/fc1": "encoder.layer.{i}.intermediate.dense",
    "blocks_{i}/mlp/fc2": "encoder.layer.{i}.output.dense",
    "norm": "layernorm",
}
# transformers 5 names its modules anew; it writes these, and reads both.
_HF5_VIT = _HF_VIT | {
    "blocks_{i}/norm1": "layers.{i}.layernorm_before",
    "blocks_{i}/attn/query": "layers.{i}.attention.q_proj",
    "blocks_{i}/attn/key": "layers.{i}.attention.k_proj",
    "blocks_{i}/attn/value": "layers.{i}.attention.v_proj",
    "blocks_{i}/attn/proj": "layers.{i}.attention.o_proj",
    "blocks_{i}/norm2": "layers.{i}.layernorm_after",
    "blocks_{i}/mlp/fc1": "layers.{i}.mlp.fc1",
    "blocks_{i}/mlp/fc2": "layers.{i}.mlp.fc2",
}
_HF_SWIN = {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "patch_norm": "embeddings.norm",
    "layers_{i}_blocks_{j}/norm1": "encoder.layers.{i}.blocks.{j}.layernorm_before",
    "layers_{i}_blocks_{j}/attn/query": "encoder.layers.{i}.blocks.{j}.attention.self.query",
    "layers_{i}_blocks_{j}/attn/key": "encoder.layers.{i}.blocks.{j}.attention.self.key",
    "layers_{i}_blocks_{j}/attn/value": "encoder.layers.{i}.blocks.{j}.attention.self.value",
    "layers_{i}_blocks_{j}/attn/relative_position_bias_table": (
        "encoder.layers.{i}.blocks.{j}.attention.self.relative_position_bias_table"
    ),
    "layers_{i}_blocks_{j}/attn/proj": "encoder.layers.{i}.blocks.{j}.attention.output.dense",
    "layers_{i}_blocks_{j}/norm2": "encoder.layers.{i}.blocks.{j}.layernorm_after",
    "layers_{i}_blocks_{j}/mlp/fc1": "encoder.layers.{i}.blocks.{j}.intermediate.dense",
    "layers_{i}_blocks_{j}/mlp/fc2": "encoder.layers.{i}.blocks.{j}.output.dense",
    "layers_{i}_downsample/norm": "encoder.layers.{i}.downsample.norm",
    "layers_{i}_downsample/reduction": "encoder.layers.{i}.downsample.reduction",
    "norm": "layernorm",
}
_HF5_SWIN = _HF_SWIN | {
    "layers_{i}_blocks_{j}/attn/query": "encoder.layers.{i}.blocks.{j}.attention.q_proj",
    "layers_{i}_blocks_{j}/attn/key": "encoder.layers.{i}.blocks.{j}.attention.k_proj",
    "layers_{i}_blocks_{j}/attn/value": "encoder.layers.{i}.blocks.{j}.attention.v_proj",
    "layers_{i}_blocks_{j}/attn/relative_position_bias_table": (
        "encoder.layers.{i}.blocks.{j}.attention.relative_position_bias.relative_position_bias_table"
    ),
    "layers_{i}_blocks_{j}/attn/proj": "encoder.layers.{i}.blocks.{j}.attention.o_proj",
    "layers_{i}_blocks_{j}/mlp/fc1": "encoder.layers.{i}.blocks.{j}.mlp.fc1",
    "layers_{i}_blocks_{j}/mlp/fc2": "encoder.layers.{i}.blocks.{j}.mlp.fc2",
}

# Ours has no rules: arrays of a run's checkpoint need none.
OURS = Layout("cmd_jax", "", {})
LAYOUTS = {
    "vit": Layout("DINO or timm ViT", "vit", _VIT),
    # Before "swin", whose rules know all names of this one too, though not where they belong.
    "timm_swin": Layout("timm Swin", "swin", _TIMM_SWIN),
    "swin": Layout("EsViT Swin", "swin", _SWIN),
    "hf_vit": Layout("Hugging Face ViT", "vit", _HF_VIT, separate_qkv=True),
    "hf5_vit": Layout("Hugging Face ViT (transformers 5)", "vit", _HF5_VIT, separate_qkv=True),
    "hf_swin": Layout("Hugging Face Swin", "swin", _HF_SWIN, separate_qkv=True),
    "hf5_swin": Layout("Hugging Face Swin (transformers 5)", "swin", _HF5_SWIN, separate_qkv=True),
}
