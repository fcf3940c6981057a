"""Identifies the images of a run: recorded in its work directory at the start, compared when it resumes or is evaluated.

A folder is identified by the names of its images relative to it, in their order, with the size and the class of each; a
prepared TFDS dataset by its name, version and number of images. Neither depends on the host or on where the data lies, and no
image is read.
"""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.data.sources import UNLABELLED, Source
from cmd_jax.errors import ConfigError
from cmd_jax.text import printable

NAME = "data.json"
LISTINGS = "data"  # directory of SPLIT.tsv.gz
SPLITS = {"train": "training images", "eval_train": "gallery images", "eval_test": "test images"}
SHOWN = 3  # differences that are named, of each kind
STAT_THREADS, STAT_PATHS = 16, 1000


class Split(NamedTuple):
    """One split of a dataset.

    Attributes:
        summary: number of images and classes or, of a TFDS dataset, name and version; compared.
        digest: of all that is compared, 64 hexadecimal digits.
        source: of the images.
        folder: that holds them; None of a TFDS dataset.
        sizes: [N] int64, bytes of each image of a folder.
    """

    summary: dict[str, Any]
    digest: str
    source: Source
    folder: str | None = None
    sizes: np.ndarray | None = None

    def listing(self) -> Iterator[str]:
        """A line for every image of a folder, in order: bytes, class and name, between tabs; none of a TFDS dataset."""
        if self.folder is not None:
            yield from _lines(self.source, self.folder, self.sizes)

    def recorded(self) -> dict[str, Any]:
        """Its entry of `data.json`."""
        return {**self.summary, "digest": self.digest}


def identify(source: Source, section: ConfigDict) -> Split:
    """Identifies a split; takes one `stat` an image of a folder.

    Args:
        source: the split, as `open_source` opens it.
        section: the config's section `data` that it was opened with.
    """
    if section.source == "folder":
        folder, sizes = os.path.expanduser(section.folder), _sizes(source.paths)
        summary = {"images": len(source), "classes": len(source.class_names)}
        digest = hashlib.sha256()
        for line in _lines(source, folder, sizes):
            digest.update(line.encode())
        return Split(summary, digest.hexdigest(), source, folder, sizes)
    (path,) = (path for path in source.files if os.path.basename(path) == "dataset_info.json")
    info = json.loads(files.read(path))
    name = "/".join(filter(None, (info["name"], info.get("configName"))))
    summary = {"dataset": name, "version": info["version"], "images": len(source)}
    return Split(summary, hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest(), source)


def record(workdir: str, splits: dict[str, Split]) -> None:
    """Writes `data.json`, and the listings that name the differences later.

    Args:
        workdir: of the run.
        splits: by their keys in SPLITS.
    """
    files.make_directory(os.path.join(workdir, LISTINGS))
    for name, split in splits.items():
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
            file.writelines(line.encode() for line in split.listing())
        files.write(_listing_path(workdir, name), packed.getvalue())
    recorded = {name: split.recorded() for name, split in splits.items()}
    files.write(os.path.join(workdir, NAME), json.dumps(recorded, indent=2) + "\n")  # last: the listings are there


def brief(splits: dict[str, Split]) -> dict[str, list | None]:
    """Count and half of the digest of every split by its title; None for a missing split."""
    of = lambda split: [len(split.source), split.digest[:32]] if split else None
    return {title: of(splits.get(name)) for name, title in SPLITS.items()}


def is_recorded(workdir: str) -> bool:
    """Whether a run has recorded its images; those of earlier versions have not."""
    return files.exists(os.path.join(workdir, NAME))


def differences(workdir: str, splits: dict[str, Split], without: tuple[str, ...] = ()) -> list[str]:
    """Describes how images differ from those of a run: a phrase for each split that differs.

    Args:
        workdir: of the run, which has recorded its images.
        splits: the others, by their keys in SPLITS.
        without: keys of splits that are not compared.

    Raises:
        ConfigError: `data.json` is damaged.
    """
    path = os.path.join(workdir, NAME)
    try:
        recorded = {name: dict(entry) for name, entry in json.loads(files.read(path)).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or remove it if the images are those of the run"
        ) from error
    found = []
    for name, title in SPLITS.items():
        before, now = recorded.get(name), splits.get(name)
        if name in without or (before is None and now is None):
            continue
        if before is None or now is None:
            found.append(f"the {title}: {_count(before)} then, {_count(now and now.summary)} now")
        elif before.get("digest") != now.digest:
            found.append(f"the {title}: {_changes(workdir, name, before, now)}")
    return found


def _changes(workdir: str, name: str, before: dict[str, Any], now: Split) -> str:
    """What differs in one split, the first images by name."""
    path = _listing_path(workdir, name)
    if now.folder is None or "dataset" in before or not files.exists(path):
        keys = [key for key in {**before, **now.summary} if key != "digest" and before.get(key) != now.summary.get(key)]
        return ", ".join(f"{key} {before.get(key)} then, {now.summary.get(key)} now" for key in keys) or "other images"
    with gzip.open(io.BytesIO(files.read_bytes(path)), "rt", encoding="utf-8", newline="\n") as file:
        left = dict(_parsed(line) for line in file)
    changed: dict[str, list[str]] = {"added": [], "of another size": [], "of another class": [], "removed": []}
    for line in now.listing():
        image, facts = _parsed(line)
        then = left.pop(image, None)
        if then is None:
            changed["added"].append(image)
        elif then != facts:
            changed["of another size" if then[0] != facts[0] else "of another class"].append(image)
    changed["removed"] = list(left)
    phrases = [
        f"{len(images):,} {kind} ({', '.join(map(printable, images[:SHOWN]))}{', ...' if len(images) > SHOWN else ''})"
        for kind, images in changed.items()
        if images
    ]
    return ", ".join(phrases) or "the same in another order"


def _sizes(paths: list[str]) -> np.ndarray:
    chunks = (paths[start : start + STAT_PATHS] for start in range(0, len(paths), STAT_PATHS))
    with ThreadPoolExecutor(STAT_THREADS) as pool:  # a network file system answers many questions at once
        parts = pool.map(lambda chunk: np.array([os.stat(path).st_size for path in chunk], np.int64), chunks)
        return np.concatenate([np.zeros(0, np.int64), *parts])


def _lines(source: Source, folder: str, sizes: np.ndarray) -> Iterator[str]:
    prefix = os.path.join(folder, "")
    for path, label, size in zip(source.paths, source.labels, sizes, strict=True):
        image = path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, folder)
        of_class = "" if label == UNLABELLED else source.class_names[label]
        yield f"{size}\t{json.dumps(of_class)}\t{json.dumps(image.replace(os.sep, '/'))}\n"


def _parsed(line: str) -> tuple[str, tuple[str, str]]:
    size, of_class, image = line.rstrip("\n").split("\t")
    return json.loads(image), (size, of_class)


def _count(summary: dict[str, Any] | None) -> str:
    return f"{summary['images']:,}" if summary else "none"


def _listing_path(workdir: str, name: str) -> str:
    return os.path.join(workdir, LISTINGS, f"{name}.tsv.gz")
