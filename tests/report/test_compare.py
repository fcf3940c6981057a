"""Several runs on one page, and the report binary."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cmd_jax.errors import ConfigError
from cmd_jax.report.compare import different_names, number_table, read_runs, write_comparison
from tests.report.conftest import Page

NASTY = "<img src=x onerror=alert(1)>"


def _copy(workdir, to, metrics, interval=None, **values):
    """A run's files with other numbers and values of the configuration; no checkpoint."""
    os.makedirs(to / "eval")
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(workdir / name, to / name)
    shutil.copytree(workdir / "eval", to / "eval", dirs_exist_ok=True)
    path = to / "eval" / "6" / "metrics.json"
    content = json.loads(path.read_text())
    content["metrics"] |= metrics
    content["interval"] = interval or {}
    path.write_text(json.dumps(content))
    config = json.loads((to / "config.json").read_text())
    for key, value in values.items():
        section, name = key.split("__")
        config[section][name] = value
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


@pytest.fixture(scope="module")
def three(finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        _copy(finished[0], root / "a", {"rank1": 40.0, "map": 30.0}, {"rank1": [35.0, 45.0]}, optim__lr=1e-3),
        _copy(finished[0], root / NASTY, {"rank1": 44.0, "map": 20.0}, {"rank1": [39.0, 49.0]}),
        _copy(finished[0], root / "c", {"rank1": 20.0, "map": 10.0}, {"rank1": [15.0, 25.0]}),
    ]


def test_the_best_and_overlapping_intervals_are_marked(three):
    table = {row["key"]: row for row in number_table(read_runs(three))}
    assert [mark for _, mark in table["rank1"]["cells"]] == ["tie", "best", ""]
    assert [mark for _, mark in table["map"]["cells"]] == ["best", "", ""]
    assert table["rank1"]["cells"][1][0].value == "44.00 %"
    assert table["rank1"]["cells"][1][0].interval == "39.00 % to 49.00 %"
    assert table["rank1"]["same"]


def test_different_protocols_are_named(three, tmp_path):
    shutil.copytree(three[0], tmp_path / "other")
    path = tmp_path / "other" / "eval" / "6" / "metrics.json"
    content = json.loads(path.read_text())
    content["protocol"]["rank1"] = "another"
    path.write_text(json.dumps(content))
    row = next(row for row in number_table(read_runs([three[0], str(tmp_path / "other")])) if row["key"] == "rank1")
    assert not row["same"]
    assert row["protocols"][1] == "another"


def test_the_page_shows_numbers_curves_and_differences(three, tmp_path):
    (path,) = write_comparison(three, str(tmp_path / "out"))
    text = Path(path).read_text(encoding="utf-8")
    page = Page(text)
    assert NASTY not in text
    assert NASTY in page.text_of("h2")
    assert page.text_of("h1") == ["3 runs"]
    tables = page.text_of("table")
    differences = next(table for table in tables if "Differences of the configurations" in table)
    assert "optim.lr" in differences
    assert "0.001" in differences
    assert "train.epochs" not in differences
    legends = [text for name, attributes, text in page.texts if attributes.get("class") == "legend"]
    assert len(legends) == len(page.data()["charts"]) > 0
    assert {legend.strip() for legend in legends} == {f"a{NASTY}c"}
    assert {len(chart["figure"]["data"]) for chart in page.data()["charts"]} == {3}


def test_unevaluated_and_old_runs_are_shown(three, finished, tmp_path):
    shutil.copytree(three[0], tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "eval")
    shutil.copytree(three[0], tmp_path / "old")
    path = tmp_path / "old" / "eval" / "6" / "metrics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("step", "metrics", "protocol")}))
    (page,) = write_comparison([str(tmp_path / "bare"), str(tmp_path / "old"), three[2]], str(tmp_path / "out"))
    text = Path(page).read_text(encoding="utf-8")
    assert "not evaluated" in text
    assert "not measured" in text
    assert "40.00 %" in text


def test_run_names_differ():
    assert different_names(["/x/a", "/x/b"]) == ["a", "b"]
    assert different_names(["/x/demo", "/y/demo"]) == ["x/demo", "y/demo"]


def test_directories_without_a_run_are_refused(three, tmp_path):
    with pytest.raises(ConfigError, match="is given twice; name each run once"):
        read_runs([three[0], three[0] + "/"])
    with pytest.raises(ConfigError, match=r"has no config.json; give the --workdir of a run of cmd_jax.main"):
        read_runs([three[0], str(tmp_path)])


@pytest.fixture
def run(programs):
    return lambda *arguments: programs.run("cmd_jax.report", *arguments)


def test_the_binary_compares(run, three, tmp_path):
    out = run(*(f"--workdir={path}" for path in three), f"--out={tmp_path / 'out'}")
    assert (out.returncode, out.stdout) == (0, f"wrote {tmp_path / 'out' / 'index.html'}\n"), out.stderr


def test_the_binary_rewrites_a_page(run, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "report")
    out = run(f"--workdir={workdir}")
    assert out.returncode == 0, out.stderr
    assert f"wrote {workdir / 'report' / 'index.html'}" in out.stdout
    assert (workdir / "report" / "index.html").read_bytes().startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", NASTY), "--out=DIR is for the page that compares several --workdir"),
        (("a", "--out=x"), "--out=DIR is for the page that compares several --workdir"),
        (("a", "c", "--out=x", "--step=3"), "--step and --best are for one --workdir"),
    ],
)
def test_a_mistake_gets_one_line(run, three, arguments, message):
    root = os.path.dirname(three[0])
    flags = [word if word.startswith("--") else f"--workdir={root}/{word}" for word in arguments]
    out = run(*flags)
    assert (out.returncode, out.stderr.count("\n")) == (64, 1), out.stderr
    assert message in out.stderr
