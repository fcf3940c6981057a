"""A whole tiny run: its files, stopping and continuing bit for bit, the best step, another model or backbone."""

import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.config import Hardware, validate
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.cache import Batch, CanvasCache
from cmd_jax.data.loader import batches
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import CheckpointError, ConfigError, Preempted
from cmd_jax.evaluation import label_free
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.evaluation.splits import open_splits
from cmd_jax.inference.load import read_trained
from cmd_jax.metrics import Metrics, Number, load_all_metrics, load_metrics, outcome
from cmd_jax.train_and_evaluate import describe_run, evaluation_of, prepare, train_and_evaluate
from cmd_jax.training import train as loop
from cmd_jax.training.metrics import Progress
from cmd_jax.training.preemption import StopRequested
from cmd_jax.training.run import Run, build_run
from cmd_jax.training.sharding import check_mesh
from tests import runs
from tests.conftest import quick

STEPS = 6


def _raise_at(call, error):
    """A function that raises at one of its calls, the first of which is 1."""
    calls = iter(range(1, 10**6))

    def poll():
        if next(calls) == call:
            raise error

    return poll


def test_a_run_writes_its_files(finished, photo_folder):
    workdir, _ = finished
    lines = runs.lines(workdir)
    assert all(next(iter(line)) == "step" for line in lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_rank1" in line] == [0, STEPS]
    for name in ("loss_intra_image", "loss_intra_region", "loss_inter_student", "loss_inter_teacher", "grad_norm"):
        assert all(np.isfinite(line[name]) for line in lines if "loss" in line), name
    for name in ("teacher_entropy", "marginal_entropy", "feature_std", "mil_entropy"):
        assert all(0 <= line[name] <= 1.0 + 1e-5 for line in lines if "loss" in line), name
    resolved = json.loads((workdir / "config.json").read_text())
    assert (resolved["method"]["image_pool"], resolved["method"]["teacher_temp"]) == ("mil", 0.02)
    read_back = config_lib.load(str(workdir / "config.json"))
    assert json.loads(json.dumps(read_back.to_dict())) == resolved
    validate(read_back)
    assert any(name.startswith("events") for name in os.listdir(workdir / "tb"))
    metrics = json.loads((workdir / "eval" / str(STEPS) / "metrics.json").read_text())
    assert set(metrics["protocol"]) == set(metrics["metrics"])
    assert set(metrics["per_class_top1"]["percent"]) == set(os.listdir(photo_folder / "train"))
    assert (workdir / "report" / "mil_overlays.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report" / "index.html").read_bytes().startswith(b"<!doctype html>")


def test_killed_run_resumes_bit_exactly(finished, config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, tmp_path, _raise_at(5, KeyboardInterrupt))
    assert runs.steps(tmp_path) == [3]
    runs.train(config, tmp_path)
    runs.assert_same(runs.state(tmp_path, config), runs.state(finished[0], config))
    assert [line["step"] for line in runs.lines(tmp_path)] == list(range(1, STEPS + 1))  # nothing twice, nothing lost


def test_a_restart_keeps_what_images_resemble(config, tmp_path):
    config.method.relation_weight = 1.0
    runs.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, tmp_path / "killed", _raise_at(5, KeyboardInterrupt))
    bank = runs.state(tmp_path / "killed", config).bank
    assert bank.shape[0] == 24
    assert np.all(np.any(bank != 0, axis=1))  # each was seen in the first epoch
    runs.train(config, tmp_path / "killed")
    runs.assert_same(*(runs.state(tmp_path / name, config) for name in ("killed", "whole")))


def test_stopped_run_saves_and_resumes_bit_exactly(finished, config, tmp_path):
    run = prepare(config)
    splits, _ = open_splits(run.config)
    evaluate, evaluated = evaluation_of(run, splits, str(tmp_path)), []

    def noted(step, *arguments):
        values = evaluate(step, *arguments)
        evaluated.append(step)
        return values

    # The loop polls at each step, and an evaluation nine times: 3 batches of the gallery, 2 of the queries, a chunk of queries
    # of k-NN, one of each of retrieval's splits, one of the training images. So these are the fifth step, and inside the last
    # evaluation.
    for call, step in ((1 + 9 + 4, 4), (2 + 3, STEPS)):
        with pytest.raises(Preempted, match=f"stopped as asked at step {step} of {STEPS}; run again with --workdir="):
            runs.train(config, tmp_path, _raise_at(call, StopRequested), noted)
        assert runs.steps(tmp_path)[-1] == step
    assert not (tmp_path / "eval" / str(STEPS)).exists()
    runs.train(config, tmp_path, evaluate=noted)
    assert evaluated == [0, STEPS]
    runs.assert_same(runs.state(tmp_path, config), runs.state(finished[0], config))
    assert runs.lines(tmp_path, times=False) == runs.lines(finished[0], times=False)
    assert (tmp_path / "report" / "index.html").exists()


