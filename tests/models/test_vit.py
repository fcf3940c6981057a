"""The vision transformer: intermediates by name, options by their equations, position tables, stochastic depth."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from PIL import Image

from cmd_jax.models.layers import drop_path, keep_factors, rounded_product
from cmd_jax.models.sizes import VIT_SIZES
from cmd_jax.models.vit import ViT, bicubic_matrix, resample_positions
from tests.conftest import normal, quick


def _vit(**options):
    return ViT(**{"patch_size": 8, "width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 64, "table_px": 32} | options)


@pytest.fixture(scope="module")
def params():
    return quick(_vit().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_intermediates_have_their_names_and_shapes(params, size):
    out = quick(_vit().apply)(params, normal(1, 2, *size, 3))
    patches = size[0] * size[1] // 64
    assert out["cls_token"].shape == (2, 16)
    assert out["patch_tokens"].shape == (2, patches, 16)
    assert out["attention"].shape == (2, 2, patches + 1, patches + 1)
    np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
    assert len(out["blocks"]) == 3
    np.testing.assert_array_equal(out["blocks"][-1][:, 0], out["cls_token"])


def test_patches_are_row_major_in_their_places(params):
    # A model of no depth mixes nothing: only the touched patch may change.
    model = ViT(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=64, table_px=32)
    still = jax.tree.map(jnp.zeros_like, params["params"]["blocks_0"])  # a block whose branches add nothing
    weights = {"params": {key: value for key, value in params["params"].items() if "blocks" not in key} | {"blocks_0": still}}
    images = np.zeros((1, 32, 32, 3), np.float32)
    touched = images.copy()
    touched[0, 8:16, 24:32] = np.random.default_rng(0).normal(size=(8, 8, 3))  # row 1, column 3 of a 4 x 4 grid
    apply = quick(model.apply)
    before, after = (np.asarray(apply(weights, x)["patch_tokens"][0]) for x in (images, touched))
    assert np.flatnonzero(np.any(before != after, axis=-1)).tolist() == [7]


def test_an_image_that_does_not_divide_is_refused(params):
    with pytest.raises(ValueError, match="30x32 px does not divide into patches of 8"):
        _vit().apply(params, jnp.zeros((1, 30, 32, 3)))


@pytest.mark.parametrize("rule", ["dino", "size", "antialiased", "esvit"])
def test_resampling_keeps_matching_and_constant_tables(rule):
    table = jax.random.normal(jax.random.key(0), (49, 3))
    assert resample_positions(table, (7, 7), rule) is table
    np.testing.assert_allclose(resample_positions(jnp.ones((49, 3)), (4, 9), rule), 1, rtol=1e-6)


def test_bicubic_by_hand():
    # Half a pixel between two of four: A = -0.75 gives (-3/32, 19/32, 19/32, -3/32).
    row = bicubic_matrix(4, 1, 0.25)[0]
    np.testing.assert_allclose(row, np.array([-3, 19, 19, -3]) / 32)


@pytest.mark.parametrize("grid", [(4, 9), (5, 2), (16, 16)])
def test_antialiased_resampling_is_pillows(grid):
    table = normal(0, 49, 3)
    channels = [Image.fromarray(channel.reshape(7, 7)).resize(grid[::-1], Image.Resampling.BICUBIC) for channel in table.T]
    expected = np.stack([np.asarray(channel).reshape(-1) for channel in channels], axis=-1)
    np.testing.assert_allclose(resample_positions(table, grid, "antialiased"), expected, atol=2e-6)


def test_size_rule_scales_by_the_patches():
    # Patch 6 of 14 lies at 2.75 of 7: taps at distances 1.75, 0.75, 0.25 and 1.25.
    expected = np.zeros((7, 1))
    expected[1:5, 0] = np.array([-9, 67, 225, -27]) / 256
    table = np.repeat(np.eye(7, dtype=np.float32), 7, axis=0)  # of each point its row
    np.testing.assert_allclose(resample_positions(table, (14, 1), "size")[6][:, None], expected, atol=1e-7)


def test_bfloat16_activations_keep_float32_parameters_and_attention(params):
    out = quick(_vit(dtype=jnp.bfloat16).apply)(params, jnp.ones((1, 32, 32, 3)))
    assert out["patch_tokens"].dtype == jnp.bfloat16
    assert out["attention"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_rounded_products_and_their_gradients():
    x, kernel, slope = (np.asarray(normal(seed, *shape)) for seed, shape in ((0, (2, 3, 8)), (1, (8, 5)), (2, (2, 3, 5))))
    product, gradients = jax.vjp(lambda x, kernel: rounded_product(x, kernel, jnp.bfloat16), x, kernel)
    rounded = lambda array: array.astype(jnp.bfloat16).astype(np.float64)
    expected = (
        np.einsum("bnd,df->bnf", rounded(x), rounded(kernel)),
        np.einsum("bnf,df->bnd", rounded(slope), rounded(kernel)),
        np.einsum("bnd,bnf->df", rounded(x), rounded(slope)),
    )
    for found, wanted in zip((product, *gradients(slope)), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_linear_layers_of_all_blocks_round(params):
    images, model = normal(1, 2, 32, 32, 3), _vit(product_dtype=jnp.bfloat16)
    rounded, exact = (quick(network.apply)(params, images)["patch_tokens"] for network in (model, _vit()))
    np.testing.assert_allclose(rounded, exact, atol=5e-2)
    assert str(jax.make_jaxpr(model.apply)(params, images)).count("= custom_vjp_call") == 3 * len(("qkv", "proj", "fc1", "fc2"))


def test_drop_path_keeps_the_mean():
    segments = ((2, 3), (1, 4))
    keys = jax.random.split(jax.random.key(0), 10_000)
    factors = keep_factors(keys, 0.25, segments, 0)
    assert factors.shape == (10_000, 10, 1)
    dropped = drop_path(jnp.ones((10_000, 10, 2)), factors)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(dropped[..., 0], dropped[..., 1])
    sequences = [dropped[:, :3], dropped[:, 3:6], dropped[:, 6:]]
    for sequence in sequences:
        np.testing.assert_array_equal(sequence, np.broadcast_to(sequence[:, :1], sequence.shape))
    assert np.any(sequences[0][:, 0] != sequences[1][:, 0])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=4 * np.sqrt(1 / 3 / 30_000))
    # a segment on its own draws what it draws beside the others
    np.testing.assert_array_equal(keep_factors(keys, 0.25, segments[1:], 1), factors[:, 6:])
    assert drop_path(dropped, None) is dropped


def test_stochastic_depth_is_drawn_in_training_alone(params):
    model, images = _vit(drop_path_rate=0.9), normal(1, 4, 32, 32, 3)
    still = quick(model.apply)(params, images)["cls_token"]
    np.testing.assert_array_equal(still, quick(_vit().apply)(params, images)["cls_token"])
    draw = quick(lambda keys: model.apply(params, (images[:, None],), keys, method="encode")[0]["cls_token"])
    drawn = [draw(jax.random.split(jax.random.key(k), len(images))) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])


OPTIONS = {
    "plain": {"registers": 2},
    "DINOv3": {
        "registers": 2,
        "positions": "rotary",
        "layer_scale": True,
        "gated_mlp": True,
        "activation": "silu",
        "qkv_bias": "qv",
    },
    "CLIP": {"pre_norm": True, "activation": "quick_gelu", "resample_rule": "antialiased", "layer_norm_eps": 1e-5},
    "no class token": {
        "class_token": False,
        "registers": 3,
        "positions": "all",
        "resample_rule": "size",
        "activation": "gelu_tanh",
        "qkv_bias": "none",
        "mlp_dim": 24,
    },
}


def _wide(params):
    """Parameters drawn anew, so that none is 0, 1 or small: as a trained network's could be."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: (rng.normal(size=leaf.shape) / (1 if leaf.ndim < 2 else np.sqrt(leaf.shape[-2]))).astype(np.float32)
    return jax.tree.map(draw, params)


