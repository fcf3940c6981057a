"""What is measured, what is written, and what is printed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.config import EVAL_PROTOCOLS, default, validate
from cmd_jax.errors import ConfigError
from cmd_jax.evaluation import protocol as protocol_lib
from cmd_jax.evaluation.evaluate import PROTOCOLS, protocols_at
from cmd_jax.evaluation.label_free import agreement
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.metrics import Metrics, Number, load_all_metrics, save_metrics, table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run that may be written to."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def _stored(workdir, *parts):
    return json.loads((workdir / "eval" / Path(*parts) / "metrics.json").read_text())


def test_protocol_names():
    assert sorted(EVAL_PROTOCOLS) == sorted(PROTOCOLS)


def test_all_fast_protocols_on_a_run(workdir, photo_folder, capsys, monkeypatch):
    names = tuple(name for name in EVAL_PROTOCOLS if name != "linear")
    with monkeypatch.context() as patch:
        patch.setattr(protocol_lib, "ANNOUNCED_FLOPS", 1.0)  # as if all of it took long
        evaluation = evaluate_run(str(workdir), None, protocols=names)
    text, stored = capsys.readouterr().out, _stored(workdir, "6")
    # every part says what it costs before, and counts up to that
    for said in ("features: 36 images at 16 px", "neighbours: 12 queries, 24 train images, ", "logistic: 13 fits of 24 x "):
        assert text.count(f"\n{said}") + text.startswith(said) == 1
    for done in ("features: 5/5 batches", "neighbours: 1/1 chunks", "retrieval: 3/3 chunks", "fractions: 26/26 fits"):
        assert f"\n{done}, " in text
    assert "logistic: 13/13 fits, " in text
    assert "label_free: 4/4 batches, " in text
    assert "few_shot: no 5-shot, which needs 5 classes of 20 images or more" in text
    headlines = [*(f"knn{k}_top1" for k in (10, 20)), "rank1", "map", "ratio_rank1", "ratio_map", "logistic_top1"]
    headlines += ["fraction20_top1", "fraction50_top1", "train_rank1", "view_rank1"]
    headlines += ["cluster_accuracy", *(f"disjoint_recall{rank}" for rank in (1, 2, 4, 8))]
    headlines += [f"labels{n}_chosen" for n in (1, 2, 5)]  # ten a class are more than there are
    assert set(stored["interval"]) == set(headlines)
    for key in headlines:
        low, high = stored["interval"][key]
        assert 0 <= low <= stored["metrics"][key] <= high <= 100
    assert stored["metrics"] == evaluation.metrics.values()
    for part in ("title", "unit", "protocol"):
        assert set(stored[part]) == set(stored["metrics"])
    assert {key for key, unit in stored["unit"].items() if unit == ""} == {
        "rankme",
        "alpha_req",
        "uniformity",
        "alignment",
        "teacher_entropy",
        "marginal_entropy",
    }
    assert stored["data"] == str(photo_folder)
    assert "k=100, 200 left out, there are 24 train images" in stored["protocol"]["knn10_top1"]
    assert "20 % of each class's labels: 6 train images" in stored["protocol"]["fraction20_top1"]
    # the breakdown is that of the predictions
    right = evaluation.predictions == evaluation.queries.labels
    assert stored["metrics"]["knn20_top1"] == pytest.approx(100 * right.mean())
    assert np.mean(list(stored["per_class_top1"]["percent"].values())) == pytest.approx(100 * right.mean())  # equal classes
    assert stored["per_class_top1"]["protocol"] == "k-NN top-1, k=20"
    assert sum(pair["count"] for pair in stored["confusions"]) == np.sum(~right)
    # what the run did not measure before training has a dash
    line = next(line for line in text.splitlines() if line.startswith("Logistic top-1  "))
    assert line.split()[2] == "-"
    line = next(line for line in text.splitlines() if line.startswith("k-NN top-1 (k=10)"))
    assert f"{evaluation.metrics.values()['knn10_top1']:.1f} [" in line
    assert "most confused" in text
    # protocols of an earlier evaluation are kept, and one measured anew is written over
    again = evaluate_run(str(workdir), None, protocols=("retrieval",))
    assert "chunks" not in capsys.readouterr().out  # a part of less than some seconds says nothing
    assert set(again.metrics.values()) < set(stored["metrics"])
    assert _stored(workdir, "6") == stored


def test_k_above_the_number_of_training_images(finished, workdir):
    config = config_lib.load(str(workdir / "config.json"))
    with config.unlocked():
        config.eval.knn_k = (500, 100)
    config_lib.save(config, str(workdir / "config.json"))
    evaluation = evaluate_run(str(workdir), None, protocols=("knn",))
    assert [row.key for row in evaluation.metrics.numbers] == ["knn100_top1", "knn100_top5"]
    assert evaluation.metrics.numbers[0].protocol.startswith("k=24, all there are, T=0.07")


def test_an_image_head_that_no_term_trains_says_nothing(finished, workdir):
    config = config_lib.load(str(workdir / "config.json"))
    with config.unlocked():
        for term in ("intra_image", "inter_student", "inter_teacher"):
            config.method[f"{term}_weight"] = 0.0
    config_lib.save(config, str(workdir / "config.json"))
    keys = {row.key for row in evaluate_run(str(workdir), None, protocols=("label_free",)).metrics.numbers}
    assert keys >= {"view_rank1", "rankme", "alignment"}
    assert not keys & {"teacher_entropy", "marginal_entropy"}


def test_numbers_on_other_data_are_kept_apart(workdir, photo_folder, tmp_path):
    config = config_lib.load(str(workdir / "config.json"))
    config.train.best_metric = "eval_map"  # which the protocols that are asked for do not measure
    config_lib.save(config, str(workdir / "config.json"))
    other = tmp_path / "other photos"
    shutil.copytree(photo_folder, other)
    shutil.rmtree(other / "train" / "<script>")
    shutil.rmtree(other / "test" / "<script>")
    before = _stored(workdir, "6")
    pictures = {path: path.stat().st_mtime_ns for path in (workdir / "report").iterdir()}
    command = [sys.executable, "-m", "cmd_jax.eval", f"--workdir={workdir}", "--protocols=knn", f"--folder={other}"]
    out = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "8 test queries, 16 train images; chance 50.0" in out.stdout
    assert "Retrieval" not in out.stdout
    assert "start" not in out.stdout.split()
    (folder,) = [path.name for path in (workdir / "eval" / "6").iterdir() if path.is_dir()]
    assert folder.startswith("on_")
    assert folder.endswith("other_photos")
    assert _stored(workdir, "6", folder)["data"] == str(other)
    assert _stored(workdir, "6") == before
    assert {path: path.stat().st_mtime_ns for path in (workdir / "report").iterdir()} == pictures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ("knn", "svm")}, r"eval.protocols is \('knn', 'svm'\); it must be one or more of knn, retrieval"),
        ({"protocols": ()}, r"eval.protocols is \(\); it must be one or more of"),
        ({"protocols": ("knn", "knn")}, "each once"),
        ({"protocols": ("pointing",)}, "cannot measure pointing: .* has no part boxes; or choose --protocols=label_free"),
        ({"source": "birds"}, "data.eval_source is 'birds'; it must be one of"),
        ({"folder": "/nowhere"}, "data.folder '/nowhere' is not a directory"),
    ],
)
def test_impossible_evaluations_are_refused(finished, change, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_run(str(finished[0]), None, **change)


def test_linear_probe_runs_at_the_end():
    config = default()
    config.eval.protocols, config.eval.protocols_between = ("knn", "linear"), ("retrieval",)
    assert [protocols_at(config, step, step == 9) for step in (0, 4, 9)] == [("knn",), ("retrieval",), ("knn", "linear")]


def test_best_metric_needs_its_protocol():
    config = default()
    config.train.best_metric, config.eval.protocols_between = "eval_map", ("knn",)
    with pytest.raises(ConfigError, match=r"'eval_map', but eval.protocols_between is \('knn',\); add 'retrieval'"):
        validate(config)


@pytest.mark.parametrize(
    ("method", "model", "scorer", "features"),
    [
        ("cmd", "vit_small", "gated", "cls+mean+mil"),
        ("cmd_bag", "vit_small", "gated", "cls+mean+mil"),
        ("cmd_bag", "vit_small", "class_token", "mil"),
        ("cmd", "swin_tiny", "gated", "mean+mil"),
        ("dino", "vit_small", "class_token", "cls"),
        ("esvit", "swin_tiny", "gated", "mean"),
    ],
)
def test_default_features_by_method(method, model, scorer, features):
    config = default()
    config.method.name, config.model.name, config.method.mil_scorer = method, model, scorer
    assert config_lib.resolve(config, 100).eval.features == features


def _metrics(*numbers, step=5):
    return Metrics(step, "", list(numbers), {}, "", [], {})


def test_table_with_intervals_and_dashes():
    rows = (
        Number("a", "First", 45.0, "how", low=40.64, high=49.4),
        Number("b", "Second", 1.25, "so"),
        Number("c", "Rank", 12.345, "", ""),
    )
    lines = table(
        _metrics(*rows), _metrics(Number("a", "", 30.0, ""), Number("old", "", 1.0, "")), "weights of /dino\n.pth"
    ).splitlines()
    assert lines[0].split() == ["percent", "start", "step", "5", "protocol"]
    assert lines[1].split() == ["First", "30.0", "45.0", "[40.6,", "49.4]", "how"]
    assert lines[2].split() == ["Second", "-", "1.2", "so"]
    assert lines[3].split() == ["label-free", "start", "step", "5", "protocol"]
    assert lines[4].split() == ["Rank", "-", "12.35"]
    assert lines[5:] == [r"start: weights of /dino\n.pth"]
    assert "start" not in table(_metrics(*rows))
    assert len({line.index("protocol") for line in lines if "protocol" in line} | {lines[1].index("how")}) == 1


def test_agreement_over_evaluated_steps(tmp_path):
    for step, value in enumerate((3.0, 1.0, 2.0, 5.0)):
        rows = (
            Number("knn20_top1", "", value, ""),
            Number("rankme", "", 10 + value, "", ""),
            Number("alignment", "", -value, "", ""),
        )
        save_metrics(_metrics(*rows, step=step), str(tmp_path))
        text = agreement(list(load_all_metrics(str(tmp_path)).values()), "knn20_top1")
        assert (text is None) == (step < 3)
    assert text.endswith("with knn20_top1 over the evaluated steps: rankme +1.00, alignment -1.00")
