"""Training health: steps that are not finite change nothing and are counted, and each kind of collapse is reported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.errors import Collapsed, NonFinite
from cmd_jax.train_and_evaluate import prepare
from cmd_jax.training import health
from cmd_jax.training.health import (
    COLLAPSE_INDICATORS,
    LOGS_IN_ROW,
    BadSteps,
    CollapseIndicator,
    CollapseWatch,
    feature_std,
    mil_entropy,
    relative_entropy,
    watched_from,
)
from cmd_jax.training.run import Run
from tests import runs
from tests.training.test_step import _batch, _setup

STEPS = 6  # 24 images, batches of 8, 2 epochs
WATCHED = tuple(sign.metric for sign in COLLAPSE_INDICATORS)


@pytest.fixture
def config(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    return tiny_config


@pytest.fixture(scope="module")
def program(finished):
    """(run, its compiled step): the program of the finished run."""
    run = prepare(finished[1])
    return run, run.compile()


def _step(program, state):
    """One step from a copy of a state: the program takes its memory."""
    run, step = program
    return step(jax.tree.map(jnp.copy, state), run.place(_batch()))


def _first(tree, value):
    """A tree whose first array has this value as its first element."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaves[0].at[(0,) * leaves[0].ndim].set(value), *leaves[1:]])


def _huge_gradient(state):
    """Scores of patches that are all 0, times 1e38: the loss is finite, its gradient is not."""
    scorer = state.student["mil_scorer"]
    scorer = scorer | {"tanh_kernel": 0 * scorer["tanh_kernel"], "out_kernel": jnp.full_like(scorer["out_kernel"], 1e38)}
    return state._replace(student=state.student | {"mil_scorer": scorer})


POISONS = {
    "NaN in the student": lambda state: state._replace(student=_first(state.student, jnp.nan)),
    "Inf in the student": lambda state: state._replace(student=_first(state.student, jnp.inf)),
    "NaN in the teacher": lambda state: state._replace(teacher=_first(state.teacher, jnp.nan)),
    "-Inf in a center": lambda state: state._replace(centers=_first(state.centers, -jnp.inf)),
    "Inf in the gradient alone": _huge_gradient,
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_bad_step_changes_only_the_counts(program, poison):
    good, _ = _step(program, program[0].first_state())
    good, metrics = _step(program, good)  # moments, centers and the difference of student and teacher are no longer 0
    assert np.isfinite(metrics["loss"])
    state = POISONS[poison](good)
    for count in (1, 2):
        after, metrics = _step(program, state)
        assert np.isfinite(metrics["loss"]) == (poison == "Inf in the gradient alone")
        assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
        runs.assert_same(state._replace(step=state.step + 1, bad_steps=BadSteps(count, count)), after)
        assert (metrics["bad_steps_in_row"], metrics["bad_steps"]) == (count, count)
        state = after
    healed, metrics = _step(program, good._replace(step=state.step, bad_steps=state.bad_steps))
    assert np.isfinite(metrics["loss"])
    assert (int(healed.bad_steps.in_row), int(healed.bad_steps.total)) == (0, 2)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (good.student, healed.student)), strict=True))


def _poison_steps(monkeypatch, numbers):
    """Training runs whose steps of these numbers, from 1, meet NaN in the centers, which are then put back."""
    compile_step = Run.compile

    def compiled(run):
        step, nan = compile_step(run), jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan), run.abstract_state().centers)
        counts = iter(range(1, STEPS + 1))

        def poisoned(state, batch):
            if next(counts) not in numbers:
                return step(state, batch)
            centers = state.centers
            after, metrics = step(state._replace(centers=jax.tree.map(jnp.copy, nan)), batch)
            return after._replace(centers=centers), metrics

        return poisoned

    monkeypatch.setattr(Run, "compile", compiled)


def test_single_bad_steps_are_left_out(config, tmp_path, monkeypatch, capsys):
    config.train.log_every_steps = 5
    _poison_steps(monkeypatch, {2, 3, 5, 6})
    runs.train(config, str(tmp_path))
    out = capsys.readouterr().out
    warnings = re.findall(r"warning: step (\d): loss nan, .* the step was left out, (\d) in a row \(3 stop the run\)", out)
    assert warnings == [("2", "1"), ("3", "2"), ("5", "1"), ("6", "2")]
    logged = [line for line in runs.lines(tmp_path) if "loss" in line]
    assert [(line["step"], line["loss"], line["bad_steps"], line["bad_steps_in_row"]) for line in logged] == [
        (5, None, 3, 1),
        (6, None, 4, 2),
    ]
    assert runs.steps(tmp_path) == [6]  # none behind the bad step 3
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(runs.state(tmp_path, config, 6)))


