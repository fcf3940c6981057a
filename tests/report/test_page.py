"""The page of a run: complete, well formed, escaped, and with the numbers that were measured."""

import base64
import copy
import hashlib
import itertools
import json
import os
import re

import numpy as np
import pytest

from cmd_jax.report.page import write_report
from tests.report.conftest import Page, renamed, unlabelled

NASTY = ("</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "<!-- {{ 7 * 7 }} &amp;")


def _page(arguments, out):
    """Writes a report into `out` and reads it."""
    evaluation, config, network, teacher, splits, workdir = arguments
    for name in ("config.json", "metrics.jsonl", "eval"):
        if not (out / name).exists():
            os.symlink(os.path.join(workdir, name), out / name)
    paths = write_report(evaluation, config, network, teacher, splits, str(out))
    assert [os.path.relpath(path, out) for path in paths] == ["report/index.html", "report/mil_overlays.png"]
    return (out / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(measured, tmp_path_factory):
    return _page(measured, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_self_contained(text, page):
    assert not page.all("link")
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in page.all("img"))
    scripts = [(attributes, content) for name, attributes, content in page.texts if name == "script"]
    assert [attributes for attributes, _ in scripts] == [{"type": "application/json", "id": "data"}, {}, {}]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    digests = ["sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for _, body in scripts[1:]]
    assert allowed == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(f"'{digest}'" for digest in digests),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(text) < 10e6


def test_the_page_is_well_formed(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.all("a")]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch("h[1-6]", name)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("alt" in attributes for attributes in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in attributes for attributes in page.all("th"))
    named = [a.get("aria-labelledby") for a in page.all("section")]
    assert named
    assert all(name in ids for name in named)
    labels = {attributes["for"] for attributes in page.all("label")}
    assert {a["id"] for tag in ("select", "input") for a in page.all(tag)} == labels
    assert all(attributes["type"] == "button" for attributes in page.all("button"))


def test_metrics_equal_metrics_json(page, finished):
    workdir = finished[0]
    after, before = (json.loads((workdir / "eval" / step / "metrics.json").read_text()) for step in ("6", "0"))
    rows = re.findall(r"^tr$", "\n".join(name for name, attributes in page.tags if "data-key" in attributes), re.M)
    assert len(rows) == len(after["metrics"])
    shown = {attributes["data-key"]: text for name, attributes, text in page.texts if "data-key" in attributes}
    for key, value in after["metrics"].items():
        unit = " %" if after["unit"][key] == "percent" else ""
        assert f"{value:.2f}{unit}" in shown[key] or f"{value:.4g}" in shown[key], key
        assert key not in before["metrics"] or f"{before['metrics'][key]:.2f}" in shown[key] or not unit, key
        assert after["protocol"][key] in shown[key], key
    classes = after["per_class_top1"]["percent"]
    rows = " ".join(text for name, _, text in page.texts if name == "table" and "k-NN top-1 by class" in text).split("\n")
    for name, value in classes.items():
        assert any(name in row and f"{value:.1f}" in row for row in rows), name
    values = [text for name, attributes, text in page.texts if attributes.get("class") == "value"]
    assert 1 <= len(values) <= 4


def test_script_data_agrees_with_the_evaluation(page, measured):
    evaluation, data = measured[0], page.data()
    assert data["map"]["points"]["label"] == evaluation.queries.labels.tolist()
    assert set(data["map"]["points"]["class"]) == {"a class", "b.class", "<script>"}
    similarity = evaluation.queries.features @ evaluation.gallery.features.T
    queries = data["explorer"]["queries"]
    assert len(queries) == len(page.all("button")) - 3 == 12
    for query in queries:
        found = [near["row"] for near in query["neighbours"]]
        assert found == np.argsort(-similarity[query["row"]], kind="stable")[:6].tolist()
        right = evaluation.gallery.labels[found] == evaluation.queries.labels[query["row"]]
        assert [near["right"] for near in query["neighbours"]] == right.tolist()
        assert all(str(row) in data["explorer"]["images"] for row in found)
    titles = set(page.text_of("h3"))
    assert {"Loss", "Loss terms, unweighted", "Training health", "Learning rate", "Throughput"} <= titles


def test_names_of_classes_stay_text(measured, tmp_path):
    text = _page(renamed(measured, NASTY), tmp_path)
    page = Page(text)
    assert "alert(1)</script>" not in text
    assert "<img src=x" not in text
    assert "<!--" not in text.replace("<!doctype", "")[: text.index('<script type="application/json"')]
    assert len(page.all("script")) == 3
    assert set(page.data()["map"]["points"]["class"]) == set(NASTY)
    assert {attributes["value"] for attributes in page.all("option")} == {"", *NASTY}
    titles = page.text_of("h3")
    assert all(name in titles for name in NASTY)


def test_names_of_files_are_short_and_stay_text(measured, tmp_path):
    evaluation, *rest = measured
    names = [f"/secret/place/<b>{number}/&.png" for number in range(12)]
    text = _page((evaluation._replace(queries=evaluation.queries._replace(names=tuple(names))), *rest), tmp_path)
    assert "/secret/place" not in text
    assert "<b>3/" not in text
    assert any("<b>3/&.png" in cell for cell in Page(text).text_of("th"))


def test_without_labels_it_shows_training_images(measured, tmp_path):
    text = _page(unlabelled(measured), tmp_path)
    page = Page(text)
    data = page.data()
    assert "12 training images" in text
    assert len(data["map"]["figure"]["data"][0]["x"]) == 24
    assert all(near["row"] != query["row"] for query in data["explorer"]["queries"] for near in query["neighbours"])
    assert all(query["right"] is None for query in data["explorer"]["queries"])
    assert not page.all("select")
    assert "Most confused" not in text
    assert "1.25" in text


def test_a_page_of_one_image_has_no_neighbours(measured, tmp_path):
    evaluation, config, network, teacher, splits, workdir = unlabelled(measured)
    train = copy.copy(splits.train)
    train.paths, train.labels = train.paths[:1], [-1]
    gallery = evaluation.gallery._replace(**{key: getattr(evaluation.gallery, key)[:1] for key in evaluation.gallery._fields})
    page = Page(
        _page((evaluation._replace(gallery=gallery), config, network, teacher, splits._replace(train=train), workdir), tmp_path)
    )
    assert [query["neighbours"] for query in page.data()["explorer"]["queries"]] == [[]]
