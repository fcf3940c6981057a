"""A folder of images as a source: `train/CLASS/*` and `test/CLASS/*`, or images at any depth without labels."""

import os
import unicodedata
from collections import defaultdict

from cmd_jax.data.decode import IMAGE_SUFFIXES
from cmd_jax.data.listing import Listing, find_images, read_directory, read_image_file
from cmd_jax.data.sources import NO_BOXES, UNLABELLED, Record
from cmd_jax.errors import ConfigError, DatasetError
from cmd_jax.text import printable

# Names of the folders of the splits, in any case.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}


class FolderSource:
    """Images of a folder: `train/CLASS/*` and `test/CLASS/*`, or flat and unlabelled.

    A class is the first folder on the way down from `train` that holds images; images in folders below it belong to it. So
    the folders directly in `train` are the classes where they hold images, and the innermost ones where images lie only
    deeper. `Train`, `training` and the like are understood, and a validation split is the test split where there is no other.
    What `find_images` leaves out is left out here.

    Attributes:
        root: absolute path of the folder.
        paths: absolute, sorted by path within the folders directly in the split.
        labels: class index of each path, or UNLABELLED.
        class_names: printable, sorted by path; a folder's own name where these are unique, else its path in the split.
        note: how the split was read and what was left out, for people; "" where there is nothing to say.
    """

    def __init__(self, folder: str, split: str):
        """
        Args:
            folder: as `data.folder`.
            split: "train" or "test"; the latter has length 0 where the folder has no test or validation images.

        Raises:
            ConfigError: the folder is missing or holds nothing usable, or its layout is ambiguous.
            DatasetError: a folder or an image cannot be read.
        """
        self.root = os.path.abspath(os.path.expanduser(folder))
        if not os.path.isdir(self.root):
            raise ConfigError(
                f"data.folder {folder!r} is not a directory; give the folder that holds train/CLASS/* or the images"
            )
        self.paths, self.labels, self.class_names, self.note = [], [], (), ""
        found = _split_folders(self.root)
        if "train" in found:
            self._read_split(found, split)
        elif found:
            raise ConfigError(
                f"data.folder {folder!r} has {next(iter(found.values()))}/ but no train/; put the training images into "
                f"{os.path.join(self.root, 'train')}"
            )
        elif split == "train":
            listing = find_images(self.root)
            _refuse_nested_splits(self.root, listing)
            self._set_images(self.root, listing.paths)
            self.note = listing.note()
        if split == "train" and not self.paths:
            raise ConfigError(
                f"data.folder {folder!r} holds no images{_in_brackets(self.note)}; put files ({', '.join(IMAGE_SUFFIXES)}) "
                "into it or into train/CLASS/"
            )

    def _read_split(self, found: dict[str, str], split: str) -> None:
        """Reads one of the folders that `_split_folders` found."""
        train_directory = os.path.join(self.root, found["train"])
        train = find_images(train_directory, above=(self.root,))
        classes = _find_classes(train_directory, train) if train.folders else []
        self.class_names = tuple(map(printable, _class_names(classes)))
        name = found["train"] if split == "train" else found.get("test") or found.get("val")
        if name is None:
            return
        directory = os.path.join(self.root, name)
        listing = train if split == "train" else find_images(directory, above=(self.root,))
        notes = [] if name == split else [f"read from {name}/"]
        if split == "test" and found.get("val", name) != name:
            notes.append(f"{found['val']}/ is not used")
        if split == "train" and _is_nested(classes):
            notes.append(
                f"each of the {len(classes)} folders that hold images is a class, {classes[0]}/ is {_class_names(classes)[0]}"
            )
        if classes:
            labels = _class_labels(directory, listing, classes)
            order = sorted(listing.paths, key=lambda path: (path.partition(os.sep)[0], path))
            self._set_images(directory, order, [labels[path] for path in order])
        else:
            self._set_images(directory, listing.paths)
        self.note = "; ".join([*notes, *filter(None, [listing.note()])])

    def _set_images(self, directory: str, paths: list[str], labels: list[int] | None = None) -> None:
        self.paths = [os.path.join(directory, path) for path in paths]
        self.labels = labels or [UNLABELLED] * len(paths)
        closed = [path for path in self.paths if not os.access(path, os.R_OK)]
        if closed:
            raise DatasetError(
                f"{directory}: {len(closed):,} of {len(paths):,} images cannot be read, first {closed[0]}; make them readable "
                "(chmod a+r), or remove them and dangling links"
            )

    @property
    def files(self) -> list[str]:
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        name = printable(self.paths[index])
        return Record(read_image_file(self.paths[index], name), self.labels[index], name, NO_BOXES)


def _split_folders(root: str) -> dict[str, str]:
    """Finds the folders of the splits: key of SPLIT_NAMES -> name.

    Raises:
        ConfigError: two are the same split.
    """
    found: dict[str, str] = {}
    for name in sorted(name for name in read_directory(root).folders if not name.startswith(".")):
        role = _role(name)
        if role and found.setdefault(role, name) != name:
            raise ConfigError(
                f"{root} has {found[role]}/ and {name}/, which are both the {role} split; merge them, or rename one of them"
            )
    return found