def test_three_in_a_row_stop_a_resumable_run(finished, config, tmp_path, monkeypatch):
    config.train.log_every_steps = 100
    with monkeypatch.context() as patched:
        _poison_steps(patched, {1, 4, 5, 6})
        message = (
            "steps 4 to 6: loss nan, .*; 3 in a row were left out, the last good step is 3, the newest checkpoint is step 3"
        )
        with pytest.raises(NonFinite, match=message):
            runs.train(config, str(tmp_path))
    assert runs.steps(tmp_path) == [3]
    # With the bad step 1 left out the run is another one than the finished; continued from it, it would be this:
    again = tmp_path / "again"
    with monkeypatch.context() as patched:
        _poison_steps(patched, {1})
        runs.train(config, str(again))
    runs.train(config, str(tmp_path))
    runs.assert_same(runs.state(again, config, STEPS), runs.state(tmp_path, config, STEPS))
    assert runs.state(tmp_path, config, STEPS).bad_steps == BadSteps(0, 1)
    assert runs.state(finished[0], finished[1], STEPS).bad_steps == BadSteps(0, 0)


def test_bad_steps_before_any_checkpoint_stop_too(config, tmp_path, monkeypatch):
    _poison_steps(monkeypatch, {1, 2, 3})
    with pytest.raises(NonFinite, match=r"steps 1 to 3: .* the last good step is 0, there is no checkpoint; lower optim\.lr"):
        runs.train(config, str(tmp_path))
    assert runs.steps(tmp_path) == []


def test_health_of_healthy_and_collapsed_teachers():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4096, 16)).astype(np.float32)
    assert float(feature_std(features)) == pytest.approx(1.0, abs=0.02)
    assert float(feature_std(np.ones((8, 16)))) < 1e-6
    assert float(relative_entropy(np.full((3, 2), np.log(10)), 10)) == pytest.approx(1.0)
    assert float(relative_entropy(np.zeros((3, 2)), 10)) == 0.0
    assert float(mil_entropy(np.full((3, 4), 0.25))) == pytest.approx(1.0)
    assert float(mil_entropy(np.eye(4))) == 0.0


def _teacher(kind):
    """Metrics of a made-up teacher of 64 images and 256 prototypes: logits and features as they collapse."""
    rng = np.random.default_rng(0)
    logits, features = rng.normal(0, 4, (64, 256)), rng.normal(size=(64, 32))
    if kind == "teacher_entropy":
        logits = 0.01 * logits
    elif kind == "marginal_entropy":
        logits[:, 7] += 30
    elif kind == "feature_std":
        features = 1 + 0.01 * features
    probs = np.asarray(jax.nn.softmax(logits))
    entropy = lambda p: -np.sum(p * np.log(p), axis=-1)
    return {
        "teacher_entropy": float(relative_entropy(entropy(probs), 256)),
        "marginal_entropy": float(relative_entropy(entropy(probs.mean(0)), 256)),
        "feature_std": float(feature_std(features)),
    }


@pytest.mark.parametrize("kind", WATCHED)
def test_each_collapse_is_reported_once_until_recovery(kind):
    healthy, collapsed = _teacher(None), _teacher(kind)
    sign = next(sign for sign in COLLAPSE_INDICATORS if sign.metric == kind)
    between = healthy | {kind: (sign.alarm + sign.healthy) / 2}
    course = [healthy] * 2 + [collapsed] * 5 + [between] + [collapsed] * 4 + [healthy] + [collapsed] * 4
    watch = CollapseWatch(first_step=0, images=64)
    told = {step: found for step, metrics in enumerate(course, 1) if (found := watch.read(step, metrics))}
    assert list(told) == [2 + LOGS_IN_ROW, 13 + LOGS_IN_ROW]  # not while it lasts, nor after a relief that is no recovery
    for step, (finding,) in told.items():
        assert finding.startswith(f"step {step}: collapse: {sign.finding} ({kind} {collapsed[kind]:.4f}, alarm at {sign.alarm}")
        assert finding.endswith(sign.advice)


