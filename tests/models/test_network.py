"""Heads, MIL scorer and pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.method import mil
from cmd_jax.method.logits import l2_normalize
from cmd_jax.models.heads import BatchStatisticsNorm, ProjectionHead, Prototypes
from cmd_jax.models.network import Network
from cmd_jax.models.swin import Swin
from cmd_jax.models.vit import ViT
from tests.conftest import normal, quick


def _network(**options):
    defaults = {
        "backbone": ViT(patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=64, table_px=16),
        "image_pool": "mil",
        "prototypes": 12,
        "bottleneck_dim": 8,
        "hidden_dim": 16,
        "head_layers": 3,
        "head_batch_norm": False,
        "learned_gain": False,
        "share_prototypes": False,
        "mil_hidden_dim": 8,
        "mil_temp": 1.0,
    }
    return Network(**(defaults | options))


def _encode(network):
    images = normal(1, 3, 16, 16, 3)
    params = quick(lambda: network.init(jax.random.key(0), images, method="initialise"))()
    return params, quick(network.apply)(params, images)


@pytest.mark.parametrize("pool", ["cls", "mean", "mil+cls", "cls+mean+mil"])
def test_pools_and_shapes(pool):
    params, out = _encode(_network(image_pool=pool))
    np.testing.assert_allclose(out.mil_weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(out.image_z, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(out.region_z, axis=-1), 1, rtol=1e-5)
    assert out.region_z.shape == (3, 4, 8)
    tokens, weights = np.asarray(out.patch_tokens), np.asarray(out.mil_weights)
    parts = {
        "mil": np.einsum("bn,bnd->bd", weights, tokens),
        "mean": tokens.mean(1),
        "cls": np.asarray(out.backbone["cls_token"]),
    }
    expected = np.concatenate([parts[name] for name in pool.split("+")], axis=-1)
    assert out.image_embedding.dtype == jnp.float32
    assert params["params"]["image_head"]["mlp_0"]["kernel"].shape == (expected.shape[-1], 16)
    np.testing.assert_allclose(out.image_embedding, expected, atol=1e-5)


@pytest.mark.parametrize(("scoring", "heads"), [("gated", 1), ("attention", 2), ("mean", 1)])
def test_scorers_weigh_patches_by_their_equation(scoring, heads):
    network = _network(mil_scoring=scoring, mil_temp=0.5, mil_heads=heads)
    params, out = _encode(network)
    tokens, weights = np.asarray(out.patch_tokens, np.float64), np.asarray(out.mil_weights)
    scorer = params["params"].get("mil_scorer", {})
    names = {
        "gated": {"tanh_kernel", "sigmoid_kernel", "out_kernel"},
        "attention": {"tanh_kernel", "out_kernel"},
        "mean": set(),
    }
    assert set(scorer) == names[scoring]
    assert ("mil_scorer" in params["params"]) == bool(scorer)
    scores = np.zeros((tokens.shape[0], heads, tokens.shape[1]))
    for b, h, i in np.ndindex(*scores.shape if scorer else (0, 0, 0)):
        hidden = np.tanh(tokens[b, i] @ scorer["tanh_kernel"])
        if scoring == "gated":
            hidden /= 1 + np.exp(-(tokens[b, i] @ scorer["sigmoid_kernel"]))
        scores[b, h, i] = hidden @ scorer["out_kernel"][:, h] / 0.5
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected.mean(1), rtol=1e-5)
    bags = np.concatenate([np.einsum("bn,bnd->bd", expected[:, h], tokens) for h in range(heads)], axis=1)
    np.testing.assert_allclose(out.bag, bags, atol=1e-5)
    np.testing.assert_array_equal(out.image_embedding, out.bag)
    if scoring == "mean":
        np.testing.assert_array_equal(weights, np.float32(0.25))
        np.testing.assert_allclose(out.image_embedding, tokens.mean(1), atol=1e-5)
    again = network.apply(params, out.patch_tokens, method="score_patches")
    np.testing.assert_array_equal(again, weights)


def test_levels_may_share_one_head():
    params, out = _encode(_network(image_pool="mean", share_mlp=True))
    assert "region_head" not in params["params"]
    head = ProjectionHead(16, 8)
    of = quick(lambda x: head.apply({"params": params["params"]["image_head"]}, x))
    np.testing.assert_allclose(out.image_z, of(out.image_embedding), atol=1e-6)
    np.testing.assert_allclose(out.region_z, of(out.patch_tokens), atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "packed", "swin"])
def test_masked_patches_are_the_token_and_nothing_else(kind):
    """Whatever they show; of a Swin, all patches within one of the last stage. Other views stay."""
    swin = Swin(width=8, depths=(1, 1), num_heads=(1, 1), window=2, table_px=24)
    backbone = {"backbone": swin} if kind == "swin" else {}
    network = _network(image_pool="mean", mask_token=True, packed_views=kind == "packed", **backbone)
    groups, side = (normal(1, 2, 2, 24, 24, 3), normal(2, 2, 1, 8, 8, 3)), 3
    start = quick(lambda: network.init(jax.random.key(0), groups[0][:, 0], method="initialise"))()["params"]
    assert start["mask_token"].shape == (1, 1, 8 if kind == "swin" else 16)
    masks = np.random.default_rng(0).uniform(size=(2, 2, side * side)) < 0.4
    shown = masks.reshape(2, 2, side, side).repeat(8, axis=2).repeat(8, axis=3)[..., None]
    run = lambda params, groups, masks: network.apply({"params": params}, groups, None, masks, method="encode")
    encode = quick(run)
    seen, local = encode(start, groups, masks)
    changed, again = encode(start, (np.where(shown, 7.0, groups[0]), groups[1]), masks)
    np.testing.assert_array_equal(seen.patch_tokens, changed.patch_tokens)
    np.testing.assert_array_equal(local.patch_tokens, again.patch_tokens)
    whole, unmasked = encode(start, groups, np.zeros_like(masks))
    np.testing.assert_allclose(local.patch_tokens, unmasked.patch_tokens, atol=1e-6)
    of_image = lambda encoded: np.asarray(encoded.patch_tokens).reshape(4, -1)
    assert np.all(np.any(of_image(seen) != of_image(whole), axis=1) == masks.reshape(4, -1).any(1))
    if kind == "swin":  # where all is masked every norm sees the token alone: one of zeros would have gradients of 1e28
        gradient = quick(jax.grad(lambda params: run(params, groups, np.ones_like(masks))[0].region_z[..., 0].sum()))(start)
        assert 0 < np.abs(gradient["mask_token"]).max() < 1e4
    else:  # an image whose patches are all masked, by a token that is an embedding, is that embedding everywhere
        embed = {"kernel": np.zeros((8, 8, 3, 16), np.float32), "bias": normal(3, 16)}
        backbone = start["backbone"] | {"patch_embed": embed}
        token = start | {"backbone": backbone, "mask_token": embed["bias"][None, None]}
        np.testing.assert_allclose(
            encode(token, groups, masks)[0].patch_tokens, encode(token, groups, ~masks)[0].patch_tokens, atol=1e-6
        )


def test_the_class_token_weighs_patches_by_its_attention():
    temp = 0.25
    network = _network(mil_scoring="class_token", mil_temp=temp, image_pool="cls+mil")
    network = network.clone(backbone=network.backbone.clone(registers=2))
    params, out = _encode(network)
    assert "mil_scorer" not in params["params"]
    attention, tokens = (np.asarray(x, np.float64) for x in (out.backbone["attention"], out.patch_tokens))
    # [B, H, T, T]: from the class token, to what lies behind it and the two registers
    expected = attention[:, :, 0, 3:] ** (1 / temp)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.mil_weights, expected.mean(1), rtol=1e-5)
    bags = np.concatenate([np.einsum("bn,bnd->bd", expected[:, h], tokens) for h in range(2)], axis=1)
    np.testing.assert_allclose(out.bag, bags, atol=1e-5)
    np.testing.assert_array_equal(out.image_embedding, np.concatenate([out.backbone["cls_token"], out.bag], axis=1))
    # the bag trains the attention
    query = lambda params: jnp.sum(network.apply(params, normal(1, 3, 16, 16, 3)).bag ** 2)
    gradient = quick(jax.grad(query))(params)["params"]["backbone"]["cls_token"]
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("share", [False, True])
def test_prototypes_have_unit_rows_and_may_be_shared(share):
    network = _network(share_prototypes=share)
    params, _ = _encode(network)
    image, region = network.apply(params, method="prototype_rows")
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-6)
    assert np.array_equal(image, region) == share
    assert ("region_last_layer" in params["params"]) != share


def test_gated_attention_is_its_equation():
    rng = np.random.default_rng(0)
    h, v, u, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4), (4, 3), (4, 3), (3, 2)))
    scores, plain = mil.gated_attention_scores(h, v, u, w), mil.attention_scores(h, v, w)
    assert scores.shape == plain.shape == (2, 2, 5)
    for b in range(2):
        for i in range(5):
            gate = np.tanh(v.T @ h[b, i]) / (1 + np.exp(-(u.T @ h[b, i])))
            np.testing.assert_allclose(scores[b, :, i], w.T @ gate, rtol=2e-5, atol=1e-6)
            np.testing.assert_allclose(plain[b, :, i], w.T @ np.tanh(v.T @ h[b, i]), rtol=2e-5, atol=1e-6)
    cold, warm = (np.asarray(mil.mil_weights(scores, temp)) for temp in (0.1, 10.0))
    assert np.all(cold.max(-1) > warm.max(-1))
    np.testing.assert_array_equal(cold.argmax(-1), np.argmax(scores, -1))
    bags = np.einsum("bkn,bnd->bkd", cold, h)
    np.testing.assert_allclose(mil.bag_embedding(cold, h), bags.reshape(2, -1), rtol=1e-5, atol=1e-6)


def test_relative_entropy_equals_its_equation():
    weights = np.array([[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.7, 0.2, 0.1, 0.0]], np.float32)
    expected = [-sum(a * np.log(a) for a in row if a > 0) / np.log(4) for row in weights.astype(np.float64)]
    np.testing.assert_allclose(mil.relative_entropy(weights), expected, rtol=1e-6, atol=1e-7)


def test_l2_normalize_has_a_finite_gradient_at_zero():
    gradient = jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros(3))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(l2_normalize(jnp.zeros(3)), np.zeros(3))


def test_learned_gain_scales_the_rows():
    module = Prototypes(5, 3, learned_gain=True)
    params = module.init(jax.random.key(0))
    params["params"]["weight_g"] = jnp.arange(1.0, 6.0)[:, None]
    np.testing.assert_allclose(np.linalg.norm(module.apply(params), axis=-1), [1, 2, 3, 4, 5], rtol=1e-6)


def test_batch_statistics_take_out_what_all_inputs_share():
    x = normal(0, 6, 7, 4) * 3 + 100
    module = BatchStatisticsNorm()
    y = quick(module.apply)(quick(module.init)(jax.random.key(1), x), x)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1)), 1, atol=1e-3)
    head = ProjectionHead(8, 4, layers=2, batch_norm=True)
    z = quick(head.apply)(quick(head.init)(jax.random.key(1), x), x)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-5)
