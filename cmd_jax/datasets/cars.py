"""Stanford Cars.

Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained Categorization, 3dRR 2013. The Stanford links are
dead, so the files must be found elsewhere; where the original digests are known, a file is compared with them.
"""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.dataset import Annotation, Annotations, Dataset
from cmd_jax.errors import DatasetError

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


def read_annotations(paths: dict[str, str]) -> Annotations:
    """Annotations of either layout; a path begins with cars_train, cars_test or car_ims as in the archives.

    Args:
        paths: of the layout's files by name.

    Raises:
        DatasetError: a file is missing or not of this format.
    """
    if ANNOTATIONS.name in paths:
        return read_combined(paths[ANNOTATIONS.name])
    devkit, labels = paths[DEVKIT.name], paths[TEST_LABELS.name]
    files = archives.read_all(devkit, {"devkit/cars_meta.mat", "devkit/cars_train_annos.mat"})
    found = Annotations(_class_names(files["devkit/cars_meta.mat"], devkit), {})
    tables = {"train": (files["devkit/cars_train_annos.mat"], devkit), "test": (_read(labels), labels)}
    for split, (content, where) in tables.items():
        for row in _rows(content, where, "annotations"):
            image = f"cars_{split}/{_field(row, 'fname', where, str)}"
            found.images[image] = _annotation(row, split, found.class_names, where)
    return found


def read_combined(path: str) -> Annotations:
    """The annotations of `cars_annos.mat`.

    Raises:
        DatasetError: the file is not of this format.
    """
    content = _read(path)
    found = Annotations(_class_names(content, path), {})
    for row in _rows(content, path, "annotations"):
        split = "test" if _field(row, "test", path, int) else "train"
        found.images[_field(row, "relative_im_path", path, str)] = _annotation(row, split, found.class_names, path)
    return found


def _image_archives(paths: dict[str, str]) -> dict[str, str]:
    if IMAGES.name in paths:
        return dict.fromkeys(("train", "test"), paths[IMAGES.name])
    return {"train": paths[TRAIN.name], "test": paths[TEST.name]}


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
        raise DatasetError(
            f"{where}: {name} of an annotation is not of type {kind.__name__} ({error}); get the file again"
        ) from error


def _annotation(row: np.void, split: str, class_names: list[str], where: str) -> Annotation:
    xmin, ymin, xmax, ymax = (_field(row, f"bbox_{side}", where, float) for side in ("x1", "y1", "x2", "y2"))
    label = _field(row, "class", where, int) - 1
    if not 0 <= label < len(class_names):
        raise DatasetError(f"{where}: class {label + 1} is not in 1..{len(class_names)}; get the file again")
    # 1-based, the last pixel included
    return Annotation(label, split, np.array([ymin - 1, xmin - 1, ymax, xmax]))


CARS = Dataset(
    name="cars",
    title="Stanford Cars",
    description="Stanford Cars with the official split.",
    homepage="https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
    # As published in 2013, by split; and the later pair of all images and all annotations.
    layouts=((TRAIN, TEST, DEVKIT, TEST_LABELS), (IMAGES, ANNOTATIONS)),
    counts={"train": 8144, "test": 8041},
    classes=196,
    read=read_annotations,
    image_archives=_image_archives,
)
