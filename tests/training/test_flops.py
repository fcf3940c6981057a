"""What a step costs, counted in the traced program."""

import jax
import jax.numpy as jnp
import pytest

from cmd_jax import config as config_lib
from cmd_jax.training.flops import model_flops, product_flops
from tests.conftest import tiny


def test_used_products_are_counted_with_their_loops():
    def run(x, kernel):
        x @ x.T  # used by nothing
        turns, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.tanh)(x @ kernel), None), x, length=5)
        heads = jnp.einsum("bhd,bkd->bhk", turns.reshape(2, 2, 6), turns.reshape(2, 2, 6))
        image = turns.reshape(1, 4, 6, 1)
        patches = jax.lax.conv_general_dilated(
            image, jnp.ones((2, 3, 1, 7)), (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return heads, patches

    jaxpr = jax.make_jaxpr(run)(jnp.ones((4, 6)), jnp.ones((6, 6))).jaxpr
    assert product_flops(jaxpr) == 5 * 2 * 4 * 6 * 6 + 2 * 2 * 2 * 2 * 6 + 2 * (2 * 2) * (2 * 3) * 7


def _vit_flops(config, depth=2, width=96, mlp_layers=2, frozen=0, regions="all"):
    """By hand: a ViT's blocks and heads, backward twice the forward but for the first, frozen blocks and the embedding before
    them, the teacher forward alone on the global views. Fitting the position table to the local views is left out."""
    head, views = config.head, config.views

    def forward(side, regions):
        patches = (side // 8) ** 2
        tokens = 1 + patches
        linear = 2 * tokens * (4 * width**2 + mlp_layers * width * config.model.mlp_dim)  # qkv, proj and MLP
        block = linear + 2 * 2 * tokens**2 * width  # logits and mixing
        mlp = 2 * (width * head.hidden_dim + head.hidden_dim**2 + head.hidden_dim * head.bottleneck_dim)
        mil = 2 * patches * (2 * width + 1) * config.method.mil_hidden_dim if regions == "all" else 0
        bag = 2 * patches * width if regions == "all" else 0
        rows = 1 + patches * (regions != "none")
        logits = 2 * rows * head.bottleneck_dim * head.prototypes
        embed = 2 * patches * 3 * 8**2 * width
        resting = embed + frozen * block if frozen else 0
        return embed + depth * block + rows * mlp + mil + bag + logits, resting

    (whole, resting) = forward(views.global_px, regions)
    (local, local_resting) = forward(views.local_px, "none" if regions == "global" else regions)
    student = 2 * whole + views.local_count * local
    return 2 * whole + 3 * student - 2 * (2 * resting + views.local_count * local_resting)


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_step_flops_equal_those_by_hand(scan_blocks, monkeypatch):
    # PJRT plugins (CUDA, TPU) do not say what a lowered program costs.
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda _: None)
    config = tiny()
    config.views.local_count = 2
    config.model.scan_blocks = scan_blocks
    config.model.update(dtype="bfloat16", attention="cudnn")
    config = config_lib.resolve(config, 16)
    assert model_flops(config) == pytest.approx(_vit_flops(config), rel=5e-4)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"model.gated_mlp": True, "model.mlp_dim": 200}, {"mlp_layers": 3}),
        ({"init.freeze_blocks": 1}, {"frozen": 1}),
        ({"init.freeze_blocks": 2}, {"frozen": 2}),
        ({"method.name": "dino"}, {"regions": "none"}),
        ({"method.name": "ibot"}, {"regions": "global"}),
    ],
    ids=["gated", "first block frozen", "all blocks frozen", "no regions", "regions of global views"],
)
def test_options_count_as_by_hand(options, by_hand):
    config = tiny()
    config.views.local_count = 2
    config.update_from_flattened_dict(options)
    config = config_lib.resolve(config, 16)
    assert model_flops(config) == pytest.approx(_vit_flops(config, **by_hand), rel=5e-4)
