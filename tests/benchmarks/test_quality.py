"""The comparison of methods: its plan is fair, its jobs survive each other, its statistics are those computed by hand."""

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

from benchmarks import quality, quality_jobs, quality_measure, quality_plan, quality_table
from cmd_jax import config as config_lib
from cmd_jax.config import METHODS
from cmd_jax.data.cache import CanvasCache
from cmd_jax.data.loader import batches
from cmd_jax.data.sources import open_source
from cmd_jax.errors import ConfigError
from cmd_jax.evaluation.evaluate import load_metrics
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.hardware import Hardware
from cmd_jax.models.build import init_params, make_network
from cmd_jax.rules import keys
from cmd_jax.train_and_evaluate import train_and_evaluate
from cmd_jax.training.resume import RESUMABLE_KEYS, differences
from tests.conftest import QUICK

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


def settings(*more):
    return [f"--set={item}" for item in (*TINY, *more)]


def plan(folder, out, ablations=(), seeds=(0,), more=()):
    return quality_plan.make_plan("full", str(folder), (*TINY, *more), ablations, seeds, str(out))


@pytest.fixture(scope="module")
def planned(photo_folder, tmp_path_factory):
    return plan(photo_folder, tmp_path_factory.mktemp("plan"), ["prototypes_64"], (0, 1))


def test_methods_differ_in_the_method_alone(planned):
    first = {run.name: run for run in planned.runs if run.seed == 0}
    assert list(first) == ["dino", "esvit", "cmd", "prototypes_64"]
    tables = {name: keys(run.config) for name, run in first.items()}
    differing = lambda a, b: {key for key in tables[a] if tables[a][key] != tables[b][key]} - RESUMABLE_KEYS
    of_method = {f"method.{key}" for key in ("name", "image_pool", "region_matching", "region_weights", *quality_weights())}
    for name in ("dino", "esvit"):
        assert differing(name, "cmd") <= of_method
        for term in ("intra_image", "intra_region"):
            assert tables[name][f"method.{term}_weight"] == METHODS[name][term]
        assert tables[name]["method.inter_student_weight"] == tables[name]["method.inter_teacher_weight"] == 0
    assert differing("prototypes_64", "cmd") == {"head.prototypes"}


def quality_weights():
    return (f"{term}_weight" for term in ("intra_image", "intra_region", "inter_student", "inter_teacher"))


def test_methods_of_a_seed_start_from_the_same_backbone_and_read_the_same_images(planned):
    weights, read = {}, {}
    for run in planned.runs:
        if run.seed and run.name != "cmd":
            continue
        source = open_source(run.config.data, "train")
        init = jax.jit(lambda config=run.config: init_params(config, make_network(config))["backbone"])
        weights[run.name, run.seed] = [np.asarray(leaf) for leaf in jax.tree.leaves(init.lower().compile(dict(QUICK))())]
        cache = CanvasCache(source, run.config.data)
        stream = batches(cache, len(source), run.config.train.batch_size, run.config.seed, 0, 1)
        read[run.name, run.seed] = [next(stream) for _ in range(run.steps + 1)]
        stream.close()
        views = {key: value for key, value in keys(run.config).items() if key.startswith(("views.", "data."))}
        # Views are drawn from (seed, step, image index) by these values (tests/training): the same images, the same views.
        assert views == {key: value for key, value in keys(planned.runs[0].config).items() if key in views}
    for name, seed in weights:
        for a, b in zip(weights[name, seed], weights["cmd", seed], strict=True):
            np.testing.assert_array_equal(a, b)
        for batch, other in zip(read[name, seed], read["cmd", seed], strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, other)
    assert any(np.any(a != b) for a, b in zip(weights["cmd", 0], weights["cmd", 1], strict=True))
    assert any(np.any(a.index != b.index) for a, b in zip(read["cmd", 0], read["cmd", 1], strict=True))


def test_the_main_job_gets_the_planned_configuration(planned):
    """Flags parsed as the main job does."""
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
    assert differences(planned_config, config_lib.resolve(given, run.images, Hardware("gpu", 4))) == []  # on any machine


