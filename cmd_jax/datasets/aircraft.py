"""FGVC-Aircraft, labelled by variant, family or manufacturer.

Maji, Kannala, Rahtu, Blaschko, Vedaldi: Fine-Grained Visual Classification of Aircraft, arXiv 1306.5151.
"""

import numpy as np

from cmd_jax.datasets import archives
from cmd_jax.datasets.archives import Archive
from cmd_jax.datasets.dataset import Annotation, Annotations, Dataset, text_rows
from cmd_jax.errors import DatasetError

ROOT = "fgvc-aircraft-2013b/data"
ARCHIVE = Archive(
    "fgvc-aircraft-2013b.tar.gz",
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft (2.75 GB)",
    url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
    size=2_753_340_328,
    sha256="e4e323d410e29f0370c81eabdcbb0e2b813acea1de22891b70b58ff41bfc9834",
)
# Level of the labels -> file of its names, and their official number.
LEVELS = {"variant": ("variants.txt", 100), "family": ("families.txt", 70), "manufacturer": ("manufacturers.txt", 30)}


def read_annotations(archive: str, level: str) -> Annotations:
    """Reads the text files of the archive; the official trainval is the training split.

    Raises:
        DatasetError: one is missing, or they do not fit together.
    """
    splits = {"train": f"images_{level}_trainval.txt", "test": f"images_{level}_test.txt"}
    names_file = LEVELS[level][0]
    files = archives.read_all(archive, {f"{ROOT}/{name}" for name in (names_file, *splits.values(), "images_box.txt")})
    lines = lambda name: files[f"{ROOT}/{name}"].decode().splitlines()
    try:
        class_names = [name for (name,) in text_rows(lines(names_file), 0)]
        label = {name: position for position, name in enumerate(class_names)}
        boxes = {number: list(map(float, box)) for number, *box in text_rows(lines("images_box.txt"))}
        images = {}
        for split, file in splits.items():
            for number, name in text_rows(lines(file), 1):  # "0034309 Boeing 707": names hold spaces, dots and slashes
                xmin, ymin, xmax, ymax = boxes[number]
                # 1-based, the last pixel included
                box = np.array([ymin - 1, xmin - 1, ymax, xmax])
                images[f"{ROOT}/images/{number}.jpg"] = Annotation(label[name], split, box)
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{archive}: its tables do not fit together ({error!r}); download the archive again") from error
    return Annotations(class_names, images)


def _dataset(level: str) -> Dataset:
    return Dataset(
        name="aircraft",
        title="FGVC-Aircraft",
        description="FGVC-Aircraft 2013b with the official split; images keep the banner, boxes are of the rest.",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        layouts=((ARCHIVE,),),
        counts={"train": 6667, "test": 3333},
        classes=LEVELS[level][1],
        read=lambda paths: read_annotations(paths[ARCHIVE.name], level),
        image_archives=lambda paths: dict.fromkeys(("train", "test"), paths[ARCHIVE.name]),
        prefix=f"{ROOT}/images/",
        banner_px=20,  # a copyright notice, which the field cuts off
        level=level,
    )


AIRCRAFT = {level: _dataset(level) for level in LEVELS}
