"""Miniature archives in the genuine layouts: 1-based labels, names with spaces and dots, some grey images."""

import io
import tarfile

import numpy as np
from PIL import Image

from cmd_jax.datasets import aircraft, birds, cars, prepared

CUB_ARCHIVE, NABIRDS_ARCHIVE = (dataset.layouts[0][0].name for dataset in (birds.CUB, birds.NABIRDS))
SPECIES = ("001.Black_footed_Albatross", "002.Brewer_s_Blackbird")
CATEGORIES = {3: "Birds", 295: "Common Eider (Adult male)", 817: "St. Vincent Parrot"}  # one is no leaf
MODELS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012")
LEVELS = {
    "variants.txt": ("707-320", "BAE 146-200", "F/A-18"),
    "families.txt": ("Boeing 707", "BAE 146", "F/A-18"),
    "manufacturers.txt": ("Boeing", "British Aerospace"),
}


def jpeg(number, size=(40, 60)):
    """A JPEG that tells its number by its red; every third is grey."""
    level = 40 + 4 * (number % 50)
    pixels = np.full(size, level, np.uint8) if number % 3 == 2 else np.full((*size, 3), (level, 0, 255), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg", quality=95)
    return out.getvalue()


def pack(path, files, kinds=()):
    """Writes a gzipped tar; `kinds` are members that are no plain files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in kinds:
            tar.addfile(member)


def bird_files(root, parts, class_ids, classes_txt, train, test):
    """The tables and images of CUB-200-2011 or NABirds; classes alternate."""
    tables = dict.fromkeys(("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs"), "")
    files = {"classes.txt": classes_txt}
    for number in range(1, train + test + 1):
        name = f"{number % len(class_ids):04d}/Some.Bird_{number:04d}.jpg"
        files[f"images/{name}"] = jpeg(number)
        tables["images"] += f"{number} {name}\n"
        tables["image_class_labels"] += f"{number} {class_ids[number % len(class_ids)]}\n"
        tables["train_test_split"] += f"{number} {int(number <= train)}\n"
        tables["bounding_boxes"] += f"{number} 6.0 4.0 30.0 20.0\n"
        for part in range(1, parts + 1):
            seen = part == 2
            tables["parts/part_locs"] += f"{number} {part} {15.0 * seen} {10.0 * seen} {int(seen)}\n"
    files |= {f"{name}.txt": text for name, text in tables.items()}
    return {f"{root}/{name}": content for name, content in reversed(files.items())}  # tables behind the images


def make_cub(directory, train=36, test=12):
    classes = "".join(f"{number + 1} {name}\n" for number, name in enumerate(SPECIES))
    files = bird_files("CUB_200_2011", birds.CUB.parts, (1, 2), classes, train, test)
    pack(directory / CUB_ARCHIVE, files)
    return files


def make_nabirds(directory, train=36, test=12):
    classes = "".join(f"{number} {name}\n" for number, name in CATEGORIES.items())
    files = bird_files("nabirds", birds.NABIRDS.parts, (295, 817), classes, train, test)
    pack(directory / NABIRDS_ARCHIVE, files)
    return files


def make_aircraft(directory, train=36, test=12):
    numbers = {"trainval": range(train), "test": range(train, train + test)}
    files = {name: "".join(f"{label}\n" for label in labels) for name, labels in LEVELS.items()}
    for level, (file, _) in aircraft.LEVELS.items():
        for split, chosen in numbers.items():
            labels = [LEVELS[file][number % len(LEVELS[file])] for number in chosen]
            lines = [f"{number:07d} {label}\n" for number, label in zip(chosen, labels, strict=True)]
            files[f"images_{level}_{split}.txt"] = "".join(lines)
    files["images_box.txt"] = "".join(f"{number:07d} 7 5 36 24\n" for number in range(train + test))
    files |= {f"images/{number:07d}.jpg": jpeg(number, (60, 60)) for number in range(train + test)}
    files = {f"{aircraft.ROOT}/{name}": content for name, content in files.items()}
    pack(directory / aircraft.ARCHIVE.name, files)
    return files


def _mat(**variables):
    from scipy.io import savemat

    out = io.BytesIO()
    savemat(out, variables)
    return out.getvalue()


def _annotations(rows, names):
    kinds = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *names)]
    return np.array([[(np.uint8(7), np.uint8(5), np.uint8(36), np.uint16(24), *row) for row in rows]], dtype=kinds)


def make_cars(directory, train=36, test=12, combined=False):
    names = np.array([[*MODELS]], dtype=object)
    if combined:
        split = [0] * train + [1] * test
        paths = [f"car_ims/{number + 1:06d}.jpg" for number in range(train + test)]
        rows = [(path, np.uint8(1 + i % 2), np.uint8(split[i])) for i, path in enumerate(paths)]
        annotations = _annotations(rows, ("relative_im_path", "class", "test"))
        (directory / cars.ANNOTATIONS.name).write_bytes(_mat(annotations=annotations, class_names=names))
        pack(directory / cars.IMAGES.name, {path: jpeg(number) for number, path in enumerate(paths)})
        return
    found = {}
    for kind, count in (("train", train), ("test", test)):
        files = [f"{number + 1:05d}.jpg" for number in range(count)]
        rows = [(np.uint8(1 + i % 2), file) for i, file in enumerate(files)]
        found[kind] = _mat(annotations=_annotations(rows, ("class", "fname")))
        pack(directory / f"cars_{kind}.tgz", {f"cars_{kind}/{file}": jpeg(i) for i, file in enumerate(files)})
    unlabelled = _mat(annotations=_annotations([(file,) for file in files], ("fname",)))
    devkit = {
        "devkit/cars_meta.mat": _mat(class_names=names),
        "devkit/cars_train_annos.mat": found["train"],
        "devkit/cars_test_annos.mat": unlabelled,
    }
    pack(directory / cars.DEVKIT.name, devkit)
    (directory / cars.TEST_LABELS.name).write_bytes(found["test"])


MAKE = {"cub": make_cub, "cars": make_cars, "aircraft": make_aircraft, "nabirds": make_nabirds}
CLASSES = {"cub": 2, "cars": 2, "aircraft": 3, "aircraft/family": 3, "aircraft/manufacturer": 2, "nabirds": 2}


def expect(monkeypatch, name, train=36, test=12, layouts=None):
    """Gives a dataset the counts of its miniature, and no digests."""
    dataset = prepared.DATASETS[name]
    plain = tuple(tuple(archive._replace(size=None, sha256=None, md5=None) for archive in layout) for layout in dataset.layouts)
    miniature = dataset._replace(layouts=layouts or plain, counts={"train": train, "test": test}, classes=CLASSES[name])
    monkeypatch.setitem(prepared.DATASETS, name, miniature)