@pytest.mark.parametrize("name", quality_plan.ABLATIONS)
def test_ablations_have_keys_and_values_that_are_allowed(name):
    _, config = quality_plan.base_config(None)
    values = quality_plan.ABLATIONS[name]
    quality_plan.changed(config, {**quality_plan.method_values("cmd", config), **values})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset=fast"], "--preset=fast is no preset; choose full or smoke"),
        (["--ablations", "without_luck"], "--ablations=without_luck is none; choose all, or some of paper"),
        (["--ablations", "lambda_1", "lambda_1"], "lambda_1 more than once"),
        (["--seeds", "1", "1"], "--seeds has 1 more than once"),
        (["--jobs=0"], "--jobs=0 runs nothing"),
        (["--set", "train.epochs"], "is no section.key=value"),
        (["--set", "method.name=dino"], "the methods are what is compared"),
        (["--set", "seed=3"], "give --seeds"),
        (["--set", "train.epoch=3"], "train.epoch is no key of the configuration; did you mean"),
        (["--set", "train.epochs=-1"], "train.epochs is -1"),
        (["--set", "train.batch_size=4096"], "there are 24 training images"),
        (["--folder", "/nowhere"], "is not a directory"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(photo_folder, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(quality, "run_jobs", lambda *_: pytest.fail("trained"))
    assert quality.main([f"--folder={photo_folder}", f"--out={tmp_path}", *settings(), *options]) == quality.BAD_CONFIG
    assert says in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(photo_folder, tmp_path, capsys):
    assert quality.main([f"--folder={photo_folder}/test", f"--out={tmp_path}", *settings()]) == quality.BAD_CONFIG
    assert "has no labels" in capsys.readouterr().err


def test_a_flag_that_is_none_ends_with_the_code_of_a_bad_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(["--epochs=3"])
    assert ended.value.code == quality.BAD_CONFIG


def test_help_and_list_name_what_there_is(capsys):
    with pytest.raises(SystemExit) as ended:
        quality.main(["--help"])
    assert ended.value.code == 0
    assert "Exit codes" in capsys.readouterr().out
    assert quality.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*quality_plan.COMPARED, *quality_plan.ABLATIONS, *quality_plan.PRESETS))


def test_a_run_of_other_values_is_refused(photo_folder, tmp_path):
    run = plan(photo_folder, tmp_path).runs[0]
    os.makedirs(run.workdir)
    config_lib.save(run.config, os.path.join(run.workdir, "config.json"))
    plan(photo_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"method.koleo_weight is .* there and 0.5 here; .*another --out"):
        plan(photo_folder, tmp_path, more=["method.koleo_weight=0.5"])


def test_an_ablation_that_changes_nothing_is_left_out(photo_folder, tmp_path):
    found = plan(photo_folder, tmp_path, ["lambda_0.1", "prototypes_64"], more=["head.prototypes=64"])
    assert found.same == ["prototypes_64"]
    assert {run.name for run in found.runs} == {"dino", "esvit", "cmd", "lambda_0.1"}


def job(tmp_path, name, code):
    return quality_jobs.Job(name, [sys.executable, "-c", code], str(tmp_path / f"{name}.log"))


def test_a_job_that_fails_is_reported_and_the_others_go_on(tmp_path):
    said = []
    jobs = [
        job(tmp_path, "bad", "print('reason'); raise SystemExit(3)"),
        job(tmp_path, "good", "print('step 1/2'); print('step 2/2')"),
    ]
    assert quality_jobs.run_jobs(jobs, 1, said.append) == {"bad": 3}
    assert [line.split(" (")[0].split(" in ")[0] for line in said if line.startswith(("started", "finished"))] == [
        "started   bad",
        "started   good",
        "finished  good",
    ]
    assert any("failed    bad with code 3" in line for line in said)
    assert any("reason" in line for line in said)
    assert quality_jobs.seconds_per_step(jobs[1].log) is not None