def test_what_is_no_collapse():
    healthy, collapsed = _teacher(None), _teacher("feature_std")
    nan = dict.fromkeys(WATCHED, float("nan"))
    quiet = lambda watch, course: not any(watch.read(step, metrics) for step, metrics in enumerate(course, 1))
    assert quiet(CollapseWatch(0, 64), ([collapsed] * (LOGS_IN_ROW - 1) + [healthy]) * 5)
    assert quiet(CollapseWatch(10, 64), [collapsed] * (9 + LOGS_IN_ROW))
    assert not quiet(CollapseWatch(10, 64), [collapsed] * (10 + LOGS_IN_ROW))
    assert quiet(CollapseWatch(0, 3), [collapsed] * 20)
    assert quiet(CollapseWatch(0, 64), [nan] * 20)
    assert not quiet(CollapseWatch(0, 64), [collapsed, nan, collapsed, nan, collapsed])


def test_the_watch_starts_after_warm_up_and_freeze(tiny_config):
    tiny_config.optim.warmup_epochs, tiny_config.optim.freeze_last_layer_epochs, tiny_config.train.epochs = 3.0, 1.0, 100.0
    tiny_config.method.teacher_momentum, tiny_config.optim.freeze_backbone_epochs = 0.75, 0.0
    assert watched_from(tiny_config, train_images=80) == 34  # 3 epochs of 10 steps, and 4
    tiny_config.optim.freeze_last_layer_epochs = 5.0
    assert watched_from(tiny_config, train_images=80) == 54
    tiny_config.optim.freeze_backbone_epochs = 6.0
    assert watched_from(tiny_config, train_images=80) == 64
    tiny_config.method.teacher_momentum = 1.0  # it never follows
    assert watched_from(tiny_config, train_images=80) == 1000


def test_a_healthy_run_is_not_warned_of(finished):
    watch = CollapseWatch(first_step=0, images=8)
    lines = [line for line in runs.lines(finished[0]) if "loss" in line]
    assert not any(watch.read(line["step"], line) for line in lines)
    assert len(lines) == STEPS


def test_a_teacher_without_centers_collapses_and_is_told(tiny_config):
    tiny_config.method.center_momentum, tiny_config.method.teacher_temp = 1.0, 0.05  # the centers stay 0
    tiny_config.method.teacher_momentum, tiny_config.optim.lr = 0.9, 0.1
    tiny_config.optim.warmup_epochs, tiny_config.train.epochs = 1.0, 200.0
    state, step = _setup(tiny_config)
    first = watched_from(config_lib.resolve(tiny_config, 16), train_images=16)
    watch, told, usage = CollapseWatch(first, images=8), {}, []
    for number in range(1, 51):
        state, metrics = step(state, _batch())
        usage.append(float(metrics["marginal_entropy"]))
        if number % 5 == 0:
            found = watch.read(number, {name: float(value) for name, value in metrics.items()})
            told |= {number: found} if found else {}
    assert usage[0] > 0.5  # more than five prototypes of 24
    assert max(usage[-10:]) < 0.05
    assert len(told) == 1
    (finding,) = next(iter(told.values()))
    assert "collapse: all images have the same prototype (marginal_entropy 0.0" in finding
    assert "set method.centering=sinkhorn, or lower method.center_momentum" in finding


def test_collapse_warns_or_stops_as_configured(config, tmp_path, monkeypatch, capsys):
    always = CollapseIndicator("feature_std", alarm=10.0, healthy=20.0, finding="made up", advice="do nothing")
    monkeypatch.setattr(health, "COLLAPSE_INDICATORS", (always,))
    monkeypatch.setattr("cmd_jax.training.step_log.watched_from", lambda config, train_images: 1)
    runs.train(config, str(tmp_path / "warned"))
    out = capsys.readouterr().out
    assert re.findall(r"warning: step (\d): collapse: made up \(feature_std .*\); do nothing", out) == ["4"]
    assert runs.steps(tmp_path / "warned") == [3, 6]
    config.train.stop_on_collapse = True
    with pytest.raises(Collapsed, match=r"step 4: collapse: made up .*; do nothing; checkpoints: \[3\]"):
        runs.train(config, str(tmp_path / "stopped"))
    assert runs.steps(tmp_path / "stopped") == [3]
