"""CUB-200-2011 and NABirds, which come as the same text tables.

Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001.
Van Horn, Branson, Farrell, Haber, Barry, Ipeirotis, Perona, Belongie: Building a bird recognition app and large scale
dataset with citizen scientists, CVPR 2015.
"""

import numpy as np

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.dataset import Annotation, Annotations, Dataset, text_rows
from cmd_jax.errors import DatasetError

FILES = (
    "classes.txt",
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "parts/part_locs.txt",
)


def read_annotations(archive: str, root: str, parts: int) -> Annotations:
    """Reads the tables of an archive.

    Args:
        archive: path of the gzipped tar.
        root: its top folder.
        parts: P.

    Raises:
        DatasetError: the file is not a gzipped tar, a table is missing or not of this format.
    """
    files = archives.read_all(archive, {f"{root}/{name}" for name in FILES})
    try:
        return _parse({name: files[f"{root}/{name}"].decode().splitlines() for name in FILES}, root, parts)
    except (ValueError, KeyError, IndexError) as error:
        raise DatasetError(f"{archive}: its tables do not fit together ({error!r}); download the archive again") from error


def _parse(lines: dict[str, list[str]], root: str, parts: int) -> Annotations:
    rows = lambda name, columns=-1: text_rows(lines[f"{name}.txt"], columns)
    labels = {number: int(label) for number, label in rows("image_class_labels")}
    # Ids of classes are 1-based in CUB; in NABirds they are leaves of a tree, with gaps. Names may hold spaces.
    names = {int(number): name for number, name in rows("classes", 1)}
    used = sorted(set(labels.values()))
    position = {number: label for label, number in enumerate(used)}
    paths = {number: f"{root}/images/{path}" for number, path in rows("images", 1)}
    splits = {number: "train" if is_train == "1" else "test" for number, is_train in rows("train_test_split")}
    boxes = {}
    for number, *box in rows("bounding_boxes"):
        x, y, width, height = map(float, box)
        boxes[number] = np.array([y, x, y + height, x + width])
    locations = {number: np.zeros((parts, 3)) for number in paths}
    for number, part, x, y, visible in rows("parts/part_locs"):
        locations[number][int(part) - 1] = float(y), float(x), float(visible)
    images = {
        path: Annotation(position[labels[number]], splits[number], boxes[number], locations[number])
        for number, path in paths.items()
    }
    if labels.keys() | splits.keys() | boxes.keys() != paths.keys():
        raise ValueError("images.txt lists other images than the other tables")
    return Annotations([names[number] for number in used], images)


def _dataset(archive: Archive, root: str, parts: int, **described) -> Dataset:
    return Dataset(
        layouts=((archive,),),
        read=lambda paths: read_annotations(paths[archive.name], root, parts),
        image_archives=lambda paths: dict.fromkeys(("train", "test"), paths[archive.name]),
        prefix=f"{root}/images/",
        parts=parts,
        **described,
    )


CUB = _dataset(
    Archive(
        "CUB_200_2011.tgz",
        "https://data.caltech.edu/records/65de6-vp158 (1.1 GB)",
        url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        size=1_150_585_339,
        sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    ),
    root="CUB_200_2011",
    parts=15,
    name="cub",
    title="CUB-200-2011",
    description="Caltech-UCSD Birds-200-2011 with the official split.",
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    counts={"train": 5994, "test": 5794},
    classes=200,
)
NABIRDS = _dataset(
    Archive(
        "nabirds.tar.gz",
        "https://dl.allaboutbirds.org/nabirds (9 GB; its terms must be agreed to, so no program can fetch it)",
        md5="df21a9e4db349a14e2b08adfd45873bd",
    ),
    root="nabirds",
    parts=11,
    name="nabirds",
    title="NABirds",
    description="NABirds with the official split; classes are the leaves of its hierarchy that have photos.",
    homepage="https://dl.allaboutbirds.org/nabirds",
    counts={"train": 23_929, "test": 24_633},
    classes=555,
)
