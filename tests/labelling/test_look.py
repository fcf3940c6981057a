"""Images of another subject are found, also where several are alike; findings are made again where they could differ."""

import numpy as np

from cmd_jax.labelling import look
from cmd_jax.labelling.doubles import Look
from cmd_jax.labelling.look import Finding, Looked, _outliers, crowd_similarity
from cmd_jax.labelling.photos import Photos
from cmd_jax.labelling.thumbs import Thumb


def test_a_few_of_another_subject_are_outliers():
    rng = np.random.default_rng(0)
    features = np.repeat(np.eye(2, 8), (200, 4), axis=0) + 0.1 * rng.normal(size=(204, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T - 2 * np.eye(204)
    np.testing.assert_allclose(crowd_similarity(features), np.sort(cosines, axis=1)[:, -20:].mean(axis=1))
    empty = np.full(204, "", object)
    found = _outliers(Photos("", [str(row) for row in range(204)], features, empty, [], empty, empty, [], ""))
    assert {finding.file for finding in found[:4]} == {"200", "201", "202", "203"}
    assert len(found) < 12
    assert _outliers(Photos("", ["one"], features[:1], empty, [], empty, empty, [], "")) == []


def test_findings_are_kept_until_photographs_or_folders_change(tmp_path, monkeypatch):
    path, calls = tmp_path / "look.json", []
    found = Looked([Finding("unreadable", "\udcff.png", "", "empty")], ["1 photograph"])
    monkeypatch.setattr(look, "look", lambda photos: calls.append(photos) or found)
    thumb = Thumb(b"", (1, 1), "digest", Look(np.zeros(1), np.zeros(1)), (0, 0, 0))
    empty = np.full(1, "", object)
    photos = Photos("", ["a.png"], np.ones((1, 2), np.float32), empty, [thumb], empty, empty, [("\udcff.png", "empty")], "")
    changed = [
        photos,
        photos._replace(features=2 * photos.features),
        photos._replace(thumbs=[thumb._replace(digest="another")]),
        photos._replace(classes=np.full(1, "owl", object)),
        photos._replace(splits=np.full(1, "test", object)),
        photos._replace(bad=[]),
    ]
    for number, each in enumerate(changed, 1):
        assert [look.look_again(each, str(path)) for _ in range(2)] == [found, found]
        assert len(calls) == number
    path.write_text(path.read_text()[:-9])
    assert look.look_again(each, str(path)) == found
    assert len(calls) == len(changed) + 1