def _role(name: str) -> str | None:
    return next((role for role, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _refuse_nested_splits(root: str, listing: Listing) -> None:
    """A folder that is read without labels must not hold splits further down: the test images would be trained on."""
    roles: defaultdict[str, set[str]] = defaultdict(set)
    for folder in listing.folders:
        role = _role(os.path.basename(folder))
        if role:
            roles[os.path.dirname(folder)].add(role)
    places = sorted(place for place, has in roles.items() if "train" in has and len(has) > 1)
    if places:
        also = f" (and {len(places) - 1} others)" if len(places) > 1 else ""
        raise ConfigError(
            f"data.folder {root} has no train/ itself, but {places[0]}/{also} in it has, and test images beside it that would "
            f"be trained on too; set data.folder to {os.path.join(root, places[0])}"
        )


def _find_classes(directory: str, listing: Listing) -> list[str]:
    """Finds the class folders of a training split that has folders; relative to it, sorted.

    Raises:
        ConfigError: images lie beside the class folders, a class has none, folders are classes on several levels, or the
            names of two of them cannot be told apart everywhere.
    """
    _refuse_loose(directory, listing)
    holding = set(map(os.path.dirname, listing.paths))
    classes = sorted({next(place for place in _way(folder) if place in holding) for folder in holding})
    empty = sorted(_outside_classes(listing.folders, classes))
    if empty:
        _refuse_empty(os.path.join(directory, empty[0]), listing)
    outer = [folder for folder in classes if os.sep not in folder]
    if outer and _is_nested(classes):
        deeper = next(folder for folder in classes if os.sep in folder)
        raise ConfigError(
            f"{directory}: {outer[0]}/ holds images itself, but {deeper.partition(os.sep)[0]}/ only in folders below it "
            f"({deeper}/), so it is not clear which of them are the classes; put all images directly into the class folders"
        )
    seen: dict[str, str] = {}
    for folder in classes:
        other = seen.setdefault(_fold(folder), folder)
        if other != folder:
            raise ConfigError(
                f"{directory} has the classes {_spelled(other)} and {_spelled(folder)}, which are equal but for "
                f"{_difference(other, folder)}; merge or rename them"
            )
    return classes


def _class_labels(directory: str, listing: Listing, classes: list[str]) -> dict[str, int]:
    """Finds the class of each path of a split.

    Raises:
        ConfigError: an image or a folder is of no class, or a class has no image.
    """
    _refuse_loose(directory, listing)
    index = {folder: label for label, folder in enumerate(classes)}
    label_of = {
        folder: next((index[place] for place in _way(folder) if place in index), None)
        for folder in set(map(os.path.dirname, listing.paths))
    }
    unknown = _outside_classes(listing.folders, classes)
    unknown |= {folder for folder, label in label_of.items() if label is None}
    unknown = sorted(folder for folder in unknown if os.path.dirname(folder) not in unknown)
    twins = {_fold(folder): folder for folder in classes}
    for folder in unknown:
        twin = twins.get(_fold(folder))
        if twin:
            raise ConfigError(
                f"{directory} has the class {_spelled(folder)}, which train/ spells {_spelled(twin)}: equal but for "
                f"{_difference(folder, twin)}; rename one of them"
            )
    if unknown:
        raise ConfigError(
            f"{directory} has classes that train/ does not have: {', '.join(unknown[:5])}; give both splits the same "
            "class folders"
        )
    missing = sorted(set(range(len(classes))) - set(label_of.values()))
    if missing:
        _refuse_empty(os.path.join(directory, classes[missing[0]]), listing)
    return {path: label_of[os.path.dirname(path)] for path in listing.paths}


def _outside_classes(folders: list[str], classes: list[str]) -> set[str]:
    """Those of the folders that neither are a class, nor hold one, nor lie in one."""
    known = set(classes)
    holders = {place for folder in classes for place in _way(folder)}
    return {folder for folder in folders if folder not in holders and known.isdisjoint(_way(folder))}


def _refuse_loose(directory: str, listing: Listing) -> None:
    loose = [path for path in listing.paths if os.sep not in path]
    if loose:
        raise ConfigError(
            f"{directory} has {len(loose)} images beside its class folders, first {loose[0]}; move them into a class"
        )


def _refuse_empty(folder: str, listing: Listing) -> None:
    raise ConfigError(
        f"class folder {folder} holds no images{_in_brackets(listing.note())}; fill it or remove the class from both splits"
    )


def _is_nested(classes: list[str]) -> bool:
    """Whether classes lie deeper than directly in the split."""
    return any(os.sep in folder for folder in classes)


def _class_names(folders: list[str]) -> list[str]:
    """Names of class folders: their own where these differ, else their paths."""
    own = [os.path.basename(folder) for folder in folders]
    return own if len(set(map(_fold, own))) == len(own) else [folder.replace(os.sep, "/") for folder in folders]


def _way(folder: str) -> list[str]:
    """The folders on the way down to a folder, and itself: a/b -> a, a/b."""
    parts = folder.split(os.sep)
    return [os.sep.join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _fold(name: str) -> str:
    """Equal for names that some file system or editor takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _difference(one: str, other: str) -> str:
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    return "Unicode normalization" if same else "upper and lower case"


def _spelled(name: str) -> str:
    """A name with what is not ASCII written as escapes beside it: two that look alike can be told apart."""
    return repr(name) if name.isascii() else f"{printable(name)!r} ({ascii(name)[1:-1]})"


def _in_brackets(note: str) -> str:
    return f" ({note})" if note else ""
