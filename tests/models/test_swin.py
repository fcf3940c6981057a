"""Swin: windows and shifts, padding against loops written from the definition, intermediates, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.sizes import SWIN_SIZES
from cmd_jax.models.swin import (
    PatchMerging,
    Swin,
    WindowAttention,
    block_windows,
    from_windows,
    relative_position_bias,
    to_windows,
)
from tests.conftest import normal, quick


def _swin(**options):
    return Swin(width=8, depths=(2, 1, 2), num_heads=(1, 2, 2), window=3, table_px=48, **options)


@pytest.fixture(scope="module")
def params():
    return quick(_swin().init)(jax.random.key(0), jnp.zeros((1, 48, 48, 3)))


@pytest.mark.parametrize("size", [(48, 48), (36, 20)])
def test_intermediates_have_their_names_and_shapes(params, size):
    out = quick(_swin().apply)(params, normal(1, 2, *size, 3))
    rows, columns = size[0] // 4, size[1] // 4
    sides = [(rows, columns)]
    for _ in range(2):
        sides.append(tuple(-(-side // 2) for side in sides[-1]))
    tokens = [a * b for a, b in sides]
    assert [block.shape for block in out["blocks"]] == [
        (2, tokens[0], 8),
        (2, tokens[0], 8),
        (2, tokens[1], 16),
        (2, tokens[2], 32),
        (2, tokens[2], 32),
    ]
    assert [stage.shape[1:] for stage in out["stages"]] == [(tokens[1], 16), (tokens[2], 32), (tokens[2], 32)]
    np.testing.assert_array_equal(out["patch_tokens"], out["blocks"][-1])
    assert out["embedded"].shape == (2, tokens[0], 8)
    np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
    assert "cls_token" not in out


def test_windows_and_shifts_follow_the_configured_size():
    assert block_windows(56, (2, 2, 6, 2), 7) == ((7, 0), (7, 3)) * 5 + ((7, 0),) * 2
    # window 14: the third stage's side is the window, the last stage's clamps it
    assert block_windows(56, (2, 2, 6, 2), 14) == ((14, 0), (14, 7)) * 2 + ((14, 0),) * 6 + ((7, 0),) * 2
    assert block_windows(8, (1, 1, 2, 2), 7) == ((7, 0), (4, 0), (2, 0), (2, 0), (1, 0), (1, 0))


def test_relative_positions_are_query_minus_key():
    index = relative_position_bias(np.arange(25, dtype=np.float32)[:, None], 3)[0]  # entries are their rows
    # query (2, 1), key (0, 2): dy = 2, dx = -1
    assert index[2 * 3 + 1, 0 * 3 + 2] == (2 + 2) * 5 + (-1 + 2)
    np.testing.assert_array_equal(np.diag(index), 2 * 5 + 2)


def test_windows_are_row_major_and_come_back():
    grid = np.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    windows = to_windows(grid, 2)
    assert windows.shape == (12, 4, 1)
    np.testing.assert_array_equal(windows[1, :, 0], [2, 3, 8, 9])
    np.testing.assert_array_equal(from_windows(windows, 2, 4, 6), grid)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 7), (3, 2)])
def test_window_attention_equals_the_loops_of_its_definition(rows, columns, shift):
    window, width = 4, 6
    module = WindowAttention(num_heads=1, window=window, shift=shift)
    grid = np.random.default_rng(0).normal(size=(1, rows, columns, width)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), grid)["params"]
    weights = jax.tree.map(lambda x: normal(x.size, *x.shape) * 0.5, shapes)
    actual, _ = quick(module.apply)({"params": weights}, grid)

    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    height, breadth = -(-rows // window) * window, -(-columns // window) * window
    padded = np.zeros((height, breadth, width))
    padded[:rows, :columns] = grid[0]
    q, k, v = np.split(padded @ weights["qkv"]["kernel"] + weights["qkv"]["bias"], 3, axis=-1)
    table = weights["relative_position_bias_table"][:, 0].reshape(2 * window - 1, 2 * window - 1)

    def place(y, x):
        """Where a token lies after the cyclic shift, and whether it came round to the other side."""
        return ((y - shift) % height, (x - shift) % breadth), (y < shift, x < shift)

    for y in range(rows):
        for x in range(columns):
            (own_y, own_x), own_round = place(y, x)
            logits, values = [], []
            for other_y in range(height):
                for other_x in range(breadth):
                    (key_y, key_x), key_round = place(other_y, other_x)
                    if (own_y // window, own_x // window) != (key_y // window, key_x // window):
                        continue
                    bias = table[own_y - key_y + window - 1, own_x - key_x + window - 1]
                    logit = q[y, x] @ k[other_y, other_x] / np.sqrt(width) + bias
                    logits.append(logit - (100.0 if own_round != key_round else 0.0))
                    values.append(v[other_y, other_x])
            probs = np.exp(np.array(logits) - np.max(logits))
            mixed = (probs / probs.sum()) @ np.array(values)
            expected = mixed @ weights["proj"]["kernel"] + weights["proj"]["bias"]
            np.testing.assert_allclose(actual[0, y, x], expected, atol=1e-5)


def test_merging_orders_corners_and_pads_odd_maps():
    grid = np.random.default_rng(0).normal(size=(1, 3, 3, 2)).astype(np.float32)
    module = PatchMerging()
    weights = module.init(jax.random.key(0), grid)
    merged = module.apply(weights, grid)
    kernel = np.asarray(weights["params"]["reduction"]["kernel"])
    corners = np.concatenate([grid[0, 0, 2], grid[0, 1, 2], [0, 0], [0, 0]])
    normal = (corners - corners.mean()) / np.sqrt(corners.var() + 1e-6)
    assert merged.shape == (1, 2, 2, 4)
    np.testing.assert_allclose(merged[0, 0, 1], normal @ kernel, atol=1e-5)


def test_bfloat16_activations_keep_float32_parameters_and_attention(params):
    out = quick(_swin(dtype=jnp.bfloat16).apply)(params, jnp.ones((1, 36, 36, 3)))
    assert out["patch_tokens"].dtype == jnp.bfloat16
    assert out["attention"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_linear_layers_of_all_blocks_round(params):
    images, model = normal(1, 2, 48, 48, 3), _swin(product_dtype=jnp.bfloat16)
    rounded, exact = (quick(network.apply)(params, images)["patch_tokens"] for network in (model, _swin()))
    np.testing.assert_allclose(rounded, exact, atol=5e-2)
    blocks, mergings = sum(model.depths), len(model.depths) - 1
    assert str(jax.make_jaxpr(model.apply)(params, images)).count("= custom_vjp_call") == 4 * blocks + mergings


def test_stochastic_depth_is_drawn_in_training_alone(params):
    model, images = _swin(drop_path_rate=0.9), normal(1, 4, 48, 48, 3)
    still = quick(model.apply)(params, images)["patch_tokens"]
    np.testing.assert_array_equal(still, quick(_swin().apply)(params, images)["patch_tokens"])
    run = quick(lambda keys: model.apply(params, images, keys)["patch_tokens"])
    drawn = [run(jax.random.split(jax.random.key(k), len(images))) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])
    assert np.any(drawn[0] != still)


@pytest.mark.parametrize(("name", "millions"), [("swin_tiny", 27.5), ("swin_small", 48.8), ("swin_base", 86.7)])
def test_sizes_have_the_parameters_of_the_references(name, millions):
    model = Swin(*SWIN_SIZES[name], window=7, table_px=224)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.05)


def _gradient(params, **options):
    model, images = _swin(drop_path_rate=0.5, **options), normal(1, 2, 48, 48, 3)
    keys = jax.random.split(jax.random.key(2), 2)
    loss = lambda params: jnp.sum(jnp.sin(model.apply(params, images, keys)["patch_tokens"]))
    return quick(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def gradient(params):
    return _gradient(params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialised_blocks_give_the_same_gradients(params, gradient, remat):
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))
    jax.tree.map(close, _gradient(params, remat=remat), gradient)