def test_finished_run_stays_as_it_is(finished, config, monkeypatch):
    before = runs.lines(finished[0])
    monkeypatch.setattr(Run, "compile", lambda _: pytest.fail("compiled"))
    train_and_evaluate(config, str(finished[0]))
    assert runs.lines(finished[0]) == before


def test_lost_evaluation_line_is_written_again(finished, config, tmp_path):
    """A kill between eval/STEP/metrics.json and its line in metrics.jsonl."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    before = runs.lines(workdir)
    kept = [line for line in before if not (line["step"] == STEPS and "eval_rank1" in line)]
    assert len(kept) == len(before) - 1
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    train_and_evaluate(config, str(workdir))
    assert runs.lines(workdir) == before


def test_eval_binary_repeats_the_final_numbers(finished, capsys):
    workdir, _ = finished
    trained = json.loads((workdir / "eval" / str(STEPS) / "metrics.json").read_text())["metrics"]
    evaluation = evaluate_run(str(workdir), None)
    assert evaluation.metrics.values() == pytest.approx(trained)
    text = capsys.readouterr().out
    assert "start: random weights" in text
    assert "k=10, T=0.07" in text
    assert "a class" in text
    with pytest.raises(CheckpointError, match="has no step 5; it has 3, 6"):
        evaluate_run(str(workdir), 5)
    with pytest.raises(ConfigError, match=r"--best needs a run with train\.best_metric"):
        evaluate_run(str(workdir), None, best=True)


def test_other_values_or_models_are_refused(finished, config):
    config.optim.lr, config.train.epochs, config.views.hue, config.seed = 1e-3, 3.0, 0.2, 1
    config.data.decode_threads, config.train.log_every_steps = 1, 2
    message = (
        r"config.json is of another run: optim.lr is 0.0005 there and 0.001 here; seed is 0 there and 1 here; train.epochs"
    )
    with pytest.raises(ConfigError, match=message + r" is 2.0 there and 3.0 here; and 1 more; give the old values or another"):
        train_and_evaluate(config, str(finished[0]))
    assert runs.lines(finished[0])[-1]["step"] == STEPS
    config.head.prototypes = 32
    with pytest.raises(
        CheckpointError, match=r"does not fit this model: \d+ arrays differ.*model \(32, 8\), checkpoint \(24, 8\)"
    ):
        runs.state(finished[0], config)


def test_open_batch_and_precision_stay(finished, config, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    config.train.batch_size = config.model.dtype = None
    assert prepare(config).config.train.batch_size == 24  # what this machine would give it
    train_and_evaluate(config, str(workdir))  # not refused
    assert json.loads((workdir / "config.json").read_text())["train"]["batch_size"] == 8


def test_swin_trains_and_is_evaluated(config, tmp_path):
    config.model.name, config.model.patch_size, config.model.window = "swin_micro", None, 3
    config.views.global_px = 40  # 2 x 2 tokens that reach beyond the view
    config.eval.features = "mil+blocks"
    config.train.epochs, config.optim.warmup_epochs = 1.0, 0.0
    train_and_evaluate(config, str(tmp_path))
    lines = runs.lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    protocol = json.loads((tmp_path / "eval" / "3" / "metrics.json").read_text())["protocol"]
    assert "mil+blocks features at 40 px" in protocol["knn10_top1"]
    assert "every ninth test image as query (2), the others in the gallery (34)" in protocol["ratio_rank1"]
    assert (tmp_path / "report" / "mil_overlays.png").stat().st_size > 0


def test_unlabelled_images_get_label_free_numbers(config, photo_folder, tmp_path, capsys):
    config.data.folder = str(photo_folder / "train")
    config.eval.protocols = ("retrieval", "label_free")
    train_and_evaluate(config, str(tmp_path))
    assert "evaluation without labels: " in capsys.readouterr().out
    stored = json.loads((tmp_path / "eval" / "6" / "metrics.json").read_text())
    assert list(stored["metrics"]) == list(label_free.KEYS)
    assert [key for key, unit in stored["unit"].items() if unit] == list(stored["interval"]) == ["view_rank1"]
    assert (stored["per_class_top1"]["percent"], stored["confusions"]) == ({}, [])
    assert [line["step"] for line in runs.lines(tmp_path) if "eval_rankme" in line] == [0, 6]
    evaluation = evaluate_run(str(tmp_path), None)
    assert evaluation.metrics.values() == pytest.approx(stored["metrics"], rel=1e-5)
    assert (evaluation.queries, evaluation.predictions, len(evaluation.gallery.labels)) == (None, None, 24)
    with pytest.raises(ConfigError, match=r"knn, linear: .* has no labels; .* or choose --protocols=label_free"):
        evaluate_run(str(tmp_path), None, protocols=("knn", "linear"))


def test_eval_data_and_disk_cache_change_nothing(finished, config, photo_folder, tmp_path):
    config.data.folder, config.data.eval_folder = str(photo_folder / "train"), str(photo_folder)
    config.data.cache, config.data.cache_dir = "disk", str(tmp_path / "cache")
    train_and_evaluate(config, str(tmp_path / "run"))
    assert runs.lines(tmp_path / "run", times=False) == runs.lines(finished[0], times=False)
    assert all(line["data_wait_s"] >= 0 for line in runs.lines(tmp_path / "run") if "loss" in line)
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_best_step_is_kept_and_evaluated(config, photo_folder, tmp_path):
    config.train.checkpoint_every_epochs, config.train.keep_checkpoints = 0.5, 1  # steps 2, 4 and 6
    config.train.best_metric = "eval_rank1"
    train_and_evaluate(config, str(tmp_path))
    values = {line["step"]: line["eval_rank1"] for line in runs.lines(tmp_path) if "eval_rank1" in line}
    assert list(values) == [0, 2, 4, 6]
    best = max(values, key=values.get)  # of equal ones the first
    assert runs.steps(tmp_path) == sorted({best, STEPS})
    assert evaluate_run(str(tmp_path), None, best=True).metrics.step == read_trained(str(tmp_path)).step == best
    assert set(load_metrics(str(tmp_path), best).protocols) == set(config.eval.protocols) - {"pointing"}
    config.data.folder = str(photo_folder / "train")
    with pytest.raises(ConfigError, match=r"best_metric is 'eval_rank1', but .* has no labels.* or set it to eval_view_rank1"):
        train_and_evaluate(config, str(tmp_path))


def test_continued_run_ends_no_worse_than_its_start(finished, config, photo_folder, tmp_path, capsys):
    config.init.weights, config.optim.lr = str(finished[0]), 50.0  # far too high
    config.train.checkpoint_every_epochs = 0.5
    config.eval.protocols = config.eval.protocols_between = ("retrieval", "label_free")
    for name, folder, metric in (("labels", photo_folder, "train_rank1"), ("none", photo_folder / "train", "view_rank1")):
        config.data.folder, workdir = str(folder), str(tmp_path / name)
        train_and_evaluate(config, workdir)
        assert config_lib.load(os.path.join(workdir, "config.json")).train.best_metric == f"eval_{metric}"
        values = {step: metrics.values()[metric] for step, metrics in load_all_metrics(workdir).items()}
        assert list(values) == [0, 2, 4, 6]
        result = read_trained(workdir)
        assert values[result.step] == max(values.values()) >= values[0]
        assert f"result: {f'step {result.step}' if result.step else 'the start'}, chosen by" in capsys.readouterr().out
        if result.step == 0:
            backbones = (read_trained(directory).params["backbone"] for directory in (workdir, str(finished[0])))
            jax.tree.map(np.testing.assert_array_equal, *backbones)


def test_outcome_says_whether_training_helped():
    history = {
        step: Metrics(step, "", [Number("train_rank1", "Train Rank-1", value, "")], {}, "", [], {})
        for step, value in {0: 30.0, 50: 35.5, 100: 33.0}.items()
    }
    line = "result: step 50, chosen by Train Rank-1 (30.0 at the start, 35.5 at step 50, 33.0 at step 100): training helped"
    assert outcome(history, 50, "eval_train_rank1") == line
    worse = {0: history[50]._replace(step=0), 100: history[100]}
    line = "result: the start, chosen by Train Rank-1 (35.5; 33.0 at step 100): training did not help"
    assert outcome(worse, 0, "eval_train_rank1") == line
    assert outcome(history, 50, "loss") is None


def test_dry_run_describes_data_model_and_cost(config):
    text = describe_run(config)
    for part in (
        "24 train, 12 test images, 3 classes",
        "2 x 16 px (4 patches), 0 x 8 px (1 patches)",
        "vit_micro/8, 2 blocks of 96 channels: ",
        "computed in float32\n",
        "6 steps of 8 images, 8 on each of 1 device(s) (cpu)",
        "GFLOP",
        "TFLOP/s of matrix products in float32 on each device",
        "attention xla",
    ):
        assert part in text


def test_step_is_one_program_with_donated_state(config):
    run = prepare(config)
    step, state = run.compile(), run.first_state()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= size
    batch = Batch(
        *(np.zeros((4, *shape), dtype) for shape, dtype in (((32, 32, 3), np.uint8), ((2,), np.int32), ((), np.int32)))
    )
    with pytest.raises(TypeError, match="compiled"):  # another size of batch is refused, not compiled
        step(state, batch)


def test_steps_alone_count_for_speed_and_none_compiles(config, tmp_path, monkeypatch):
    clock, compiled, after, evaluated = [0.0], [], [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    class TimedProgress(Progress):
        def advance(self, step):
            clock[0] += 2.0
            after.append(len(compiled))
            super().advance(step)

    class SlowCheckpoints(loop.Checkpoints):
        def save(self, *arguments):
            clock[0] += 1000.0
            super().save(*arguments)

    def evaluate(step, *_):
        clock[0] += 1000.0
        evaluated.append(step)
        return {}

    monkeypatch.setattr(loop, "Checkpoints", SlowCheckpoints)
    monkeypatch.setattr(loop, "Progress", functools.partial(TimedProgress, now=lambda: clock[0]))
    config.eval.every_epochs = config.train.checkpoint_every_epochs = 0.7
    runs.train(config, tmp_path, evaluate=evaluate)
    assert evaluated == [0, 2, 4, 6]
    assert [line["images_per_s"] for line in runs.lines(tmp_path)] == [config.train.batch_size / 2.0] * STEPS
    assert len(after) == STEPS
    assert set(after[1:]) == {after[1]}  # nothing is compiled after the first step


def test_batch_must_fit_images_and_devices(config):
    config.train.batch_size = 32
    with pytest.raises(ConfigError, match="batch_size is 32, but there are 24 training images"):
        build_run(config, range(24), Hardware("cpu"))
    config.train.batch_size = None
    with pytest.raises(ConfigError, match="batch_size is 32, but there are 24 training images; use fewer devices"):
        build_run(config, range(24), Hardware("gpu", 32))
    config.train.batch_size = 30
    with pytest.raises(ConfigError, match="batch_size 30 does not divide over 8 devices; use 24 or 32"):
        check_mesh(config, devices=8)
    config.train.batch_size, config.train.accumulate = 24, 2
    with pytest.raises(
        ConfigError, match=r"batch_size 24 does not divide over 8 devices x 2 of train.accumulate; use 16 or 32"
    ):
        check_mesh(config, devices=8)
    config.mesh.data = 3
    with pytest.raises(ConfigError, match=r"mesh\.data is 3, but there are 8 devices; use -1, which takes all"):
        check_mesh(config, devices=8)


def test_hosts_see_the_same_images_and_crops(config):
    """With any number of hosts, and after going on with another one."""
    config.views.local_count = 2
    source = open_source(config.data, "train")
    crop = quick(lambda key, *batch: multi_crop(key, *batch, views=config.views, normalization="imagenet"))

    def run(hosts, first_step, steps):
        """(indices, global crops, local crops) of each step."""
        streams = [
            batches(CanvasCache(source, config.data), len(source), 8, config.seed, first_step, 2, host, hosts)
            for host in range(hosts)
        ]
        found = []
        for step in range(first_step, first_step + steps):
            whole = Batch(*(np.concatenate(parts) for parts in zip(*(next(stream) for stream in streams), strict=True)))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), 0)
            found.append((whole.index, *(np.asarray(views) for views in crop(key, *whole))))
        for stream in streams:
            stream.close()
        return found

    expected = run(1, 0, 5)  # into the second epoch
    for hosts, later in ((2, 4), (4, 1)):
        runs.assert_same(run(hosts, 0, 2) + run(later, 2, 3), expected)
    assert not np.array_equal(expected[0][1], expected[1][1])
