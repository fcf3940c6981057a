"""Swin in NumPy float64, one window at a time, and fixtures made of it.

Written from the fixtures' description for whichever sizes a test needs. On the images and weights of the references' swin_w7
and swin_w14 fixtures it agrees with every array to 1e-5.
"""

import json

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


class SwinOracle:
    """The reference's backbone and heads.

    Args:
        meta: hyper-parameters under the fixtures' names.
        weights: PyTorch name -> array.
    """

    def __init__(self, meta, weights):
        self.meta = meta
        self.weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        grid, window = meta["img_size"] // meta["patch_size"], meta["window_size"]
        self.windows = []
        for stage, depth in enumerate(meta["depths"]):
            side = grid // 2**stage
            self.windows += [(side, 0) if side <= window else (window, window // 2 * (j % 2)) for j in range(depth)]

    def _linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, x, name):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _attention(self, tokens, name, heads, bias):
        """tokens: [n, D] of one window -> ([n, D], [heads, n, n])."""
        count, width = tokens.shape
        q, k, v = self._linear(tokens, f"{name}.qkv").reshape(count, 3, heads, -1).transpose(1, 2, 0, 3)
        probs = _softmax(q @ k.swapaxes(1, 2) / np.sqrt(width // heads) + bias)
        return self._linear((probs @ v).swapaxes(0, 1).reshape(count, width), f"{name}.proj"), probs

    def relative_position_index(self, window):
        y, x = np.divmod(np.arange(window * window), window)
        return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1

    def _window_attention(self, grid, name, heads, window, shift):
        images, rows, columns, width = grid.shape
        height, breadth = -(-rows // window) * window, -(-columns // window) * window
        padded = np.zeros((images, height, breadth, width))
        padded[:, :rows, :columns] = grid
        padded = np.roll(padded, (-shift, -shift), (1, 2))
        region = np.zeros((height, breadth))
        if shift:
            bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for number, (down, across) in enumerate((a, b) for a in bands for b in bands):
                region[down, across] = number
        table = self.weights[f"{name}.relative_position_bias_table"]
        bias = table[self.relative_position_index(window)].transpose(2, 0, 1)
        mixed, attention = np.zeros_like(padded), []
        for image in range(images):
            for top in range(0, height, window):
                for left in range(0, breadth, window):
                    own = (slice(top, top + window), slice(left, left + window))
                    label = region[own].ravel()
                    mask = np.where(label[:, None] == label, 0.0, -100.0)
                    tokens, probs = self._attention(padded[image][own].reshape(-1, width), name, heads, bias + mask)
                    mixed[image][own] = tokens.reshape(window, window, width)
                    attention.append(probs)
        return np.roll(mixed, (shift, shift), (1, 2))[:, :rows, :columns], np.stack(attention)

    def _merge(self, grid, name):
        images, rows, columns, width = grid.shape
        even = np.zeros((images, rows + rows % 2, columns + columns % 2, width))
        even[:, :rows, :columns] = grid
        corners = [even[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self._linear(self._norm(np.concatenate(corners, -1), f"{name}.norm"), f"{name}.reduction")

    def forward(self, images, last_blocks):
        """images: [B, 3, H, W] -> the fixtures' arrays of one size, by what follows `out_SIZE_`."""
        patch, (count, _, height, width) = self.meta["patch_size"], images.shape
        rows, columns = height // patch, width // patch
        pixels = np.asarray(images, np.float64)[:, :, : rows * patch, : columns * patch]
        pixels = pixels.reshape(count, 3, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
        kernel = self.weights["patch_embed.proj.weight"]
        grid = pixels.reshape(count, rows, columns, -1) @ kernel.reshape(len(kernel), -1).T
        grid = self._norm(grid + self.weights["patch_embed.proj.bias"], "patch_embed.norm")
        flat = lambda x: x.reshape(count, -1, x.shape[-1])
        out, blocks, windows = {"patch_embed": flat(grid)}, [], iter(self.windows)
        for stage, (depth, heads) in enumerate(zip(self.meta["depths"], self.meta["num_heads"], strict=True)):
            last = stage == len(self.meta["depths"]) - 1
            for index in range(depth):
                name = f"layers.{stage}.blocks.{index}"
                normal = self._norm(grid, f"{name}.norm1")
                mixed, out["attn_last"] = self._window_attention(normal, f"{name}.attn", heads, *next(windows))
                grid = grid + mixed
                hidden = _gelu(self._linear(self._norm(grid, f"{name}.norm2"), f"{name}.mlp.fc1"))
                grid = grid + self._linear(hidden, f"{name}.mlp.fc2")
                blocks.append(flat(self._norm(grid, "norm") if last else grid))
            if not last:
                grid = self._merge(grid, f"layers.{stage}.downsample")
            out[f"stage{stage}"] = flat(grid)
        linear = np.concatenate([tokens.mean(1) for tokens in blocks[-last_blocks:]], -1)
        return out | {"region": blocks[-1], "pooled": blocks[-1].mean(1), f"linear_last{last_blocks}": linear}

    def head(self, x, name):
        """x: [..., D] -> [..., K] logits."""
        layers = self.meta["head"]["nlayers"]
        for layer in range(layers):
            x = self._linear(x, f"{name}.mlp.{2 * layer}")
            x = _gelu(x) if layer < layers - 1 else x
        z = x / np.linalg.norm(x, axis=-1, keepdims=True)
        rows = self.weights[f"{name}.last_layer.weight_v"]
        gain = self.weights[f"{name}.last_layer.weight_g"]
        return z @ (gain * rows / np.linalg.norm(rows, axis=-1, keepdims=True)).T


def random_weights(meta, rng):
    """Weights of a fixture's architecture under PyTorch's names."""
    weights = {}

    def linear(name, inputs, outputs, bias=True):
        weights[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        if bias:
            weights[f"{name}.bias"] = 0.1 * rng.normal(size=outputs)

    def norm(name, width):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + 0.2 * rng.normal(size=width), 0.1 * rng.normal(size=width)

    width, patch = meta["embed_dim"], meta["patch_size"]
    linear("patch_embed.proj", 3 * patch * patch, width)
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].reshape(width, 3, patch, patch)
    norm("patch_embed.norm", width)
    windows = iter(SwinOracle(meta, {}).windows)
    for stage, (depth, heads) in enumerate(zip(meta["depths"], meta["num_heads"], strict=True)):
        for index in range(depth):
            name, (window, _) = f"layers.{stage}.blocks.{index}", next(windows)
            norm(f"{name}.norm1", width)
            norm(f"{name}.norm2", width)
            linear(f"{name}.attn.qkv", width, 3 * width)
            linear(f"{name}.attn.proj", width, width)
            linear(f"{name}.mlp.fc1", width, meta["mlp_ratio"] * width)
            linear(f"{name}.mlp.fc2", meta["mlp_ratio"] * width, width)
            weights[f"{name}.attn.relative_position_bias_table"] = 0.5 * rng.normal(size=((2 * window - 1) ** 2, heads))
        if stage < len(meta["depths"]) - 1:
            norm(f"layers.{stage}.downsample.norm", 4 * width)
            linear(f"layers.{stage}.downsample.reduction", 4 * width, 2 * width, bias=False)
            width *= 2
    norm("norm", width)
    if "head" in meta:
        head = meta["head"]
        widths = [width, *[head["hidden_dim"]] * (head["nlayers"] - 1), head["bottleneck_dim"]]
        for name in ("head", "head_dense"):
            for layer in range(head["nlayers"]):
                linear(f"{name}.mlp.{2 * layer}", *widths[layer : layer + 2])
            weights[f"{name}.last_layer.weight_v"] = rng.normal(size=(head["out_dim"], head["bottleneck_dim"]))
            weights[f"{name}.last_layer.weight_g"] = 1 + 0.3 * rng.random((head["out_dim"], 1))
    return {key: np.ascontiguousarray(value, np.float32) for key, value in weights.items()}


def write_fixture(directory, name, meta, sizes, last_blocks, seed=0):
    """Writes NAME.npz and NAME_weights.safetensors; `sizes` maps names to sides in pixels, the first gets all arrays."""
    rng = np.random.default_rng(seed)
    weights = random_weights(meta, rng)
    oracle = SwinOracle(meta, weights)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    arrays = {
        "meta_json": np.array(json.dumps(meta)),
        "out_block_window_and_shift": np.array(oracle.windows, np.int32),
        "out_relative_position_index_stage0": oracle.relative_position_index(oracle.windows[0][0]).astype(np.int32),
    }
    for index, (size, side) in enumerate(sizes.items()):
        arrays[f"in_{size}"] = draw(2, 3, side, side)
        out = oracle.forward(arrays[f"in_{size}"], last_blocks)
        kept = out if index == 0 else {key: out[key] for key in ("region", "pooled", f"linear_last{last_blocks}")}
        arrays |= {f"out_{size}_{key}": value.astype(np.float32) for key, value in kept.items()}
    if "mc" in meta:
        mc = meta["mc"]
        for kind, count in (("global", 2), ("local", mc["n_local"])):
            side = mc[f"{kind}_px"]
            arrays[f"in_mc_{kind}"] = draw(count, mc["batch"], 3, side, side)
        crops = [oracle.forward(crop, 1) for kind in ("global", "local") for crop in arrays[f"in_mc_{kind}"]]
        rows = lambda parts: np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float32)
        arrays["out_mc_cls_logits"] = rows([oracle.head(crop["pooled"], "head") for crop in crops])
        arrays["out_mc_region_logits"] = rows([oracle.head(crop["region"], "head_dense") for crop in crops])
        arrays["out_mc_region_feats"] = rows([crop["region"] for crop in crops])
        arrays["out_mc_npatch"] = np.array([crops[0]["region"].shape[1], crops[-1]["region"].shape[1]], np.int32)
    np.savez(directory / f"{name}.npz", **arrays)
    save_file(weights, directory / f"{name}_weights.safetensors")
