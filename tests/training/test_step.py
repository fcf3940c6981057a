"""One true step and what it must not do: leak, or drift with the device count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.config import Hardware
from cmd_jax.data.loader import Batch
from cmd_jax.models.build import make_network
from cmd_jax.training import step as step_lib
from cmd_jax.training.optimizer import adamw, make_groups
from cmd_jax.training.run import GPU_COMPILER_OPTIONS, build_run
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.state import init_state
from cmd_jax.training.step import encode_views, make_train_step
from tests.conftest import quick, tiny

IMAGES = 16
TERMS = ("intra_image", "intra_region", "inter_student", "inter_teacher")
_BUILT = {}


def _batch(size=8, canvas=32):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, canvas, canvas, 3), dtype=np.uint8)
    return Batch(pixels, np.full((size, 2), canvas, np.int32), np.arange(size, dtype=np.int32))


def _lower(config):
    """The initial state as a function, and the lowered step of a resolved configuration. None scatters: scatters with repeated
    indices add up in no fixed order on GPUs, and one by one on TPUs."""
    network, optimizer = make_network(config), adamw(config.optim.clip_grad, make_groups(config, 1))
    init = lambda: init_state(config, network, optimizer, IMAGES)
    step = make_train_step(config, network, optimizer, make_schedules(config, IMAGES))
    lowered = quick(step).lower(jax.eval_shape(init), _batch())
    assert "scatter" not in lowered.as_text()
    return init, lowered


def _setup(config):
    """State before the first step, and the compiled step; of equal configurations they are the same objects."""
    config = config_lib.resolve(config, IMAGES)
    key = config.to_json()
    if key not in _BUILT:
        init, lowered = _lower(config)
        _BUILT[key] = quick(init)(), lowered.compile()
    return _BUILT[key]


def _assert_finite(metrics):
    assert all(np.isfinite(float(value)) for value in metrics.values())


@pytest.fixture
def multi_crop():
    """With local views, for a test that they matter to."""
    return _multi_crop()


def _multi_crop():
    config = tiny()
    config.views.local_count = 2
    config.model.drop_path = 0.5
    return config


def _moved(before, after):
    """Top-level names of the parameters that changed."""
    return {
        name
        for name in before
        if any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True))
    }


@pytest.mark.parametrize("method", config_lib.METHODS)
def test_a_step_moves_the_student_then_the_teacher(multi_crop, method):
    multi_crop.method.name = method
    if method not in ("cmd", "ibot", "cmd_relation"):
        multi_crop.views.local_count = 0  # the others differ in terms and weights of the objective alone
    state, step = _setup(multi_crop)
    states = [state]
    for _ in range(3):
        state, metrics = step(state, _batch())
        states.append(state)
    _assert_finite(metrics)
    assert "loss_koleo" not in metrics
    assert int(state.step) == 3
    used = {"backbone"}
    if method != "cmd_relation":
        used |= {"image_head", "image_last_layer"}
    if method == "ibot":
        used |= {"mask_token"}
        assert not {"region_head", "region_last_layer"} & set(state.student)
    elif method != "dino":
        used |= {"region_head", "region_last_layer"}
    if method.startswith("cmd"):
        used |= {"mil_scorer"}
    frozen = {"image_last_layer", "region_last_layer"}
    # the learning rate of the first step is 0, and the last layer is frozen in it
    assert not _moved(states[0].student, states[1].student)
    moved = _moved(states[0].student, states[2].student)
    assert used <= moved | frozen
    assert used <= _moved(states[0].student, states[3].student)
    # teacher = m teacher + (1 - m) student, with the momentum that was logged
    m = float(metrics["teacher_momentum"])
    for old, new, student in zip(*map(jax.tree.leaves, (states[2].teacher, states[3].teacher, states[3].student)), strict=True):
        np.testing.assert_allclose(new, m * old + (1 - m) * student, atol=1e-6)


@pytest.mark.parametrize("method", ["cmd", "ibot"])
def test_randomness_in_the_network_is_the_students(multi_crop, monkeypatch, method):
    """Stochastic depth, and iBOT's masks."""
    multi_crop.method.name = method
    config = config_lib.resolve(multi_crop, IMAGES)
    drawn = []

    def record(network, params, groups, drop_keys, masks=None):
        drawn.append(([group.shape[1] for group in groups], drop_keys is not None, masks is not None))
        return encode_views(network, params, groups, drop_keys, masks)

    monkeypatch.setattr(step_lib, "encode_views", record)
    _lower(config)
    # the teacher's global views, then all of the student's
    assert drawn == [([2], False, False), ([2, multi_crop.views.local_count], True, method == "ibot")]


