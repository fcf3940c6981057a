"""State dicts under the names of other projects, written out by hand: what the tables are tested against."""

import numpy as np

from cmd_jax.weights.names import identify

WIDTH, GRID = 8, 4  # of the ViT; patches of 8 px
EMBED, HEADS = 4, (1, 2, 2, 4)  # of the Swin: width of the first stage, one block in each stage but two in the third
DEPTHS, WINDOW = (1, 1, 2, 1), 2


def _random(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block(prefix, width):
    return {
        **_norm(f"{prefix}.norm1", width),
        **_linear(f"{prefix}.attn.qkv", width, 3 * width),
        **_linear(f"{prefix}.attn.proj", width, width),
        **_norm(f"{prefix}.norm2", width),
        **_linear(f"{prefix}.mlp.fc1", width, 4 * width),
        **_linear(f"{prefix}.mlp.fc2", 4 * width, width),
    }


def dino_vit(depth=2, grid=GRID):
    """A ViT as DINO and timm store it."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid * grid, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        **_norm("norm", WIDTH),
    }
    for index in range(depth):
        shapes |= _block(f"blocks.{index}", WIDTH)
    return _random(shapes)


VIT_BLOCK = {  # DINO's names below a block -> shapes
    **_norm("norm1", WIDTH),
    **_linear("attn.qkv", WIDTH, 3 * WIDTH),
    **_linear("attn.proj", WIDTH, WIDTH),
    **_norm("norm2", WIDTH),
    **_linear("mlp.fc1", WIDTH, 4 * WIDTH),
    **_linear("mlp.fc2", 4 * WIDTH, WIDTH),
}
REGISTERS, HIDDEN = 2, 12  # of the families below; units of gated MLPs
_EMBED = {"weight": (WIDTH, 3, 8, 8), "bias": (WIDTH,)}


def _qkv(names, biases=True):
    return {name: shape for part in names for name, shape in _linear(part, WIDTH, WIDTH, biases).items()}


def _family(prefix, others, block, depth=2):
    return _random(others | {f"{prefix.format(index)}{name}": shape for index in range(depth) for name, shape in block.items()})


def _without(block, *parts):
    return {name: shape for name, shape in block.items() if not name.startswith(parts)}


def _top(token="cls_token", table=None, embed="patch_embed.proj", norm="norm", registers=None):
    shapes = {token: (1, 1, WIDTH), f"{embed}.weight": _EMBED["weight"], f"{embed}.bias": _EMBED["bias"], **_norm(norm, WIDTH)}
    shapes |= {table: (1, 1 + GRID * GRID, WIDTH)} if table else {}
    return shapes | ({registers: (1, REGISTERS, WIDTH)} if registers else {})


def dinov2(gated=False, registers=True):
    """As facebookresearch/dinov2 stores it."""
    block = VIT_BLOCK | {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
    if gated:
        w12, w3 = _linear("mlp.w12", WIDTH, 2 * HIDDEN), _linear("mlp.w3", HIDDEN, WIDTH)
        block = _without(block, "mlp.") | w12 | w3
    return _family("blocks.{}.", _top(table="pos_embed", registers="register_tokens" if registers else None), block)


def dinov3(gated=False):
    """As facebookresearch/dinov3 stores it, buffers included."""
    block = VIT_BLOCK | {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,), "attn.qkv.bias_mask": (3 * WIDTH,)}
    if gated:
        block = _without(block, "mlp.") | _linear("mlp.w1", WIDTH, HIDDEN) | _linear("mlp.w2", WIDTH, HIDDEN)
        block |= _linear("mlp.w3", HIDDEN, WIDTH)
    return _family("blocks.{}.", _top(registers="storage_tokens") | {"rope_embed.periods": (1,)}, block)


def timm_vit(packed=False):
    """timm's VisionTransformer with registers and LayerScale; `packed`: the gated MLPs of DINOv2's giant."""
    block = VIT_BLOCK | {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
    if packed:
        block = _without(block, "mlp.") | _linear("mlp.fc1", WIDTH, 2 * HIDDEN) | _linear("mlp.fc2", HIDDEN, WIDTH)
    return _family("blocks.{}.", _top(table="pos_embed", registers=None if packed else "reg_token"), block)


def timm_eva(gated=False, biases=True):
    """timm's Eva as DINOv3 uses it."""
    block = _without(VIT_BLOCK, "attn.qkv.bias") | {"gamma_1": (WIDTH,), "gamma_2": (WIDTH,)}
    if biases:
        block |= {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
    if gated:
        block = _without(block, "mlp.fc1") | _linear("mlp.fc1_g", WIDTH, 4 * WIDTH) | _linear("mlp.fc1_x", WIDTH, 4 * WIDTH)
    return _family("blocks.{}.", _top(registers="reg_token"), block)


def hf_dinov2(gated=False, registers=True):
    """transformers' Dinov2Model or Dinov2WithRegistersModel."""
    mlp = _linear("mlp.fc1", WIDTH, 4 * WIDTH) | _linear("mlp.fc2", 4 * WIDTH, WIDTH)
    if gated:
        mlp = _linear("mlp.weights_in", WIDTH, 2 * HIDDEN) | _linear("mlp.weights_out", HIDDEN, WIDTH)
    block = {
        **_norm("norm1", WIDTH),
        **_qkv(f"attention.attention.{part}" for part in ("query", "key", "value")),
        **_linear("attention.output.dense", WIDTH, WIDTH),
        **_norm("norm2", WIDTH),
        **mlp,
        "layer_scale1.lambda1": (WIDTH,),
        "layer_scale2.lambda1": (WIDTH,),
    }
    top = _top(
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection",
        "layernorm",
        registers="embeddings.register_tokens" if registers else None,
    )
    return _family("encoder.layer.{}.", top, block)


def hf_dinov3(gated=False):
    """transformers' DINOv3ViTModel."""
    names = ("attention.q_proj", "attention.v_proj")
    block = {
        **_norm("norm1", WIDTH),
        **_qkv(names),
        "attention.k_proj.weight": (WIDTH, WIDTH),
        **_linear("attention.o_proj", WIDTH, WIDTH),
        **_norm("norm2", WIDTH),
        **_linear("mlp.up_proj", WIDTH, HIDDEN),
        **_linear("mlp.down_proj", HIDDEN, WIDTH),
        "layer_scale1.lambda1": (WIDTH,),
        "layer_scale2.lambda1": (WIDTH,),
    }
    block |= _linear("mlp.gate_proj", WIDTH, HIDDEN) if gated else {}
    top = _top("embeddings.cls_token", None, "embeddings.patch_embeddings", "norm", registers="embeddings.register_tokens")
    return _family("layer.{}.", top, block)


def hf_clip(class_token=True):
    """transformers' CLIPVisionModel; without class token SiglipVisionModel, without its head."""
    block = {
        **_norm("layer_norm1", WIDTH),
        **_qkv(f"self_attn.{part}_proj" for part in "qkv"),
        **_linear("self_attn.out_proj", WIDTH, WIDTH),
        **_norm("layer_norm2", WIDTH),
        **_linear("mlp.fc1", WIDTH, 4 * WIDTH),
        **_linear("mlp.fc2", 4 * WIDTH, WIDTH),
    }
    top = {
        "embeddings.patch_embedding.weight": _EMBED["weight"],
        "embeddings.position_embedding.weight": (class_token + GRID * GRID, WIDTH),
        **_norm("post_layernorm", WIDTH),
    }
    if class_token:
        top |= {"embeddings.class_embedding": (WIDTH,), **_norm("pre_layrnorm", WIDTH)}
    else:
        top["embeddings.patch_embedding.bias"] = _EMBED["bias"]
    return _family("encoder.layers.{}.", top, block)


def open_clip():
    """OpenCLIP's image tower, without the prefix `visual.`."""
    block = {
        **_norm("ln_1", WIDTH),
        "attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "attn.in_proj_bias": (3 * WIDTH,),
        **_linear("attn.out_proj", WIDTH, WIDTH),
        **_norm("ln_2", WIDTH),
        **_linear("mlp.c_fc", WIDTH, 4 * WIDTH),
        **_linear("mlp.c_proj", 4 * WIDTH, WIDTH),
    }
    top = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (1 + GRID * GRID, WIDTH),
        "conv1.weight": _EMBED["weight"],
        **_norm("ln_pre", WIDTH),
        **_norm("ln_post", WIDTH),
    }
    return _family("transformer.resblocks.{}.", top, block)


def named(arrays, network="teacher"):
    """What `fit` takes of arrays under the names of a file."""
    return identify(arrays, network, "x")


def esvit_swin(window=WINDOW):
    """A Swin as EsViT stores it, buffers left out."""
    shapes = {
        "patch_embed.proj.weight": (EMBED, 3, 4, 4),
        "patch_embed.proj.bias": (EMBED,),
        **_norm("patch_embed.norm", EMBED),
        **_norm("norm", 8 * EMBED),
    }
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = EMBED * 2**stage
        for index in range(depth):
            prefix = f"layers.{stage}.blocks.{index}"
            shapes |= _block(prefix, width)
            shapes[f"{prefix}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
        if stage < 3:
            shapes |= _norm(f"layers.{stage}.downsample.norm", 4 * width)
            shapes |= _linear(f"layers.{stage}.downsample.reduction", 4 * width, 2 * width, bias=False)
    return _random(shapes)


def projection_head(name, width, layers=3, batch_norm=False, gain=None):
    """DINO's head: hidden width 6, bottleneck 5, 7 prototypes."""
    shapes, place = {}, 0
    sizes = [width] + [6] * (layers - 1) + [5]
    for index in range(layers):
        layer = f"{name}.mlp" if layers == 1 else f"{name}.mlp.{place}"
        shapes |= _linear(layer, sizes[index], sizes[index + 1])
        if batch_norm and index < layers - 1:
            shapes |= _norm(f"{name}.mlp.{place + 1}", 6)
            shapes |= {f"{name}.mlp.{place + 1}.running_mean": (6,)}
        place += 3 if batch_norm else 2
    shapes[f"{name}.last_layer.weight_v"] = (7, 5)
    arrays = _random(shapes)
    arrays[f"{name}.last_layer.weight_g"] = np.ones((7, 1), np.float32) if gain is None else gain
    return arrays


def same(a, b):
    """Asserts equal names and equal arrays, bit for bit."""
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
