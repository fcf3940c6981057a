"""TFDS builder of Stanford Cars over the genuine archives; no TensorFlow.

Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained Categorization, 3dRR 2013. The Stanford links are
dead, so the files must be found elsewhere; where the original digests are known, a file is compared with them.
"""

import io
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.builders.examples import check_counts, example, features
from cmd_jax.errors import DatasetError
from cmd_jax.progress import track

_GONE = "a copy of the original (the links of ai.stanford.edu are dead; 2 GB in all)"
TRAIN = Archive(
    "cars_train.tgz",
    _GONE,
    size=979_269_282,
    sha256="512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288",
)
TEST = Archive(
    "cars_test.tgz",
    _GONE,
    size=977_350_468,
    sha256="bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243",
)
DEVKIT = Archive(
    "car_devkit.tgz",
    _GONE,
    size=330_960,
    sha256="b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd",
)
TEST_LABELS = Archive(
    "cars_test_annos_withlabels.mat",
    _GONE,
    size=185_758,
    sha256="790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05",
)
IMAGES = Archive("car_ims.tgz", _GONE)
ANNOTATIONS = Archive("cars_annos.mat", _GONE)
T = TypeVar("T")


class Car(NamedTuple):
    """One annotated image; `box` is [4] (ymin, xmin, ymax, xmax) in pixels."""

    label: int
    split: str
    box: np.ndarray


class Cars(tfds.core.GeneratorBasedBuilder):
    """Stanford Cars: 196 models of cars with boxes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {TRAIN.name}, {TEST.name}, {DEVKIT.name} and {TEST_LABELS.name}, or {IMAGES.name} and {ANNOTATIONS.name}, "
        "unchanged, into the manual directory."
    )
    # As published in 2013, by split; and the later pair of all images and all annotations.
    LAYOUTS = ((TRAIN, TEST, DEVKIT, TEST_LABELS), (IMAGES, ANNOTATIONS))
    CLASSES, COUNTS = 196, {"train": 8144, "test": 8041}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Stanford Cars with the official split.",
            features=features(self.CLASSES),
            supervised_keys=("image", "label"),
            homepage="https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        paths = archives.locate(os.fspath(dl_manager.manual_dir), self.LAYOUTS, "cars")
        if IMAGES.name in paths:
            class_names, cars = read_combined(paths[ANNOTATIONS.name])
            files = dict.fromkeys(self.COUNTS, paths[IMAGES.name])
        else:
            class_names, cars = read_devkit(paths[DEVKIT.name], paths[TEST_LABELS.name])
            files = {"train": paths[TRAIN.name], "test": paths[TEST.name]}
        splits, where = (car.split for car in cars.values()), os.fspath(dl_manager.manual_dir)
        check_counts(where, "Stanford Cars", splits, self.COUNTS, len(class_names), self.CLASSES)
        self.info.features["label"].names = class_names
        return {split: self._generate_examples(files[split], cars, split) for split in self.COUNTS}

    def _generate_examples(self, archive: str, cars: dict[str, Car], split: str) -> Iterator[tuple[str, dict]]:
        wanted = {path for path, car in cars.items() if car.split == split}
        for path, encoded in track(archives.pictures(archive, wanted), f"cars {split}", len(wanted)):
            yield example(encoded, cars[path].label, path, cars[path].box)


def read_devkit(devkit: str, test_labels: str) -> tuple[list[str], dict[str, Car]]:
    """Names of the classes, and the cars by their path in cars_train.tgz or cars_test.tgz.

    Raises:
        DatasetError: a file is missing or not of this format.
    """
    files = archives.read_all(devkit, {"devkit/cars_meta.mat", "devkit/cars_train_annos.mat"})
    class_names = _class_names(files["devkit/cars_meta.mat"], devkit)
    cars = {}
    for split, content, where in (
        ("train", files["devkit/cars_train_annos.mat"], devkit),
        ("test", _read(test_labels), test_labels),
    ):
        for row in _rows(content, where, "annotations"):
            cars[f"cars_{split}/{_field(row, 'fname', where, str)}"] = _car(row, split, class_names, where)
    return class_names, cars


def read_combined(annotations: str) -> tuple[list[str], dict[str, Car]]:
    """Names of the classes, and the cars by their path in car_ims.tgz.

    Raises:
        DatasetError: the file is not of this format.
    """
    content = _read(annotations)
    class_names = _class_names(content, annotations)
    cars = {}
    for row in _rows(content, annotations, "annotations"):
        split = "test" if _field(row, "test", annotations, int) else "train"
        cars[_field(row, "relative_im_path", annotations, str)] = _car(row, split, class_names, annotations)
    return class_names, cars


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _rows(content: bytes, where: str, variable: str) -> np.ndarray:
    from scipy.io import loadmat  # slow to import, and needed only here

    try:
        return np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True, variable_names=[variable])[variable])
    # scipy raises many types on what is no .mat file; all of them mean the same here.
    except Exception as error:
        raise DatasetError(
            f"{where}: {variable} cannot be read from a .mat file ({type(error).__name__}: {error}); get the file again"
        ) from error


def _class_names(content: bytes, where: str) -> list[str]:
    return [str(name) for name in _rows(content, where, "class_names")]


def _field(row: np.void, name: str, where: str, kind: Callable[[Any], T]) -> T:
    fields = getattr(getattr(row, "dtype", None), "names", None) or ()
    if name not in fields:
        raise DatasetError(
            f"{where}: annotations have no field {name!r}, only {', '.join(fields) or 'none'}; get the file with labels"
        )
    try:
        return kind(row[name])
    except (TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{where}: {name} of an annotation is no {kind.__name__} ({error}); get the file again") from error


def _car(row: np.void, split: str, class_names: list[str], where: str) -> Car:
    xmin, ymin, xmax, ymax = (_field(row, f"bbox_{side}", where, float) for side in ("x1", "y1", "x2", "y2"))
    label = _field(row, "class", where, int) - 1
    if not 0 <= label < len(class_names):
        raise DatasetError(f"{where}: class {label + 1} is none of 1 to {len(class_names)}; get the file again")
    # 1-based, the last pixel included
    return Car(label, split, np.array([ymin - 1, xmin - 1, ymax, xmax]))