def test_jobs_run_side_by_side(tmp_path):
    meet = "import time, pathlib as p\np.Path({mine!r}).touch()\nwhile not p.Path({other!r}).exists(): time.sleep(0.05)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [job(tmp_path, "one", meet.format(mine=a, other=b)), job(tmp_path, "two", meet.format(mine=b, other=a))]
    assert quality_jobs.run_jobs(jobs, 2, lambda _: None) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_asks_the_jobs_and_ends_with_75(photo_folder, tmp_path, number):
    """A stand-in for the main job says what it got; the command is the real one."""
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(120)"
    )
    code = (
        "import sys\nfrom benchmarks import quality\n"
        "quality.Job = lambda name, command, log: quality_job(name, log)\n"
        "from benchmarks.quality_jobs import Job\n"
        f"def quality_job(name, log): return Job(name, [sys.executable, '-c', {child!r}, {str(tmp_path / 'asked')!r}], log)\n"
        f"sys.exit(quality.main({[f'--folder={photo_folder}', f'--out={tmp_path}', *settings()]!r}))"
    )
    # not its own group: what a terminal sends to all is sent to the command alone, which must pass it on
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "dino" / "seed-0.log"
    deadline = time.monotonic() + 120
    with process:
        try:
            while not (log.exists() and log.read_text().endswith(" ready\n")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == quality.STOPPED, stderr
    assert "run again, it continues" in stderr
    assert (tmp_path / "asked").exists()


def test_a_directory_in_use_is_refused(tmp_path):
    with quality.locked(str(tmp_path)), pytest.raises(ConfigError, match="in use"), quality.locked(str(tmp_path)):
        pass


def test_seconds_of_a_step_leave_out_evaluations(tmp_path):
    log = tmp_path / "log"
    lines = [
        "started: x",
        "  10.00 step 10/40  loss",
        "  20.00 step 20/40  loss",
        "  29.00 teacher:",
        "  90.00 step 30/40  loss",
    ]
    lines += ["  98.00 step 40/40  loss", "started: x", "   1.00 step 20/40  loss", "  13.00 step 30/40  loss"]
    log.write_text("\n".join(lines))
    assert quality_jobs.seconds_per_step(str(log)) == 1.0  # the median of 1, 0.8 and 1.2
    assert quality_jobs.seconds_per_step(str(tmp_path / "none")) is None


def test_leave_one_out_is_knn_of_each_image_among_the_others(monkeypatch):
    monkeypatch.setattr(quality_measure, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(23, 5)).astype(np.float32), rng.integers(3, size=23)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    right = []
    for row in range(23):
        others = np.arange(23) != row
        one = [row]
        neighbours = nearest(features[others], features[one], 4)
        found = knn_classify(neighbours, labels[others], labels[one], k=4, temp=0.07, classes=3)
        right.append(found.top1)
    assert quality_measure.leave_one_out(features, labels, 4, 0.07, 3) == pytest.approx(np.mean(right))


def test_the_feature_is_the_best_on_average_and_the_smaller_of_equals():
    assert quality_measure.choose([{"cls": 10, "mil": 30}, {"cls": 40, "mil": 30}]) == "mil"
    assert quality_measure.choose([{"cls+mean": 30, "mil": 30}]) == "mil"


def test_similarity_to_the_mean_of_an_image():
    tokens = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    found = quality_measure.similarity(tokens)
    np.testing.assert_allclose(found, [[0.5, 0.5, 0.0]])
    assert not quality_measure.similarity(np.ones((1, 4, 3))).any()


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


def test_differences_are_paired_and_to_the_best_baseline_of_the_column():
    found = quality_table.compare(ROWS, ("dino", "esvit"), "cmd")
    rank1 = found["cmd"]["baseline"]["rank1"]
    assert rank1["to"] == "dino"
    paired = np.array([21.0, 12.0, 12.0])
    low, high = stats.t.interval(0.95, 2, loc=paired.mean(), scale=stats.sem(paired))
    assert (rank1["mean"], rank1["low"], rank1["high"]) == pytest.approx((15.0, low, high))
    assert found["cmd"]["baseline"]["linear"]["to"] == "esvit"
    assert found["cmd"]["start"]["rank1"]["mean"] == pytest.approx(35.0)
    assert found["lambda_1"]["cmd"]["rank1"]["mean"] == pytest.approx(-5.0)
    assert found["lambda_1"]["cmd"]["linear"]["mean"] is None
    assert found["dino"].keys() == {"start"}


def test_one_seed_has_no_interval_and_no_deviation():
    assert quality_table.difference({0: 3.0}, {0: 1.0}) == (2.0, None, None)
    assert quality_table.difference({0: 3.0}, {1: 1.0}) is None
    assert quality_table.spread({0: 3.0}) == (3.0, None, 1)
    assert quality_table.spread({0: None}) is None


def test_targets_are_met_or_missed_by_so_much():
    both = ("dino", "esvit")
    found = quality_table.targets(ROWS, quality_table.compare(ROWS, both, "cmd"), both, "cmd")
    assert [quality_table.verdict(one).split(" (")[0] for one in found] == [
        "met",  # 15 of 10
        "met",  # 35 of 20
        "missed by 4.0",  # 6 of 10
        "met",
        "missed by 5.0",  # 55 of 60
    ]
    one_failed = quality_table.targets(ROWS[1:], quality_table.compare(ROWS[1:], both, "cmd"), both, "cmd")
    assert [quality_table.verdict(one) == "not measured" for one in one_failed] == [True, False, True, False, False]
    nothing = quality_table.targets([], {}, both, "cmd")
    assert {quality_table.verdict(one) for one in nothing} == {"not measured"}


def test_tables_have_a_line_a_row():
    text = quality_table.markdown(ROWS, ("dino", "esvit"), "cmd")
    assert "45.0 ± 6.1" in text
    assert "+15.0 [" in text
    for name in ("start", "dino", "esvit", "cmd", "lambda_1"):
        assert f"| {name}" in text


@pytest.mark.long
def test_the_whole_comparison_and_a_second_call_that_trains_nothing(photo_folder, tmp_path, capsys, monkeypatch):
    """The first run is a main job as it is started in earnest, the others train in this process, which takes less time."""
    out = tmp_path / "out"
    options = [f"--folder={photo_folder}", f"--out={out}", "--seeds=0", *settings()]
    runs = {run.title: run for run in plan(photo_folder, out).runs}

    def run_jobs(jobs, at_once, say):
        for other in jobs[1:]:
            train_and_evaluate(runs[other.name].config, runs[other.name].workdir)
        return quality_jobs.run_jobs(jobs[:1], at_once, say)

    monkeypatch.setattr("cmd_jax.train_and_evaluate.write_report", lambda *_: [])
    with monkeypatch.context() as patch:
        patch.setattr(quality, "run_jobs", run_jobs)
        assert quality.main(options) == 0
    first = capsys.readouterr().out
    result = json.loads(first.splitlines()[-1])
    assert list(result["rows"]) == ["dino", "esvit", "cmd"]
    for name, of_row in result["rows"].items():
        assert of_row["feature"] in quality_measure.candidates(plan(photo_folder, out).runs[0].config)
        for column in ("linear", "knn", "rank1", "map"):
            assert 0 <= of_row["numbers"][column]["0"] <= 100
            assert 0 <= of_row["start"][column]["0"] <= 100
        assert of_row["numbers"]["pointing"]["0"] is None  # photos have no parts
        assert (out / name / "seed-0" / "quality.json").exists()
    for name in ("results.md", "results.json", "overlays.png", "curves.png"):
        assert (out / name).stat().st_size > 0
    assert result == json.loads((out / "results.json").read_text())
    assert result["rows"]["dino"]["seconds_per_step"]["0"] > 0
    # Both teachers are those of the run: its own k-NN, of the feature that it is evaluated with, says the same.
    run, feature = runs["cmd/seed-0"], "cls+mean+mil"
    measured = quality_measure.Measurement(run, plan(photo_folder, out).splits, [])
    found = measured.tests(feature)
    pools = measured._states["trained"].train
    assert pools["mil"].shape[1] == 3 * pools["cls"].shape[1]  # of the attention's heads
    for pool in pools.values():
        np.testing.assert_allclose(np.linalg.norm(pool, axis=1), 1, rtol=1e-5)
    assert run.config.eval.features == feature
    for state, step in (("start", 0), ("trained", run.steps)):
        assert found[state]["knn"] == pytest.approx(load_metrics(run.workdir, step)["knn20_top1"])
    monkeypatch.setattr(quality_measure, "build_run", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(quality_jobs, "_Child", lambda *_: pytest.fail("trained again"))
    assert quality.main(options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
