"""The vision transformer: intermediates by name, position tables, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from cmd_jax.models.layers import drop_path, keep_factors
from cmd_jax.models.sizes import VIT_SIZES
from cmd_jax.models.vit import ViT, bicubic_matrix, resample_positions
from tests.conftest import normal, quick


def _vit(**options):
    return ViT(patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=64, table_px=32, **options)


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


@pytest.mark.parametrize("rule", ["dino", "esvit"])
def test_resampling_keeps_matching_and_constant_tables(rule):
    table = jax.random.normal(jax.random.key(0), (49, 3))
    assert resample_positions(table, (7, 7), rule) is table
    np.testing.assert_allclose(resample_positions(jnp.ones((49, 3)), (4, 9), rule), 1, rtol=1e-6)


def test_bicubic_by_hand():
    # Half a pixel between two of four: A = -0.75 gives (-3/32, 19/32, 19/32, -3/32).
    row = bicubic_matrix(4, 1, 0.25)[0]
    np.testing.assert_allclose(row, np.array([-3, 19, 19, -3]) / 32)


def test_bfloat16_activations_keep_float32_parameters_and_attention(params):
    out = quick(_vit(dtype=jnp.bfloat16).apply)(params, jnp.ones((1, 32, 32, 3)))
    assert out["patch_tokens"].dtype == jnp.bfloat16
    assert out["attention"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


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


def _total(params, model, groups, first=0):
    named = model.apply(params, groups, jax.random.split(jax.random.key(2), 2), first, method="encode")
    return sum(jnp.sum(jnp.sin(one["patch_tokens"])) for one in named), named


@pytest.fixture(scope="module")
def alone():
    """Two sizes of views: (function, model, parameters, views), and what each size gives alone: (value, outputs, gradient)."""
    model = _vit(drop_path_rate=0.5, registers=2)
    groups = (normal(2, 2, 2, 32, 32, 3), normal(3, 2, 3, 16, 16, 3))
    params = quick(lambda: model.init(jax.random.key(0), groups, method="encode"))()
    run = quick(jax.value_and_grad(_total, has_aux=True), static_argnums=(1, 3))
    (first_value, first), first_gradient = run(params, model, groups[:1])
    (second_value, second), second_gradient = run(params, model, groups[1:], 1)
    gradient = jax.tree.map(np.add, *jax.device_get((first_gradient, second_gradient)))
    return (run, model, params, groups), (first_value + second_value, (*first, *second), gradient)


@pytest.mark.parametrize(("remat", "scan_blocks"), [("none", False), ("none", True), ("dots", True), ("full", False)])
def test_packed_views_give_what_each_gives_alone(alone, remat, scan_blocks):
    (run, model, params, groups), (expected_value, expected, expected_gradient) = alone
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


def test_registers_take_part_but_are_no_patches():
    images = normal(1, 2, 32, 32, 3)
    model = _vit(registers=3)
    params, apply = quick(model.init)(jax.random.key(0), images), quick(model.apply)
    out = apply(params, images)
    assert out["patch_tokens"].shape == (2, 16, 16)
    assert out["blocks"][-1].shape == (2, 1 + 3 + 16, 16)
    assert out["positions"].shape == (1, 17, 16)
    np.testing.assert_array_equal(out["blocks"][-1][:, 4:], out["patch_tokens"])
    # with equal registers their order cannot matter: no position is added to them
    equal = jax.tree.map(lambda x: x, params)
    equal["params"]["register_tokens"] = jnp.ones((1, 3, 16))
    registers = apply(equal, images)["blocks"][-1][:, 1:4]
    np.testing.assert_allclose(registers[:, 0], registers[:, 2], atol=1e-6)
    assert np.any(apply(equal, images)["cls_token"] != out["cls_token"])
