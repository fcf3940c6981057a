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
from cmd_jax.training.optimizer import adamw
from cmd_jax.training.run import GPU_COMPILER_OPTIONS, build_run
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.state import init_state
from cmd_jax.training.step import encode_views, make_train_step
from tests.conftest import quick, tiny

IMAGES = 16
_BUILT = {}


def _batch(size=8, canvas=32):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, canvas, canvas, 3), dtype=np.uint8)
    return Batch(pixels, np.full((size, 2), canvas, np.int32), np.arange(size, dtype=np.int32))


def _setup(config):
    """State before the first step, and the step; of equal configurations they are the same objects."""
    config = config_lib.resolve(config, IMAGES)
    key = config.to_json()
    if key not in _BUILT:
        network = make_network(config)
        optimizer = adamw(config.optim.clip_grad, freeze_steps=1)
        state = quick(lambda: init_state(config, network, optimizer))()
        _BUILT[key] = state, quick(make_train_step(config, network, optimizer, make_schedules(config, IMAGES)))
    return _BUILT[key]


@pytest.fixture
def multi_crop(tiny_config):
    """With local views, for a test that they matter to."""
    tiny_config.views.local_count = 2
    return tiny_config


def _moved(before, after):
    """Top-level names of the parameters that changed."""
    return {
        name
        for name in before
        if any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True))
    }


@pytest.mark.parametrize("method", config_lib.METHODS)
def test_a_step_moves_the_student_and_the_teacher_follows(multi_crop, method):
    multi_crop.method.name = method
    state, step = _setup(multi_crop)
    states = [state]
    for _ in range(3):
        state, metrics = step(state, _batch())
        states.append(state)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert int(state.step) == 3
    used = {"backbone", "image_head", "image_last_layer"}
    if method != "dino":
        used |= {"region_head", "region_last_layer"}
    if method in ("cmd", "cmd_bag"):
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


def test_stochastic_depth_is_the_students_alone(multi_crop, monkeypatch):
    multi_crop.model.drop_path = 0.9
    state, step = _setup(multi_crop)
    drawn = []

    def record(network, params, groups, drop_keys):
        drawn.append(([group.shape[1] for group in groups], drop_keys is not None))
        return encode_views(network, params, groups, drop_keys)

    monkeypatch.setattr(step_lib, "encode_views", record)
    jax.eval_shape(step, state, _batch())
    # the teacher's global views, then all of the student's
    assert drawn == [([2], False), ([2, multi_crop.views.local_count], True)]


def test_key_patch_views_look_where_the_teachers_weights_lie_and_change_no_other_view(multi_crop, monkeypatch):
    multi_crop.views.local_scale = (0.05, 0.1)
    seen = {}

    def cut(share):
        multi_crop.views.key_patch_share = share
        config = config_lib.resolve(multi_crop, IMAGES)
        network = make_network(config)
        state = init_state(config, network, adamw(3.0, 0))
        groups = quick(step_lib.make_views(config, step_lib.make_teacher(config, network)))
        return groups(state.teacher, _batch(), jax.random.key(0))

    draw = step_lib.key_points

    def record(key, index, weights, *arguments, **options):
        seen["points"] = draw(key, index, jnp.eye(4)[None, None, 3] + 0 * weights, *arguments, **options)
        jax.debug.callback(lambda points: seen.update(found=np.asarray(points)), seen["points"])
        return seen["points"]

    monkeypatch.setattr(step_lib, "key_points", record)
    ((globals_, locals_), _), taught = cut(0.0)
    assert not seen
    ((same, moved), _), again = cut(1.0)
    jax.effects_barrier()
    np.testing.assert_array_equal(globals_, same)
    np.testing.assert_array_equal(taught.views.mil_weights, again.views.mil_weights)
    assert np.isfinite(seen["found"]).all()
    assert (np.abs(np.asarray(locals_) - np.asarray(moved)).max(axis=(2, 3, 4)) > 0).mean() > 0.9


SPEED = {
    "packed_views": {"model.packed_views": True},
    "scan_blocks": {"model.scan_blocks": True},
    "remat dots": {"model.remat": "dots"},
    "remat full, scanned": {"model.remat": "full", "model.scan_blocks": True},
    "prototype_chunk": {"method.prototype_chunk": 7},
}


def _numbers(options):
    config, numbers = tiny(), []
    config.views.local_count = 2
    config.model.update(drop_path=0.5, packed_views=False, scan_blocks=False)
    config.update_from_flattened_dict(options)
    state, step = _setup(config)
    for _ in range(3):
        state, metrics = step(state, _batch())
        numbers.append([float(metrics[key]) for key in ("loss", "grad_norm", "feature_std", "mil_entropy")])
    assert np.isfinite(numbers).all()
    return numbers


@pytest.fixture(scope="module")
def plain():
    return _numbers({})


@pytest.mark.parametrize("name", SPEED)
def test_how_it_is_computed_changes_no_number(plain, name):
    np.testing.assert_allclose(plain, _numbers(SPEED[name]), rtol=2e-5)


def test_the_order_of_images_in_a_batch_changes_no_number():
    config = tiny()
    config.views.local_count = 2
    config.model.update(drop_path=0.5, packed_views=False, scan_blocks=False)
    state, step = _setup(config)
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
        *({"method.name": method, "views.local_count": 2} for method in config_lib.METHODS),
        {"method.koleo_weight": 0.5},
        {"method.matched_targets": "gathered"},
        {"method.region_matching": "location", "views.local_count": 2, "views.key_patch_share": 0.5},
        {"model.name": "swin_micro", "model.patch_size": 4, "views.global_px": 32},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_no_step_scatters(options):
    """Scatters with repeated indices add up in no fixed order on GPUs, and one by one on TPUs."""
    config = tiny()
    config.update_from_flattened_dict(options)
    state, step = _setup(config)
    assert "scatter" not in step.lower(state, _batch()).as_text()


