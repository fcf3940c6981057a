"""What experts said is read, added to the history, and never lost; suggestions and links say what they should."""

import os

import numpy as np
import pytest

from cmd_jax.errors import ConfigError, DatasetError
from cmd_jax.labelling import labels as L
from cmd_jax.labelling.links import class_folder, make_links
from cmd_jax.labelling.suggest import BINS, agreement, calibration_error, suggest, to_csv


def _csv(path, *rows):
    path.write_text("".join(f"{row}\n" for row in ("file,class,state,group", *rows)))
    return L.read_labels(str(path))


def test_history_grows_and_conflicts_are_told(tmp_path):
    one = _csv(tmp_path / "1.csv", "a.jpg,Wren,named,1", 'b.jpg,"Owl, barn",named,2', "c.jpg,,,2", "d.jpg,,struck,")
    history, conflicts = L.add([], one)
    assert [(said.file, said.name, said.state) for said in history] == [
        ("a.jpg", "Wren", "named"),
        ("b.jpg", "Owl, barn", "named"),
        ("d.jpg", "", "struck"),
    ]
    assert conflicts == []
    two = _csv(tmp_path / "2.csv", "a.jpg,Wren,named,1", "b.jpg,,open,", "c.jpg,Owl,named,", "d.jpg,Jay,named,", "e.jpg,,open,")
    history, conflicts = L.add(history, two)
    assert conflicts == [("b.jpg", "Owl, barn", "(open)"), ("d.jpg", "(struck)", "Jay")] == L.all_conflicts(history)
    path = str(tmp_path / "history.csv")
    L.write_history(path, history)
    assert L.read_history(path) == history
    assert len(history) == 6
    assert L.add(history, one) == (history, [])  # an old file does not bring back what a later one has changed
    now = {file: (said.name, said.state) for file, said in L.current(history).items()}
    assert now == {"a.jpg": ("Wren", "named"), "b.jpg": ("", "open"), "c.jpg": ("Owl", "named"), "d.jpg": ("Jay", "named")}


def test_what_is_ruled_out_stays_ruled_out(tmp_path):
    one = _csv(tmp_path / "1.csv", "a.jpg,,,", "b.jpg,Jay,named,", "a.jpg,Wren,not,", "a.jpg,Owl,not,", "b.jpg,Wren,not,")
    history, conflicts = L.add([], one)
    assert conflicts == []
    path = str(tmp_path / "history.csv")
    L.write_history(path, history)
    assert L.read_history(path) == history
    now = {"a.jpg": ("", "open", {"Wren", "Owl"}), "b.jpg": ("Jay", "named", {"Wren"})}
    assert L.current(history) == now
    silent = _csv(tmp_path / "2.csv", "a.jpg,,,", "a.jpg,Owl,not,", "b.jpg,Jay,named,")
    assert L.add(history, silent) == (history, [])  # saying less takes nothing back
    other = _csv(tmp_path / "3.csv", "a.jpg,Owl,named,", "b.jpg,,open,", "b.jpg,Jay,not,")
    history, conflicts = L.add(history, other)
    assert conflicts == [("a.jpg", "(not Owl)", "Owl"), ("b.jpg", "Jay", "(open)")] == L.all_conflicts(history)
    assert L.current(history) == {"a.jpg": ("Owl", "named", {"Wren"}), "b.jpg": ("", "open", {"Wren", "Jay"})}
    history, conflicts = L.add(history, _csv(tmp_path / "4.csv", "a.jpg,Owl,not,"))
    assert conflicts == [("a.jpg", "Owl", "(not Owl)")]
    assert L.current(history)["a.jpg"] == ("", "open", {"Wren", "Owl"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,class\n", "has no column file"),
        ("file,class,state\na,b,maybe\n", "line 2: state 'maybe' is none of named, struck, not, open"),
        ("file,class,state\na,,not\n", "line 2: state 'not' names no class"),
        ("file,class\na\n", "line 2: a file or a class is missing"),
        ('file,class\n"a,b\n', "is no table"),
        (b"file,class\n\xff,a\n", "is no table"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=message):
        L.read_labels(str(path))
    with pytest.raises(DatasetError, match="does not exist; save it in the page"):
        L.read_labels(str(tmp_path / "none.csv"))


def test_calibration_error_is_the_sum_over_bins():
    rng = np.random.default_rng(0)
    probability, right = rng.random(500), (rng.random(500) < 0.6).astype(float)
    expected = 0.0
    for low in range(BINS):
        inside = (probability >= low / BINS) & (probability < (low + 1) / BINS)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - probability[inside].mean())
    assert calibration_error(probability, right) == pytest.approx(expected)


def test_suggestions_and_their_agreement_with_folders():
    features = np.repeat(np.eye(4), 5, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(20, 4))
    truth = np.repeat(np.array(["a", "b", "c", ""], object), 5)
    labels = [None] * 20
    for row, name in ((0, "Wren"), (1, "Wren"), (5, "Owl"), (6, "Owl"), (10, "Jay"), (11, "Jay")):
        labels[row] = name
    found = suggest(features, labels)
    assert list(found.classes[:15]) == ["Wren"] * 5 + ["Owl"] * 5 + ["Jay"] * 5
    assert set(found.nearest[7:10]) <= {5, 6}
    labelled = np.array([label is not None for label in labels])
    agreed = agreement(found, labelled, truth)
    assert (agreed.images, agreed.accuracy) == (9, 1.0)
    assert agreement(found, labelled, np.full(20, "", object)) is None
    again = suggest(features, labels, {2: {"Wren"}, 3: {"Wren", "Owl", "Jay"}})
    assert again.classes[2] in {"Owl", "Jay"}
    assert (bool(again.unknown[3]), again.probability[3]) == (True, 0)
    table = to_csv(found._replace(unknown=np.arange(20) == 2), [f"{row}.jpg" for row in range(20)], np.array([2]))
    assert (
        table == f"file,class,probability,unknown,nearest\n2.jpg,Wren,{found.probability[2]:.4f},yes,{found.nearest[2]}.jpg\n"
    )
    for wrong, message in (([None] * 20, "no image has a label"), (["a"], "1 labels for 20 images")):
        with pytest.raises(ConfigError, match=message):
            suggest(features, wrong)


def test_links_are_made_again_and_touch_nothing_else(tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "x").mkdir(parents=True)
    for name in ("x/1.jpg", "x%2F1.jpg", "2.jpg"):
        (photos / name).write_text(name)
    make_links(str(photos), str(out), [("x/1.jpg", "../Wren"), ("x%2F1.jpg", "../Wren")], ["2.jpg"])
    make_links(str(photos), str(out), [("x/1.jpg", "Owl/barn"), ("x%2F1.jpg", "Owl/barn")], ["2.jpg"])
    links = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_symlink()}
    folder = "train/Owl%2Fbarn"
    assert links == {f"{folder}/x%2F1.jpg": "x/1.jpg", f"{folder}/x%252F1.jpg": "x%2F1.jpg", "rest/2.jpg": "2.jpg"}
    assert class_folder("../Wren") == "%2E.%2FWren"
    assert sorted(os.listdir(tmp_path)) == ["out", "photos"]
    for place, message in ((photos / "links", "lies in --images"), (photos / "2.jpg", "lies in"), (tmp_path, "has not made")):
        with pytest.raises(ConfigError, match=message):
            make_links(str(photos), str(place), [], [])
