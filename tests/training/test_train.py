"""A whole tiny run: files, resuming bit for bit, the teacher alone, health."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.data.cache import Batch
from cmd_jax.errors import CheckpointError, ConfigError
from cmd_jax.evaluation import agreement
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.hardware import Hardware
from cmd_jax.train_and_evaluate import describe_run, prepare, train_and_evaluate
from cmd_jax.training import run as run_lib
from cmd_jax.training import train as loop
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.metrics import Progress
from cmd_jax.training.run import Run
from cmd_jax.training.sharding import mesh_shape
from cmd_jax.validation import validate

STEPS = 6  # 24 images, batches of 8, 2 epochs


@pytest.fixture
def config(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    return tiny_config


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _state(workdir, config):
    run = prepare(config)
    checkpoints = Checkpoints(str(workdir), read_only=True)
    state = checkpoints.restore_state(run.abstract_state())
    checkpoints.close()
    return jax.device_get(state)


def test_a_run_writes_its_files(finished, photo_folder):
    workdir, _ = finished
    lines = _lines(workdir)
    assert all(next(iter(line)) == "step" for line in lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_rank1" in line] == [0, STEPS]
    for name in ("loss_intra_image", "loss_intra_region", "loss_inter_student", "loss_inter_teacher", "grad_norm"):
        assert all(np.isfinite(line[name]) for line in lines if "loss" in line), name
    for name in ("teacher_entropy", "marginal_entropy", "feature_std", "mil_entropy"):
        assert all(0 <= line[name] <= 1.0 + 1e-5 for line in lines if "loss" in line), name
    resolved = json.loads((workdir / "config.json").read_text())
    assert (resolved["method"]["image_pool"], resolved["method"]["teacher_temp"]) == ("mil", 0.02)
    assert any(name.startswith("events") for name in os.listdir(workdir / "tb"))
    metrics = json.loads((workdir / "eval" / str(STEPS) / "metrics.json").read_text())
    assert set(metrics["protocol"]) == set(metrics["metrics"])
    assert set(metrics["per_class_top1"]["percent"]) == set(os.listdir(photo_folder / "train"))
    assert (workdir / "report" / "mil_overlays.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report" / "index.html").read_bytes().startswith(b"<!doctype html>")


def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(finished, config, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    place = Run.place
    calls = 0

    def kill_at_the_fifth_batch(run, batch):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return place(run, batch)

    monkeypatch.setattr(Run, "place", kill_at_the_fifth_batch)
    with pytest.raises(Killed):
        train_and_evaluate(config, str(tmp_path))
    monkeypatch.undo()
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [3]
    train_and_evaluate(config, str(tmp_path))
    whole, continued = _state(finished[0], config), _state(tmp_path, config)
    assert int(continued.step) == STEPS
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(continued), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [line["step"] for line in _lines(tmp_path) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))  # nothing twice, nothing lost


def test_a_finished_run_is_left_as_it_is_and_compiles_no_step(finished, config, monkeypatch):
    before = _lines(finished[0])
    monkeypatch.setattr(Run, "compile", lambda _: pytest.fail("compiled"))
    train_and_evaluate(config, str(finished[0]))
    assert _lines(finished[0]) == before


def test_the_eval_binary_gives_the_numbers_of_the_training(finished, capsys):
    workdir, _ = finished
    trained = json.loads((workdir / "eval" / str(STEPS) / "metrics.json").read_text())["metrics"]
    evaluation = evaluate_run(str(workdir), None)
    assert evaluation.metrics() == pytest.approx(trained)
    text = capsys.readouterr().out
    assert "start: random weights" in text
    assert "k=10, T=0.07" in text
    assert "a class" in text
    with pytest.raises(CheckpointError, match="has no step 5; it has 3, 6"):
        evaluate_run(str(workdir), 5)


def test_the_teacher_is_restored_without_the_train_item(finished, config):
    run = prepare(config)
    checkpoints = Checkpoints(str(finished[0]), read_only=True)
    read = []
    restore = checkpoints._manager.restore
    checkpoints._manager.restore = lambda step, args: read.append(set(args.keys())) or restore(step, args=args)
    step, teacher = checkpoints.restore_teacher(run.abstract_state().teacher)
    assert (step, read) == (STEPS, [{"teacher"}])
    for a, b in zip(jax.tree.leaves(teacher), jax.tree.leaves(_state(finished[0], config).teacher), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_another_model_is_refused_with_the_arrays_that_differ(finished, config):
    config.head.prototypes = 32
    with pytest.raises(
        CheckpointError, match=r"does not fit this model: \d+ arrays differ.*model \(32, 8\), checkpoint \(24, 8\)"
    ):
        _state(finished[0], config)


def test_a_run_is_continued_only_with_its_own_values(finished, config):
    config.optim.lr, config.train.epochs, config.views.hue, config.seed = 1e-3, 3.0, 0.2, 1
    config.data.decode_threads, config.train.log_every_steps = 1, 2
    message = (
        r"config.json is of another run: optim.lr is 0.0005 there and 0.001 here; seed is 0 there and 1 here; train.epochs"
    )
    with pytest.raises(ConfigError, match=message + r" is 2.0 there and 3.0 here; and 1 more; give the old values or another"):
        train_and_evaluate(config, str(finished[0]))
    assert _lines(finished[0])[-1]["step"] == STEPS


def test_a_swin_trains_and_is_evaluated_with_pictures(config, tmp_path):
    config.model.name, config.model.patch_size, config.model.window = "swin_micro", None, 3
    config.views.local_count = 2
    config.views.global_px, config.views.local_px = 40, 20  # 2 x 2 tokens that reach beyond the view, and one
    config.eval.features = "mil+blocks"
    config.train.epochs, config.optim.warmup_epochs = 1.0, 0.0
    train_and_evaluate(config, str(tmp_path))
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    protocol = json.loads((tmp_path / "eval" / "3" / "metrics.json").read_text())["protocol"]
    assert "mil+blocks features at 40 px" in protocol["knn10_top1"]
    assert "every ninth test image as query (2), the others in the gallery (34)" in protocol["ratio_rank1"]
    assert (tmp_path / "report" / "mil_overlays.png").stat().st_size > 0


def test_unlabelled_images_are_trained_on_and_evaluated_without_labels(config, photo_folder, tmp_path, capsys):
    config.data.folder = str(photo_folder / "train")
    config.eval.protocols = ("retrieval", "label_free")
    train_and_evaluate(config, str(tmp_path))
    assert "evaluation without labels: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "eval" / "6" / "metrics.json").read_text())
    assert list(stored["metrics"]) == list(agreement.KEYS)
    assert set(stored["unit"].values()) == {""}
    assert (stored["per_class_top1"]["percent"], stored["confusions"], stored["interval"]) == ({}, [], {})
    assert [line["step"] for line in _lines(tmp_path) if "eval_rankme" in line] == [0, 6]
    evaluation = evaluate_run(str(tmp_path), None)
    assert evaluation.metrics() == pytest.approx(stored["metrics"], rel=1e-5)
    assert (evaluation.queries, evaluation.predictions, len(evaluation.gallery.labels)) == (None, None, 24)
    with pytest.raises(ConfigError, match=r"knn, linear: .* has no labels; .* or choose --protocols=label_free"):
        evaluate_run(str(tmp_path), None, protocols=("knn", "linear"))


def test_labels_from_other_data_and_pictures_from_a_disk_cache_change_nothing(finished, config, photo_folder, tmp_path):
    config.data.folder, config.data.eval_folder = str(photo_folder / "train"), str(photo_folder)
    config.data.cache, config.data.cache_dir = "disk", str(tmp_path / "cache")
    train_and_evaluate(config, str(tmp_path / "run"))
    ours, others = _lines(tmp_path / "run"), _lines(finished[0])
    free = ("images_per_s", "data_wait_s")
    assert [{key: line[key] for key in line if key not in free} for line in ours] == [
        {key: line[key] for key in line if key not in free} for line in others
    ]
    assert all(line["data_wait_s"] >= 0 for line in ours if "loss" in line)
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_dry_run_describes_and_writes_nothing(config):
    config.views.local_count = 2
    text = describe_run(config)
    for part in (
        "24 train, 12 test images, 3 classes",
        "2 x 16 px (4 patches), 2 x 8 px (1 patches)",
        "computed in float32\n",
        "6 steps of 8 images, 8 on each of 1 device(s) (cpu)",
    ):
        assert part in text
    assert "GFLOP" in text
    assert "attention xla" in text


def test_a_run_goes_on_with_the_batch_and_precision_that_it_was_started_with(finished, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    config.train.batch_size = config.model.dtype = None
    assert prepare(config).config.train.batch_size == 24  # what this machine would give it
    assert "6 steps of 8 images" in describe_run(config, str(workdir))
    train_and_evaluate(config, str(workdir))  # not refused
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 8


def test_the_step_is_one_program_that_writes_its_state_in_place(config):
    run = prepare(config)
    step, state = run.compile(), run.first_state()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= size
    batch = Batch(
        *(np.zeros((4, *shape), dtype) for shape, dtype in (((32, 32, 3), np.uint8), ((2,), np.int32), ((), np.int32)))
    )
    with pytest.raises(TypeError, match="compiled"):  # another size of batch is refused, not compiled
        step(state, batch)


def test_nothing_is_compiled_after_the_first_step(config, tmp_path, monkeypatch):
    compiled, after = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    advance = Progress.advance
    monkeypatch.setattr(Progress, "advance", lambda self, step: after.append(len(compiled)) or advance(self, step))
    config.train.checkpoint_every_epochs = 0.5
    train_and_evaluate(config, str(tmp_path))
    assert len(after) == STEPS
    assert after[0] > 0
    assert set(after[1:]) == {after[1]}


def test_evaluations_and_checkpoints_count_for_no_speed(config, tmp_path, monkeypatch):
    clock, evaluated = [0.0], []

    def takes(seconds, function):
        def timed(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        return timed

    def evaluate(step, *_):
        evaluated.append(step)
        return {}

    monkeypatch.setattr(loop.Checkpoints, "save", takes(1000.0, loop.Checkpoints.save))
    monkeypatch.setattr(Progress, "advance", takes(2.0, Progress.advance))
    monkeypatch.setattr(loop, "Progress", functools.partial(Progress, now=lambda: clock[0]))
    config.eval.every_epochs = config.train.checkpoint_every_epochs = 0.7
    loop.train(prepare(config), str(tmp_path), {}, takes(1000.0, evaluate))
    assert evaluated == [0, 2, 4, 6]
    speeds = [line["images_per_s"] for line in _lines(tmp_path) if "loss" in line]
    assert speeds == [config.train.batch_size / 2.0] * STEPS


def test_a_batch_that_does_not_fit_is_refused(config, monkeypatch):
    config.train.batch_size = 32
    with pytest.raises(ConfigError, match="batch_size is 32, but there are 24 training images"):
        prepare(config)
    monkeypatch.setattr(run_lib, "all_hardware", lambda: Hardware("gpu", 32))
    config.train.batch_size = None
    with pytest.raises(ConfigError, match="batch_size is 32, but there are 24 training images; use fewer devices"):
        prepare(config)
    config.train.batch_size = 30
    with pytest.raises(ConfigError, match="batch_size 30 does not divide over 8 devices; use 24 or 32"):
        mesh_shape(config, devices=8)
    config.mesh.model = 3
    with pytest.raises(ConfigError, match=r"mesh.data=-1 x mesh.model=3 does not fit 8 devices"):
        mesh_shape(config, devices=8)
    config.train.batch_size, config.train.accumulate, config.mesh.model = 24, 2, 1
    with pytest.raises(
        ConfigError, match=r"batch_size 24 does not divide over 8 devices x 2 of train.accumulate; use 16 or 32"
    ):
        mesh_shape(config, devices=8)
    config.train.accumulate, config.mesh.model, config.head.prototypes = 1, 8, 36
    with pytest.raises(ConfigError, match=r"head.prototypes is 36, which mesh.model=8 does not divide"):
        mesh_shape(config, devices=8)


def test_config_json_is_read_back(finished):
    workdir, _ = finished
    config = config_lib.load(str(workdir / "config.json"))
    assert json.loads(json.dumps(config.to_dict())) == json.loads((workdir / "config.json").read_text())
    validate(config)