def _by_the_equations(params, image, model):
    """Tokens of one image [height, width, 3] after the final norm, in float64, head by head and pair by pair."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    width, heads = model.width, model.num_heads
    grid, channels = (image.shape[0] // 8, image.shape[1] // 8), width // heads

    def norm(x, of):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + model.layer_norm_eps) * of["scale"] + of["bias"]

    activate = {
        "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
        "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }[model.activation]
    linear = lambda x, of: x @ of["kernel"] + of.get("bias", 0)
    squares = [image[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].reshape(-1) for r, c in np.ndindex(*grid)]
    kernel = {"kernel": params["patch_embed"]["kernel"].reshape(-1, width)}
    tokens = linear(np.array(squares), params["patch_embed"] | kernel)
    special = np.concatenate([params[name][0] for name in ("cls_token", "register_tokens") if name in params])
    if model.positions == "all":
        tokens = np.concatenate([special, tokens]) + params["pos_embed"][0]
    elif model.positions == "class_patches":
        table = params["pos_embed"][0]
        tokens = np.concatenate([special[:1] + table[:1], special[1:], tokens + table[1:]])
    else:
        tokens = np.concatenate([special, tokens])

    def turned(x):  # [channels] of every token; DINOv3's rotation of the pair (i, i + channels / 2)
        x = x.copy()
        for patch, place in enumerate(np.ndindex(*grid), len(special)):
            centre = [2 * (at + 0.5) / side - 1 for at, side in zip(place, grid, strict=True)]
            for pair in range(channels // 2):
                axis, k = divmod(pair, channels // 4)
                angle = 2 * np.pi * centre[axis] / 100 ** (4 * k / channels)
                other = pair + channels // 2
                first, second = x[patch, pair], x[patch, other]
                x[patch, pair] = first * np.cos(angle) - second * np.sin(angle)
                x[patch, other] = second * np.cos(angle) + first * np.sin(angle)
        return x

    if model.pre_norm:
        tokens = norm(tokens, params["norm_pre"])
    for index in range(model.depth):
        block = params[f"blocks_{index}"]
        qkv = block["attn"]["qkv"]
        if model.qkv_bias == "qv":
            qkv = qkv | {"bias": qkv["bias"] * np.repeat([1, 0, 1], width)}
        packed, mixed = linear(norm(tokens, block["norm1"]), qkv), np.zeros_like(tokens)
        for head in range(heads):
            part = slice(head * channels, (head + 1) * channels)
            q, k, v = (packed[:, kind * width : (kind + 1) * width][:, part] for kind in range(3))
            if model.positions == "rotary":
                q, k = turned(q), turned(k)
            weights = np.exp(q @ k.T / np.sqrt(channels))
            mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ v
        tokens = tokens + linear(mixed, block["attn"]["proj"]) * block.get("ls1", 1)
        x, mlp = norm(tokens, block["norm2"]), block["mlp"]
        hidden = (
            activate(linear(x, mlp["gate"])) * linear(x, mlp["fc1"]) if model.gated_mlp else activate(linear(x, mlp["fc1"]))
        )
        tokens = tokens + linear(hidden, mlp["fc2"]) * block.get("ls2", 1)
    return norm(tokens, params["norm"])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_computes_its_equation(name):
    model = _vit(**OPTIONS[name])
    images = normal(1, 2, 16 if name == "DINOv3" else 32, 32, 3)
    params = _wide(quick(model.init)(jax.random.key(0), images))
    out = quick(model.apply)(params, images)
    expected = np.stack([_by_the_equations(params, image, model) for image in images])
    np.testing.assert_allclose(out["blocks"][-1], expected, atol=2e-5 * np.abs(expected).max())
    before = model.class_token + model.registers
    np.testing.assert_array_equal(out["patch_tokens"], out["blocks"][-1][:, before:])
    assert out["attention"].shape[-1] == before + images.shape[1] * images.shape[2] // 64
    assert ("cls_token" in out) == model.class_token
    assert ("positions" in out) == (model.positions != "rotary")


def test_a_masked_key_bias_is_neither_read_nor_trained():
    model, images = _vit(**OPTIONS["DINOv3"]), normal(1, 1, 16, 16, 3)
    params = _wide(quick(model.init)(jax.random.key(0), images))
    loss = quick(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(model.apply(params, images)["patch_tokens"]))))
    value, gradient = loss(params)
    bias = np.asarray(gradient["params"]["blocks_0"]["attn"]["qkv"]["bias"]).reshape(3, 16)
    np.testing.assert_array_equal(bias[1], 0)
    assert np.all(bias[[0, 2]] != 0)
    params["params"]["blocks_0"]["attn"]["qkv"]["bias"][16:32] = 7
    assert loss(params)[0] == value


def _total(params, model, groups, first=0):
    named = model.apply(params, groups, jax.random.split(jax.random.key(2), 2), first, method="encode")
    return sum(jnp.sum(jnp.sin(one["patch_tokens"])) for one in named), named


EVERYTHING = OPTIONS["DINOv3"] | {"class_token": False, "pre_norm": True}


@functools.cache
def _alone(options):
    """Two sizes of views: (function, model, parameters, views), and what each size gives alone: (value, outputs, gradient)."""
    everything = options == "everything"
    model = _vit(drop_path_rate=0.5, **(EVERYTHING if everything else OPTIONS["plain"]))
    groups = (normal(2, 2, 2, 32, 32, 3), normal(3, 2, 3, 16, 16, 3))
    params = quick(lambda: model.init(jax.random.key(0), groups, method="encode"))()
    params = _wide(params) if everything else params
    run = quick(jax.value_and_grad(_total, has_aux=True), static_argnums=(1, 3))
    (first_value, first), first_gradient = run(params, model, groups[:1])
    (second_value, second), second_gradient = run(params, model, groups[1:], 1)
    gradient = jax.tree.map(np.add, *jax.device_get((first_gradient, second_gradient)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    return (run, model, params, groups), (first_value + second_value, (*first, *second), gradient)


@pytest.mark.parametrize(
    ("options", "remat", "scan_blocks"),
    [("plain", "none", True), ("plain", "full", False), ("everything", "none", False), ("everything", "dots", True)],
)
def test_packed_views_give_what_each_gives_alone(options, remat, scan_blocks):
    (run, model, params, groups), (expected_value, expected, expected_gradient) = _alone(options)
    (value, together), gradient = run(params, model.clone(scan_blocks=scan_blocks, remat=remat), groups)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
    jax.tree.map(close, together, expected)
    jax.tree.map(close, gradient, expected_gradient)


def test_rematerialised_blocks_keep_nothing_quadratic(params, capsys):
    images, saved = normal(1, 1, 32, 32, 3), {}
    for remat in ("none", "dots", "full"):
        model = _vit(remat=remat)
        loss = lambda params, model=model: jnp.sum(model.apply(params, images)["patch_tokens"])
        print_saved_residuals(loss, params)
        saved[remat] = capsys.readouterr().out
    quadratic = {remat: "17,17]" in text for remat, text in saved.items()}
    assert quadratic == {"none": True, "dots": False, "full": False}
    mlp = {remat: "17,64]" in text for remat, text in saved.items()}
    assert mlp == {"none": True, "dots": True, "full": False}


@pytest.mark.parametrize(("name", "millions"), [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)])
def test_sizes_have_the_parameters_of_the_references(name, millions):
    size = VIT_SIZES[name]
    model = ViT(16, size.width, size.depth, size.heads, 4 * size.width, table_px=224)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("frozen", "scan_blocks"), [(1, False), (2, True), (3, False)])
def test_frozen_blocks_get_no_gradient(params, frozen, scan_blocks):
    params, model, images = params["params"], _vit(scan_blocks=scan_blocks), normal(1, 2, 16, 16, 3)
    total = lambda params, model: jnp.sum(jnp.square(model.apply({"params": params}, images)["patch_tokens"]) * jnp.arange(16))
    run = quick(jax.value_and_grad(total), static_argnums=1)
    value, gradients = run(params, model.clone(frozen_blocks=frozen))
    plain, expected = run(params, model)
    assert value == plain
    for name in gradients:
        number = int(name.removeprefix("blocks_")) if name.startswith("blocks_") else 3 if name == "norm" else -1
        rests = number < frozen
        wanted = jax.tree.map(jnp.zeros_like, expected[name]) if rests else expected[name]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), gradients[name], wanted)
