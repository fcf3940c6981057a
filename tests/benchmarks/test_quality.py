"""The comparison of methods: equal terms for all rows, runs in processes, statistics against values computed by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import quality, quality_measure, quality_plan, quality_table
from cmd_jax import config as config_lib
from cmd_jax.config import METHODS, Hardware, flatten
from cmd_jax.data.cache import CanvasCache
from cmd_jax.data.loader import batches
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.metrics import load_metrics
from cmd_jax.models.build import init_params, make_network
from cmd_jax.train_and_evaluate import train_and_evaluate
from cmd_jax.training.resume import RESUMABLE_KEYS, config_differences
from tests.conftest import quick

ROOT = Path(__file__).parents[2]
TINY = (
    "model.patch_size=8",
    "data.canvas_px=32",
    "views.global_px=16",
    "views.local_px=8",
    "views.local_count=0",
    "head.prototypes=24",
    "head.hidden_dim=16",
    "head.bottleneck_dim=8",
    "method.mil_hidden_dim=8",
    "train.batch_size=8",
    "train.epochs=1",
    "optim.warmup_epochs=0.5",
    "eval.batch_size=8",
)
SETTINGS = [f"--set={item}" for item in TINY]


def plan(folder, out, ablations=(), seeds=(0,), more=()):
    return quality_plan.make_plan("full", str(folder), (*TINY, *more), ablations, seeds, str(out))


@pytest.fixture(scope="module")
def planned(photo_folder, tmp_path_factory):
    return plan(photo_folder, tmp_path_factory.mktemp("plan"), ["prototypes_64"], (0, 1))


def test_rows_differ_in_the_method_alone(planned):
    tables = {name: flatten(runs[0].config) for name, runs in planned.rows.items()}
    assert list(tables) == ["dino", "esvit", "ibot", "cmd", "prototypes_64"]
    differing = lambda a, b: {key for key in tables[a] if tables[a][key] != tables[b][key]} - RESUMABLE_KEYS
    of_method = {f"method.{key}" for key in ("name", "image_pool", "region_matching", "region_weights")}
    of_method |= {f"method.{term}_weight" for term in ("intra_image", "intra_region", "inter_student", "inter_teacher")}
    for name in ("dino", "esvit", "ibot"):
        of_ibot = {"method.intra_masked_weight", "head.share_mlp", "head.share_prototypes"} if name == "ibot" else set()
        assert of_ibot <= differing(name, "cmd") <= of_method | of_ibot
        for term in ("intra_image", "intra_region"):
            assert tables[name][f"method.{term}_weight"] == METHODS[name][term]
        assert tables[name]["method.inter_student_weight"] == tables[name]["method.inter_teacher_weight"] == 0
    assert differing("prototypes_64", "cmd") == {"head.prototypes"}


def test_rows_of_a_seed_share_weights_and_images(planned):
    def start(run):
        return jax.device_get(quick(lambda: init_params(run.config, make_network(run.config))["backbone"])())

    def images(run):
        """Views depend on the seed, the step, the image and the keys of `views` and `data`."""
        source = open_source(run.config.data, "train")
        stream = batches(CanvasCache(source, run.config.data), len(source), 8, run.config.seed, 0, 1)
        found = [next(stream) for _ in range(run.steps + 1)]
        stream.close()
        return found, {key: value for key, value in flatten(run.config).items() if key.startswith(("views.", "data."))}

    weights, read = ({name: of(planned.rows[name][0]) for name in planned.rows} for of in (start, images))
    for name in planned.rows:
        jax.tree.map(np.testing.assert_array_equal, weights[name], weights["cmd"])
        jax.tree.map(np.testing.assert_array_equal, read[name], read["cmd"])
    other = planned.rows["cmd"][1]
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (weights["cmd"], start(other))), strict=True))
    assert any(np.any(a.index != b.index) for a, b in zip(read["cmd"][0], images(other)[0], strict=True))


def test_training_gets_the_planned_configuration(planned):
    """Flags parsed as `cmd_jax.main` does."""
    code = (
        "import sys; from absl import flags; from ml_collections import config_flags; "
        "config_flags.DEFINE_config_file('config', None, '', lock_config=True); "
        "flags.DEFINE_string('workdir', None, ''); flags.FLAGS(sys.argv); print(flags.FLAGS.config.to_json())"
    )
    run = planned.runs[0]
    done = subprocess.run([sys.executable, "-c", code, *run.command[3:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    given = config_lib.default()
    with given.ignore_type():
        given.update(json.loads(done.stdout))
    planned_config = json.loads(run.config.to_json())
    assert json.loads(config_lib.resolve(given, run.images).to_json()) == planned_config
    assert config_differences(planned_config, config_lib.resolve(given, run.images, Hardware("gpu", 4))) == []  # on any machine


def test_ablations_are_valid_configurations():
    _, config = quality_plan.base_config(None)
    for values in quality_plan.ABLATIONS.values():
        quality_plan.changed(config, values)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset=fast"], "unknown --preset=fast; choose full or smoke"),
        (["--ablations", "without_luck"], "unknown --ablations=without_luck; choose all, or some of paper"),
        (["--seeds", "1", "1"], "--seeds has a value twice"),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
        (["--set", "train.epochs"], "must be section.key=value"),
        (["--set", "method.name=dino"], "the methods are what is compared"),
        (["--set", "seed=3"], "give --seeds"),
        (["--set", "train.epoch=3"], "did you mean"),
        (["--set", "train.batch_size=4096"], "there are 24 training images"),
        (["--folder", "/nowhere"], "is not a directory"),
    ],
)
def test_mistakes_are_refused_before_training(photo_folder, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(quality, "train", lambda *_: pytest.fail("trained"))
    assert quality.main([f"--folder={photo_folder}", f"--out={tmp_path}", *SETTINGS, *options]) == quality.BAD_CONFIG
    assert says in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(photo_folder, tmp_path, capsys):
    assert quality.main([f"--folder={photo_folder}/test", f"--out={tmp_path}", *SETTINGS]) == quality.BAD_CONFIG
    assert "has no labels" in capsys.readouterr().err


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(["--epochs=3"])
    assert ended.value.code == quality.BAD_CONFIG


def test_list_names_everything(capsys):
    assert quality.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*quality_plan.COMPARED, *quality_plan.ABLATIONS, *quality_plan.PRESETS))


def test_a_run_with_other_values_is_refused(photo_folder, tmp_path):
    run = plan(photo_folder, tmp_path).runs[0]
    os.makedirs(run.workdir)
    config_lib.save(run.config, os.path.join(run.workdir, "config.json"))
    plan(photo_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"method.koleo_weight is .* there and 0.5 here; .*another --out"):
        plan(photo_folder, tmp_path, more=["method.koleo_weight=0.5"])


def test_an_ablation_that_changes_nothing_is_left_out(photo_folder, tmp_path):
    found = plan(photo_folder, tmp_path, ["lambda_0.1", "prototypes_64"], more=["head.prototypes=64"])
    assert found.same == ["prototypes_64"]
    assert list(found.rows) == ["dino", "esvit", "ibot", "cmd", "lambda_0.1"]


def program(run, tmp_path, row, code):
    return run._replace(row=row, workdir=str(tmp_path / row / "seed-0"), command=[sys.executable, "-c", code])


def test_a_failed_run_does_not_end_the_others(planned, tmp_path, capsys):
    bad = program(planned.runs[0], tmp_path, "bad", "print('reason'); raise SystemExit(3)")
    good = program(planned.runs[0], tmp_path, "good", "")
    assert quality.train([bad, good], 1) == {"bad/seed-0": 3}
    said = capsys.readouterr().out
    assert "bad/seed-0 with code 3" in said
    assert "reason" in said
    assert "finished  good/seed-0" in said


def test_runs_are_trained_side_by_side(planned, tmp_path):
    meet = "import time, pathlib as p\np.Path({mine!r}).touch()\nwhile not p.Path({other!r}).exists(): time.sleep(0.05)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    codes = {"one": meet.format(mine=a, other=b), "two": meet.format(mine=b, other=a)}
    assert quality.train([program(planned.runs[0], tmp_path, row, code) for row, code in codes.items()], 2) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_stops_the_runs_and_exits_75(programs, photo_folder, tmp_path, number):
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(120)"
    )
    command = [sys.executable, "-c", child, str(tmp_path / "asked")]
    given = json.dumps([command, [f"--folder={photo_folder}", f"--out={tmp_path}", *SETTINGS]])
    err, log = tmp_path / "err", tmp_path / "dino" / "seed-0.log"
    process = programs.start("tests.benchmarks.test_quality", given, stdout=tmp_path / "out", stderr=err)
    deadline = time.monotonic() + 120
    try:
        while not (log.exists() and log.read_text() == "ready\n"):
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == quality.STOPPED, err.read_text()
    finally:
        process.send_signal(signal.SIGKILL)
    assert "run again, it continues" in err.read_text()
    assert (tmp_path / "asked").exists()


def main():
    """A command in JSON and arguments: the comparison, with a single run that is this command."""
    command, arguments = json.loads(sys.argv[1])
    make_plan = quality.make_plan

    def plan_of_one(*given):
        whole = make_plan(*given)
        return whole._replace(rows={"dino": [whole.runs[0]._replace(command=command)]})

    quality.make_plan = plan_of_one
    sys.exit(quality.main(arguments))


def test_a_directory_in_use_is_refused(tmp_path):
    with quality.locked(str(tmp_path)), pytest.raises(ConfigError, match="in use"), quality.locked(str(tmp_path)):
        pass


@pytest.mark.parametrize("repeated", [1, 6])
def test_leave_one_out_equals_knn_among_the_others(repeated):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(23, 5)).astype(np.float32), rng.integers(3, size=23)
    features[:repeated] = features[0]  # more equal images than neighbours
    labels[:repeated] = labels[0]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    right = []
    for row in range(23):
        others = np.arange(23) != row
        neighbours = nearest(features[others], features[[row]], 4)
        right.append(knn_classify(neighbours, labels[others], labels[[row]], k=4, temp=0.07, classes=3).top1)
    assert quality_measure.leave_one_out(features, labels, 4, 0.07, 3) == pytest.approx(np.mean(right))


def test_the_smaller_of_equally_good_features_is_chosen():
    assert quality_measure.choose([{"cls": 10, "mil": 30}, {"cls": 40, "mil": 30}]) == "mil"
    assert quality_measure.choose([{"cls+mean": 30, "mil": 30}]) == "mil"


def row(name, **numbers):
    full = {column: dict(enumerate(numbers.get(column, (None, None, None)))) for column in quality_table.COLUMNS}
    full["pointing_chance"] = dict.fromkeys(range(3), 20.0 if "pointing" in numbers else None)
    start = {column: dict.fromkeys(range(3), 10.0 if column in numbers else None) for column in full}
    return quality_table.Row(name, "mil", "mil", full, start, dict.fromkeys(range(3), 0.1))


ROWS = [
    row("dino", rank1=(20.0, 30.0, 40.0), linear=(50.0, 50.0, 50.0)),
    row("esvit", rank1=(25.0, 25.0, 25.0), linear=(60.0, 60.0, 60.0)),
    row("cmd", rank1=(41.0, 42.0, 52.0), linear=(65.0, 66.0, 67.0), pointing=(50.0, 60.0, 55.0)),
    row("lambda_1", rank1=(40.0, 40.0, 40.0)),
]


def test_differences_are_paired_and_to_the_best_baseline():
    found = quality_table.compare(ROWS)
    rank1 = found["cmd"]["baseline"]["rank1"]
    paired = np.array([21.0, 12.0, 12.0])
    low, high = stats.t.interval(0.95, 2, loc=paired.mean(), scale=stats.sem(paired))
    assert rank1["to"] == "dino"
    assert (rank1["mean"], rank1["low"], rank1["high"]) == pytest.approx((15.0, low, high))
    assert found["cmd"]["baseline"]["linear"]["to"] == "esvit"
    assert found["cmd"]["start"]["rank1"]["mean"] == pytest.approx(35.0)
    assert found["lambda_1"]["cmd"]["rank1"]["mean"] == pytest.approx(-5.0)
    assert found["lambda_1"]["cmd"]["linear"]["mean"] is None
    assert found["dino"].keys() == {"start"}
    assert quality_table.difference({0: 3.0}, {0: 1.0}) == (2.0, None, None)
    assert quality_table.difference({0: 3.0}, {1: 1.0}) is None


def test_tables_have_a_line_for_each_row():
    text = quality_table.markdown(ROWS)
    assert "45.0 ± 6.1" in text
    assert "+15.0 [" in text
    assert all(f"| {name}" in text for name in ("start", "dino", "esvit", "cmd", "lambda_1"))


@pytest.mark.long
def test_whole_comparison(photo_folder, tmp_path, capsys, monkeypatch):
    """Two rows are trained in this process and one fails; a second call measures nothing again."""
    out = tmp_path / "out"
    options = [f"--folder={photo_folder}", f"--out={out}", "--baselines", "ibot", "esvit", "--seeds=0", *SETTINGS]
    failed = {"esvit/seed-0": 3}

    def train_here(runs, _):
        for run in runs:
            if run.row != "esvit":
                train_and_evaluate(run.config, run.workdir)
        return failed

    monkeypatch.setattr("cmd_jax.train_and_evaluate.write_report", lambda *_: [])
    monkeypatch.setattr(quality, "train", train_here)
    assert quality.main(options) == quality.FAILED
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["rows"]) == ["ibot", "cmd"]
    assert result["failed"] == failed
    whole = plan(photo_folder, out)
    for of_row in result["rows"].values():
        assert of_row["feature"] in quality_measure.candidates(whole.runs[0].config)
        for column in set(quality_table.COLUMNS) - {"pointing"}:
            assert 0 <= of_row["numbers"][column]["0"] <= 100
            assert 0 <= of_row["start"][column]["0"] <= 100
        assert of_row["numbers"]["pointing"]["0"] is None  # photos have no parts
        assert of_row["seconds_per_step"]["0"] > 0
    assert result == json.loads((out / "results.json").read_text())
    assert all((out / name).stat().st_size > 0 for name in ("results.md", "index.html"))
    # Both teachers are those of the run: its own k-NN with the same feature has the same number.
    run, feature = whole.rows["cmd"][0], "cls+mean+mil"
    measured = quality_measure.Measurement(run, whole.splits)
    found = measured.tests(feature)
    assert run.config.eval.features == feature
    for state, step in (("start", 0), ("trained", run.steps)):
        assert found[state]["knn"] == pytest.approx(load_metrics(run.workdir, step).values()["knn20_top1"])
    monkeypatch.setattr(quality_measure, "build_run", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(quality, "train", lambda runs, _: {run.name: 3 for run in runs})
    assert quality.main(options) == quality.FAILED
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


if __name__ == "__main__":
    main()
