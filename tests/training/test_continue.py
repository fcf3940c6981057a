"""Going on: after a request to stop, on another number of hosts, and with the best step kept."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from cmd_jax.data.augment import multi_crop
from cmd_jax.data.cache import Batch, CanvasCache
from cmd_jax.data.loader import batches
from cmd_jax.data.sources import open_source
from cmd_jax.errors import ConfigError, Preempted
from cmd_jax.evaluation import evaluate as evaluation_lib
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.train_and_evaluate import prepare, train_and_evaluate
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.preemption import Preemption, StopRequested
from tests.conftest import quick

STEPS = 6  # 24 images, batches of 8, 2 epochs


@pytest.fixture
def config(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    return tiny_config


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _state(workdir, config):
    checkpoints = Checkpoints(str(workdir), read_only=True)
    return jax.device_get(checkpoints.restore_state(prepare(config).abstract_state()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        preemption.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested):
            preemption.poll()
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_a_run_asked_to_stop_saves_and_ends_as_one_that_was_not(finished, config, tmp_path, monkeypatch):
    asked_at, polls, evaluated = [], 0, []

    class Told(Preemption):
        def poll(self):
            nonlocal polls
            polls += 1
            if polls in asked_at:
                os.kill(os.getpid(), signal.SIGTERM)
            super().poll()

    monkeypatch.setattr("cmd_jax.train_and_evaluate.Preemption", Told)
    # A poll at each step, and eight in an evaluation: 3 batches of the gallery, 2 of the queries, a chunk of queries of k-NN
    # and one of each of retrieval's splits.
    evaluations = 1 + 8
    for moment, step in ((evaluations + 4, 4), (2 + 3, STEPS)):  # at the fifth step; in the last evaluation
        asked_at, polls = [moment], 0
        with pytest.raises(Preempted, match=f"stopped as asked at step {step} of {STEPS}; run again with --workdir="):
            train_and_evaluate(config, str(tmp_path))
        assert Checkpoints(str(tmp_path), read_only=True).steps()[-1] == step
    assert not (tmp_path / "eval" / str(STEPS)).exists()
    asked_at = []
    evaluate = evaluation_lib.evaluate
    monkeypatch.setattr(evaluation_lib, "evaluate", lambda *args: evaluated.append(args[3]) or evaluate(*args))
    train_and_evaluate(config, str(tmp_path))
    assert evaluated == [STEPS]
    pairs = zip(jax.tree.leaves(_state(finished[0], config)), jax.tree.leaves(_state(tmp_path, config)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    free = ("images_per_s", "data_wait_s")
    ours, others = ([{k: v for k, v in line.items() if k not in free} for line in _lines(d)] for d in (tmp_path, finished[0]))
    assert ours == others
    assert (tmp_path / "report" / "index.html").exists()


def test_an_evaluation_that_lost_its_line_gets_it_back(finished, config, tmp_path):
    """A kill between eval/STEP/metrics.json and its line in metrics.jsonl."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = _lines(workdir)
    kept = [line for line in before if not (line["step"] == STEPS and "eval_rank1" in line)]
    assert len(kept) == len(before) - 1
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    train_and_evaluate(config, str(workdir))
    assert _lines(workdir) == before


def test_the_best_step_is_kept_and_evaluated(config, tmp_path):
    config.train.checkpoint_every_epochs, config.train.keep_checkpoints = 0.5, 1  # steps 2, 4 and 6
    config.train.best_metric = "eval_rank1"
    train_and_evaluate(config, str(tmp_path))
    values = {line["step"]: line["eval_rank1"] for line in _lines(tmp_path) if "eval_rank1" in line}
    assert list(values) == [0, 2, 4, 6]
    del values[0]  # of the start, which is not saved
    best = max(values, key=values.get)
    assert values[evaluate_run(str(tmp_path), None, best=True).step] == values[best]
    assert len(Checkpoints(str(tmp_path), read_only=True).steps()) <= 2
    assert Checkpoints(str(tmp_path), read_only=True).steps()[-1] == STEPS


def test_a_best_metric_that_cannot_be_had(finished, config, photo_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--best needs a run with train\.best_metric"):
        evaluate_run(str(finished[0]), None, best=True)
    config.train.best_metric = "rank1"
    with pytest.raises(ConfigError, match=r"train\.best_metric is 'rank1'; choose one of eval_rank1, eval_map"):
        train_and_evaluate(config, str(tmp_path))
    config.train.best_metric, config.data.folder = "eval_rank1", str(photo_folder / "train")
    with pytest.raises(
        ConfigError, match=r"train\.best_metric is 'eval_rank1', but .* has no labels.* or set it to feature_std"
    ):
        train_and_evaluate(config, str(tmp_path))


def test_any_number_of_hosts_sees_the_same_images_and_crops_and_goes_on_with_another(config):
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
        found = run(hosts, 0, 2) + run(later, 2, 3)
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
    assert not np.array_equal(expected[0][1], expected[1][1])