SPEED = {
    "model.packed_views": False,
    "model.scan_blocks": False,
    "model.remat": "dots",
    "method.prototype_chunk": 7,
}


def _numbers(options):
    config, numbers = _multi_crop(), []
    config.update_from_flattened_dict(options)
    resolved = config_lib.resolve(config, IMAGES)
    assert options or (resolved.model.packed_views and resolved.model.scan_blocks and resolved.model.remat == "none")
    state, step = _setup(config)
    for _ in range(3):
        state, metrics = step(state, _batch())
        numbers.append([float(metrics[key]) for key in ("loss", "grad_norm", "feature_std", "mil_entropy")])
    assert np.isfinite(numbers).all()
    return numbers


def test_how_it_is_computed_changes_no_number():
    """Against packed views and scanned blocks, with nothing rematerialised and all prototypes at once."""
    np.testing.assert_allclose(_numbers({}), _numbers(SPEED), rtol=2e-5)


def test_the_order_of_images_changes_no_number(multi_crop):
    state, step = _setup(multi_crop)
    # the learning rate of the first step is 0
    state = state._replace(step=jnp.int32(2))
    turned = Batch(*(part[::-1] for part in _batch()))
    (there, ahead), (back, behind) = step(state, _batch()), step(state, turned)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ahead[name], behind[name], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), there.teacher, back.teacher)


@pytest.mark.parametrize(
    "options",
    [
        {"method.matched_targets": "gathered", "method.koleo_weight": 0.5},
        {"method.region_matching": "location", "views.local_count": 2},
        {"model.name": "swin_micro", "model.patch_size": 4, "views.global_px": 32},
        {"method.name": "ibot", "views.local_count": 2, "init.freeze_blocks": 1, "train.accumulate": 2},
        {"method.name": "cmd_relation", "views.local_count": 2, "train.accumulate": 2},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_other_steps_scatter_nothing(options):
    """Those that no test here runs."""
    config = tiny()
    config.update_from_flattened_dict(options)
    _lower(config_lib.resolve(config, IMAGES))


def test_gpu_steps_add_up_in_a_fixed_order(tiny_config, monkeypatch):
    given = {}
    assert quick(lambda x: x + 1)(1) == jax.jit(lambda x: x + 1, compiler_options=GPU_COMPILER_OPTIONS)(1)  # known names
    for platform in ("cpu", "gpu"):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "jit", lambda _, platform=platform, **options: given.update({platform: options}))
            build_run(tiny_config, range(IMAGES), Hardware(platform))
    assert given["cpu"]["compiler_options"] is None
    assert given["gpu"]["compiler_options"]["xla_gpu_deterministic_ops"]


def test_a_bfloat16_teacher_stays_close(tiny_config):
    losses = []
    for dtype in ("float32", "bfloat16"):
        tiny_config.model.teacher_dtype = dtype
        state, step = _setup(tiny_config)
        state, metrics = step(state, _batch())
        assert {leaf.dtype.name for leaf in jax.tree.leaves((state.teacher, state.centers))} == {"float32"}
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"registers": 2, "positions": "rotary", "layer_scale": True, "gated_mlp": True, "activation": "silu", "qkv_bias": "qv"},
        {"pre_norm": True, "activation": "quick_gelu", "class_token": False, "resample_rule": "antialiased"},
    ],
    ids=["DINOv3", "CLIP without class token"],
)
def test_vits_with_options_train_in_bfloat16(tiny_config, options):
    tiny_config.model.update({"dtype": "bfloat16", "remat": "dots", **options})
    state, step = _setup(tiny_config)
    before = state.student["backbone"]
    for _ in range(3):
        state, metrics = step(state, _batch())
    _assert_finite(metrics)
    assert _moved(before, state.student["backbone"]) == set(before)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.student)} == {"float32"}