def test_on_gpus_the_step_is_compiled_to_add_up_in_a_fixed_order(tiny_config, monkeypatch):
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


def test_a_step_is_a_function_of_seed_step_and_images(multi_crop):
    state, step = _setup(multi_crop)
    first, again = step(state, _batch())[1], step(state, _batch())[1]
    assert float(first["loss"]) == float(again["loss"])
    later = step(state._replace(step=jnp.int32(5)), _batch())[1]
    assert float(first["loss_intra_image"]) != float(later["loss_intra_image"])


def test_koleo_is_added_to_the_loss_with_its_weight(tiny_config):
    batch, losses = _batch(), {}
    for weight in (0.0, 0.5):
        tiny_config.method.koleo_weight = weight
        state, step = _setup(tiny_config)
        losses[weight] = step(state, batch)[1]
    assert "loss_koleo" not in losses[0.0]
    expected = losses[0.0]["loss"] + 0.5 * losses[0.5]["loss_koleo"]
    np.testing.assert_allclose(losses[0.5]["loss"], expected, rtol=1e-5)


def test_a_concatenation_of_pools_widens_the_image_head_and_trains(tiny_config):
    tiny_config.method.image_pool = "cls+mean+mil"
    tiny_config.method.koleo_weight = 0.1
    state, step = _setup(tiny_config)
    width = state.student["region_head"]["mlp_0"]["kernel"].shape[0]
    assert state.student["image_head"]["mlp_0"]["kernel"].shape[0] == 3 * width
    before = state
    for _ in range(2):
        state, metrics = step(state, _batch())
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert {"backbone", "mil_scorer", "image_head"} <= _moved(before.student, state.student)


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_the_entropy_of_mil_weights_is_added_to_the_loss_and_moves_the_weights(tiny_config, weight):
    batch, entropies, first = _batch(), {}, {}
    tiny_config.method.mil_temp = 0.02  # for weights that are far from uniform
    tiny_config.model.drop_path = 0.0
    tiny_config.optim.lr, tiny_config.optim.warmup_epochs = 0.1, 0.0
    for used in (0.0, weight):
        tiny_config.method.mil_entropy_weight = used
        state, step = _setup(tiny_config)
        state, first[used] = step(state, batch)
        for _ in range(3):
            state, metrics = step(state, batch)
        entropies[used] = float(metrics["mil_entropy"])  # of the teacher
    assert "loss_mil_entropy" not in first[0.0]
    assert 0 < float(first[weight]["loss_mil_entropy"]) <= 1
    expected = first[0.0]["loss"] + weight * first[weight]["loss_mil_entropy"]
    np.testing.assert_allclose(first[weight]["loss"], expected, rtol=1e-5)
    # at the first step student and teacher are one
    np.testing.assert_allclose(first[weight]["loss_mil_entropy"], first[weight]["mil_entropy"], rtol=1e-5)
    assert (entropies[weight] < entropies[0.0]) == (weight > 0)


def test_the_inter_level_terms_warm_up(tiny_config):
    method = tiny_config.method
    method.mil_warmup_epochs = 2.0  # four steps
    state, step = _setup(tiny_config)
    for number in range(6):
        state, metrics = step(state, _batch())
        scale = min(number / 4, 1)
        assert float(metrics["inter_scale"]) == scale
        terms = {
            name: float(metrics[f"loss_{name}"]) for name in ("intra_image", "intra_region", "inter_student", "inter_teacher")
        }
        inter = scale * (terms["inter_student"] + terms["inter_teacher"])
        expected = 0.5 * (terms["intra_image"] + terms["intra_region"]) + inter
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "values", "changed"),
    [
        ("inter_direction", ("bag_to_image", "image_to_bag"), {"inter_student", "inter_teacher"}),
        ("region_matching", ("similarity", "location"), {"intra_region"}),
    ],
)
def test_a_choice_changes_its_own_terms_alone(tiny_config, key, values, changed):
    metrics = []
    for value in values:
        tiny_config.method[key] = value
        state, step = _setup(tiny_config)
        metrics.append(step(state, _batch())[1])
    there, back = metrics
    for term in ("intra_image", "intra_region", "inter_student", "inter_teacher"):
        same = np.isclose(there[f"loss_{term}"], back[f"loss_{term}"], rtol=1e-6)
        assert same == (term not in changed)
    assert all(np.isfinite(float(value)) for value in back.values())


@pytest.mark.parametrize("scorer", ["attention", "class_token", "mean"])
def test_other_scorers_train(tiny_config, scorer):
    tiny_config.method.mil_scorer = scorer
    state, step = _setup(tiny_config)
    assert ("mil_scorer" in state.student) == (scorer == "attention")
    before = state
    for _ in range(2):
        state, metrics = step(state, _batch())
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert ("mil_scorer" in _moved(before.student, state.student)) == (scorer == "attention")
    if scorer == "mean":
        np.testing.assert_allclose(metrics["mil_entropy"], 1.0, rtol=1e-6)


def test_sinkhorn_centering_uses_the_batch_and_no_earlier_center(tiny_config):
    tiny_config.method.centering = "sinkhorn"
    state, step = _setup(tiny_config)
    shifted = state._replace(centers=jax.tree.map(lambda center: center + jnp.arange(center.size), state.centers))
    (after, metrics), (_, same) = step(state, _batch()), step(shifted, _batch())
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-6)
    assert float(jnp.max(jnp.abs(after.centers.image))) > 0
