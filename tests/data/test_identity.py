"""What identifies the images of a run, and how differences are named."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from cmd_jax.config import default
from cmd_jax.data import identity
from cmd_jax.data.identity import differences, identify, record
from cmd_jax.datasets.prepared import open_source
from cmd_jax.errors import ConfigError


def _fill(folder):
    """Five files of 1 to 5 bytes in two classes."""
    for size, name in enumerate(("a/0", "a/1", "a/2 ü\t", "b/0", "b/1"), start=1):
        path = folder / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return folder


def _identify(folder):
    section = default().data
    section.source, section.folder = "folder", str(folder)
    return {"train": identify(open_source(section, "train"), section)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "STAT_PATHS", 2)
    return _fill(tmp_path / "photos")


@pytest.fixture
def workdir(tmp_path, folder):
    (tmp_path / "run").mkdir()
    record(str(tmp_path / "run"), _identify(folder))
    return str(tmp_path / "run")


def test_moved_folders_are_the_same(folder, workdir, tmp_path, monkeypatch):
    shutil.move(folder, tmp_path / "moved")
    assert differences(workdir, _identify(tmp_path / "moved")) == []
    assert differences(workdir, _identify(f"{tmp_path}/moved/")) == []
    monkeypatch.chdir(tmp_path)
    assert differences(workdir, _identify("moved")) == []
    with open(f"{workdir}/data.json", encoding="utf-8") as file:
        recorded = json.load(file)["train"]
    # Another value would refuse the runs of earlier versions.
    digest = "329527868f7cc3f6d57d10055d10ee5b25b1fc4f1d17cc47f9fadc740cad86f7"
    assert recorded == {"images": 5, "classes": 2, "digest": digest}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda train: os.remove(train / "a" / "1.png"), "1 removed (train/a/1.png)"),
        (lambda train: (train / "b" / "00.png").write_bytes(b""), "1 added (train/b/00.png)"),
        (lambda train: (train / "b" / "0.png").write_bytes(b""), "1 of another size (train/b/0.png)"),
        (
            lambda train: os.rename(train / "a", train / "c"),
            "3 added (train/c/0.png, train/c/1.png, train/c/2 ü\\t.png), "
            "3 removed (train/a/0.png, train/a/1.png, train/a/2 ü\\t.png)",
        ),
        (
            lambda train: [(train / "b" / f"{number:02}.png").write_bytes(b"") for number in range(4)],
            "4 added (train/b/00.png, train/b/01.png, train/b/02.png, ...)",
        ),
    ],
    ids=["removed", "added", "size", "class renamed", "many"],
)
def test_differences_are_counted_and_named(folder, workdir, change, found):
    change(folder / "train")
    assert differences(workdir, _identify(folder)) == [f"the training images: {found}"]


def test_order_and_classes_count(folder, workdir):
    """Whatever way of reading the same folder changes them."""
    section = default().data
    section.source, section.folder = "folder", str(folder)
    source = open_source(section, "train")
    fields = {"files": source.files, "class_names": source.class_names}

    class Changed(SimpleNamespace):
        def __len__(self):
            return len(self.paths)

    backwards = Changed(paths=source.paths[::-1], labels=source.labels[::-1], **fields)
    relabelled = Changed(paths=source.paths, labels=[1, *source.labels[1:]], **fields)
    assert differences(workdir, {"train": identify(backwards, section)}) == ["the training images: the same in another order"]
    assert differences(workdir, {"train": identify(relabelled, section)}) == [
        "the training images: 1 of another class (train/a/0.png)"
    ]


def test_added_and_removed_splits(folder, workdir):
    images = _identify(folder)
    both = images | {"eval_test": images["train"]}
    assert differences(workdir, both) == ["the test images: none then, 5 now"]
    assert differences(workdir, both, without=("eval_test",)) == []
    record(workdir, both)
    assert differences(workdir, images) == ["the test images: 5 then, none now"]


def test_without_the_listing_the_numbers_differ(folder, workdir):
    os.remove(folder / "train" / "a" / "0.png")
    os.remove(f"{workdir}/data/train.tsv.gz")
    assert differences(workdir, _identify(folder)) == ["the training images: images 5 then, 4 now"]


def test_prepared_datasets_are_compared_by_version(tmp_path, folder, workdir):
    section = default().data

    def prepared(version, count, config="family"):
        info = tmp_path / "dataset_info.json"
        info.write_text(json.dumps({"name": "aircraft", "configName": config, "version": version}))

        class Rows(SimpleNamespace):
            def __len__(self):
                return count

        return {"train": identify(Rows(files=[str(info), "train.array_record"]), section)}

    record(workdir, prepared("1.0.0", 7))
    assert differences(workdir, prepared("1.0.0", 7)) == []
    assert differences(workdir, prepared("1.1.0", 8)) == [
        "the training images: version 1.0.0 then, 1.1.0 now, images 7 then, 8 now"
    ]
    assert differences(workdir, prepared("1.0.0", 7, "variant")) == [
        "the training images: dataset aircraft/family then, aircraft/variant now"
    ]
    assert "images 7 then, 5 now" in differences(workdir, _identify(folder))[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"train": 1}'])
def test_a_damaged_record_is_named(folder, workdir, content):
    with open(f"{workdir}/data.json", "w", encoding="utf-8") as file:
        file.write(content)
    with pytest.raises(ConfigError, match=r"run/data\.json is damaged .* restore it, or remove it"):
        differences(workdir, _identify(folder))


def test_one_stat_per_image(folder, workdir, monkeypatch):
    asked = []
    section = default().data
    section.source, section.folder = "folder", str(folder)
    source = open_source(section, "train")
    with monkeypatch.context() as patch:
        stat = os.stat
        patch.setattr(identity.os, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
        images = {"train": identify(source, section)}
        list(images["train"].listing())
    assert sorted(asked) == source.paths
