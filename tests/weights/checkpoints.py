"""State dicts under the names of other projects, written out by hand: what the tables are tested against."""

import numpy as np

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