def test_a_step_follows_from_seed_step_and_images(multi_crop):
    state, step = _setup(multi_crop)
    first, again = step(state, _batch())[1], step(state, _batch())[1]
    assert float(first["loss"]) == float(again["loss"])
    later = step(state._replace(step=jnp.int32(5)), _batch())[1]
    assert float(first["loss_intra_image"]) != float(later["loss_intra_image"])


OF_THE_BATCH = {"centering": "sinkhorn", "koleo_weight": 0.25}  # one program for two tests


def test_every_term_is_added_with_its_weight(tiny_config):
    """Also the one that is off by default."""
    tiny_config.method.update(OF_THE_BATCH)
    state, step = _setup(tiny_config)
    _, metrics = step(state, _batch())
    terms = [float(metrics[f"loss_{name}"]) for name in (*TERMS, "koleo")]
    np.testing.assert_allclose(metrics["loss"], np.dot((0.5, 0.5, 1.0, 1.0, 0.25), terms), rtol=1e-5)


def test_matching_changes_the_region_term_alone(tiny_config):
    state, step = _setup(tiny_config)
    before = step(state, _batch())[1]
    tiny_config.method.region_matching = "location"
    state, step = _setup(tiny_config)
    after = step(state, _batch())[1]
    same = [np.isclose(before[f"loss_{term}"], after[f"loss_{term}"], rtol=1e-6) for term in TERMS]
    assert same == [True, False, True, True]
    _assert_finite(after)


@pytest.mark.parametrize(
    ("scorer", "pool", "parts"),
    [("attention", "cls+mean+mil", 3), ("class_token", "mil", 3), ("mean", "mil", 1)],  # three heads of the class token
)
def test_other_scorers_and_pools_train(tiny_config, scorer, pool, parts):
    tiny_config.method.update(mil_scorer=scorer, image_pool=pool)
    state, step = _setup(tiny_config)
    heads = [state.student[f"{level}_head"]["mlp_0"]["kernel"].shape[0] for level in ("image", "region")]
    assert heads[0] == parts * heads[1]
    learned = {"mil_scorer"} if scorer == "attention" else set()
    assert {"mil_scorer"} & set(state.student) == learned
    before = state
    for _ in range(2):
        state, metrics = step(state, _batch())
    _assert_finite(metrics)
    assert {"backbone", "image_head"} | learned <= _moved(before.student, state.student)
    if scorer == "mean":
        np.testing.assert_allclose(metrics["mil_entropy"], 1.0, rtol=1e-6)


def test_sinkhorn_uses_the_batch_and_no_earlier_center(tiny_config):
    tiny_config.method.update(OF_THE_BATCH)
    state, step = _setup(tiny_config)
    shifted = state._replace(centers=jax.tree.map(lambda center: center + jnp.arange(center.size), state.centers))
    (after, metrics), (_, same) = step(state, _batch()), step(shifted, _batch())
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-6)
    assert float(jnp.max(jnp.abs(after.centers.image))) > 0


def test_frozen_blocks_stay_bit_for_bit(tiny_config):
    tiny_config.init.weights, tiny_config.init.freeze_blocks, tiny_config.optim.freeze_backbone_epochs = "weights", 1, 0.0
    first, step = _setup(tiny_config)
    after = first
    for _ in range(2):
        after, metrics = step(after, _batch())
    _assert_finite(metrics)
    for name in ("student", "teacher"):
        before, now = (getattr(state, name)["backbone"] for state in (first, after))
        still = {part for part in before if all(map(np.array_equal, *map(jax.tree.leaves, (before[part], now[part]))))}
        assert still == {"cls_token", "pos_embed", "patch_embed", "blocks_0"}
