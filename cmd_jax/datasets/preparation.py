"""Prepares and describes a dataset: download, ArrayRecord, counts, histogram, contact sheet, digests."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cmd_jax import files
from cmd_jax.config import TFDS_PREFIX, ConfigDict, default
from cmd_jax.data.decode import decode_record
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.sources import SPLITS, Source
from cmd_jax.datasets import archives, manifest
from cmd_jax.datasets.download import download
from cmd_jax.datasets.manifest import MANIFEST
from cmd_jax.datasets.prepared import DATASETS, is_prepared, manual_directory, open_source
from cmd_jax.errors import BadImage, ConfigError
from cmd_jax.progress import track

SUMMARY, SHEET, VIEWS = "summary.json", "contact_sheet.png", "views.png"
SHEET_ROWS, SHEET_COLUMNS, THUMB_PX, CAPTION_PX = 6, 8, 144, 14
BINS, BAR = 8, 40


def prepare_dataset(
    name: str,
    data_dir: str,
    manual_dir: str | None,
    verify: bool,
    threads: int,
    draw_views: Callable[[Source, ConfigDict], Image.Image] | None = None,
) -> list[str]:
    """Prepares a dataset and describes it; steps that were done before are skipped.

    Beside the ArrayRecord files it writes `manifest.sha256` (for `sha256sum --check`), `summary.json` (counts of every class
    and digests of the archives) and `contact_sheet.png`.

    Args:
        name: one of `prepared.DATASETS`, or tfds:NAME.
        data_dir: of TFDS.
        manual_dir: where archives lie, or are downloaded to; None is DATA_DIR/downloads/manual.
        verify: compare all files with the manifest and decode every image.
        threads: that decode.
        draw_views: `views_figure.views_figure`, to write `views.png` too: the views that training makes of the first image.

    Returns:
        Lines to print.

    Raises:
        ConfigError: there is no such dataset.
        DatasetError: an archive is missing or damaged, or a file is not what it was.
        BadImage: an image cannot be decoded.
    """
    if name not in DATASETS and not (name.startswith(TFDS_PREFIX) and name != TFDS_PREFIX):
        raise ConfigError(f"there is no dataset {name!r}; use one of {', '.join(DATASETS)}, or tfds:NAME for any of TFDS")
    digests = {} if name.startswith(TFDS_PREFIX) else _archives(name, data_dir, manual_dir)
    section = default().data
    section.source, section.data_dir, section.manual_dir = name, data_dir, manual_dir
    splits = {split: open_source(section, split) for split in SPLITS}
    paths = splits["train"].files
    directory = os.path.dirname(paths[0])
    _digest(directory, paths, "the prepared files", verify, f"remove {directory} and prepare again")
    if verify:
        _decode_all(splits, threads)
    summary = _summary(directory, name, splits, digests)
    sheet = os.path.join(directory, SHEET)
    if not os.path.exists(sheet):
        _save(contact_sheet(splits["train"], summary), sheet)
    written = [MANIFEST, SUMMARY, SHEET]
    if draw_views:
        config = default()
        config.data = section
        _save(draw_views(splits["train"], config), os.path.join(directory, VIEWS))
        written.append(VIEWS)
    return [*describe(summary), f"wrote {directory}: {', '.join(written)}; {_checked(verify)}"]


def prepare_folder(folder: str, verify: bool, threads: int) -> list[str]:
    """Counts the images of a folder, and writes their `manifest.sha256` into it if there is none yet.

    Nothing else is written: an image in the folder would be trained on.

    Args:
        folder: as data.folder.
        verify: compare all files with the manifest and decode every image.
        threads: that decode.

    Returns:
        Lines to print.

    Raises:
        ConfigError: the folder is missing or holds nothing usable.
        DatasetError: a file cannot be read or is not what it was, or the folder cannot be written to.
        BadImage: an image cannot be decoded.
    """
    folder = os.path.expanduser(folder)
    splits = {split: FolderSource(folder, split) for split in SPLITS}
    paths = [path for source in splits.values() for path in source.files]
    restore = f"restore the files, or remove {os.path.join(folder, MANIFEST)} and run again to take the folder as it is"
    written = _digest(folder, paths, "the images", verify, restore)
    if verify:
        _decode_all(splits, threads)
    lines = describe(_count(folder, splits))
    notes = [f"{split}: {source.note}" for split, source in splits.items() if source.note]
    return [*lines, *notes, f"{'wrote' if written else 'has'} {os.path.join(folder, MANIFEST)}; {_checked(verify)}"]


def _digest(directory: str, paths: list[str], what: str, verify: bool, remedy: str) -> bool:
    """Writes a manifest if there is none, and returns whether it did; else compares it if asked to."""
    if not manifest.exists(directory):
        manifest.write(directory, paths, what)
        return True
    if verify:
        manifest.compare(directory, paths, what, remedy)
    return False


def _checked(verify: bool) -> str:
    return "all files and images are right" if verify else "not verified (--verify compares files and decodes images)"


def _archives(name: str, data_dir: str, manual_dir: str | None) -> dict[str, str]:
    """Downloads missing archives that have a url, and returns sha256 by name; nothing if the dataset is already prepared."""
    layouts, manual = DATASETS[name].layouts, manual_directory(data_dir, manual_dir)
    if not layouts or is_prepared(name, data_dir):
        return {}
    fetched = set()
    for archive in layouts[0]:
        if archive.url and not os.path.exists(os.path.join(manual, archive.name)):
            download(archive, manual)
            fetched.add(archive.name)
    paths = archives.locate(manual, layouts, name)
    registered = {archive.name: archive for layout in layouts for archive in layout}
    return {
        file: registered[file].sha256 if file in fetched else archives.check(path, registered[file])
        for file, path in paths.items()
    }


def _decode_all(splits: dict[str, Source], threads: int) -> None:
    """Raises BadImage with the first bad image and their number, after all were tried."""
    bad: list[str] = []

    def attempt(source: Source, index: int) -> None:
        try:
            decode_record(source[index])
        except BadImage as error:
            bad.append(str(error))

    with ThreadPoolExecutor(threads) as pool:
        for split, source in splits.items():
            jobs = pool.map(lambda index, source=source: attempt(source, index), range(len(source)))
            for _ in track(jobs, f"decoding {split}", len(source)):
                pass
    if bad:
        raise BadImage(f"{min(bad)} ({len(bad)} of {sum(map(len, splits.values())):,} images are bad)")


def _summary(directory: str, name: str, splits: dict[str, Source], digests: dict[str, str]) -> dict[str, Any]:
    """Counts of every class in both splits; written once, then read back."""
    path = os.path.join(directory, SUMMARY)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    summary = _count(name, splits) | {"archives": digests}
    files.write(path, json.dumps(summary, indent=2) + "\n")
    return summary


def _count(name: str, splits: dict[str, Source]) -> dict[str, Any]:
    names = splits["train"].class_names
    summary: dict[str, Any] = {"name": name, "images": {}, "classes": len(names), "per_class": {}}
    for split, source in splits.items():
        labels = source.labels if isinstance(source, FolderSource) else (source[at].label for at in range(len(source)))
        counts = Counter(track(labels, f"counting {split}", len(source)))
        summary["images"][split] = len(source)
        summary["per_class"][split] = {class_name: counts[label] for label, class_name in enumerate(names)}
    return summary


def describe(summary: dict[str, Any]) -> list[str]:
    """Lines with the counts and a histogram of images per class."""
    images = ", ".join(f"{count:,} {split}" for split, count in summary["images"].items())
    lines = [f"{summary['name']}: {images} images, {summary['classes']} classes"]
    for split, per_class in summary["per_class"].items():
        counts = np.array([*per_class.values()], int)
        if not counts.sum():
            continue
        rarest, commonest = min(per_class, key=per_class.get), max(per_class, key=per_class.get)
        if counts.min() == counts.max():
            lines.append(f"{split}: {counts.min()} images in every class")
            continue
        lines.append(
            f"{split}: {counts.min()} ({rarest}) to {counts.max()} ({commonest}) images a class, median {np.median(counts):g}"
        )
        edges = np.unique(np.linspace(counts.min(), counts.max() + 1, min(BINS, np.ptp(counts) + 1) + 1).astype(int))
        classes, _ = np.histogram(counts, edges)
        for low, high, number in zip(edges[:-1], edges[1:] - 1, classes, strict=True):
            span = f"{low}" if low == high else f"{low}-{high}"
            lines.append(f"  {span:>11} images {'#' * round(BAR * number / classes.max()):{BAR}} {number} classes")
    return lines


def contact_sheet(source: Source, summary: dict[str, Any]) -> Image.Image:
    """Draws images of classes spread over the dataset, as training sees them, with their parts."""
    wanted = SHEET_ROWS * SHEET_COLUMNS
    labels = np.array([source[index].label for index in range(len(source))])
    if summary["classes"]:
        classes = np.unique(np.linspace(0, summary["classes"] - 1, min(wanted, summary["classes"])).astype(int))
        members = [np.flatnonzero(labels == label) for label in classes]
        rounds = -(-wanted // len(classes))
        chosen = [found[turn] for turn in range(rounds) for found in members if turn < len(found)][:wanted]
        chosen.sort(key=labels.__getitem__)
    else:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(wanted, len(source))).astype(int))
    rows = -(-len(chosen) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMB_PX, rows * (THUMB_PX + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, index in enumerate(chosen):
        record = source[int(index)]
        image = Image.fromarray(decode_record(record))
        image.thumbnail((THUMB_PX - 4, THUMB_PX - 4))
        left, top = cell % SHEET_COLUMNS * THUMB_PX, cell // SHEET_COLUMNS * (THUMB_PX + CAPTION_PX)
        sheet.paste(image, (left, top))
        scale = np.tile(image.size[::-1], 2)
        for ymin, xmin, ymax, xmax in record.part_boxes * scale:
            if ymax > ymin and xmax > xmin:
                draw.rectangle((left + xmin, top + ymin, left + xmax, top + ymax), outline="yellow")
        if record.label >= 0:
            caption = source.class_names[record.label].encode("ascii", "replace").decode()[: THUMB_PX // 6]
            draw.text((left + 2, top + THUMB_PX - 2), caption, fill="black")
    return sheet


def _save(image: Image.Image, path: str) -> None:
    encoded = io.BytesIO()
    image.save(encoded, "png")
    files.write(path, encoded.getvalue())
