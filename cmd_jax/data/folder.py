"""A folder of the user's as a source: `train/CLASS/*` and `test/CLASS/*`, or images at any depth without labels."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from cmd_jax.data.image_files import IMAGE_SUFFIXES, Listing, ancestors, find_images, read_image_file, subfolders
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
            ConfigError: the folder is missing or holds nothing usable, or it is not clear how it is meant.
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
            _refuse_parent(self.root, listing)
            self._take(self.root, listing.paths)
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
        classes = Classes.of(train_directory, train) if train.folders else None
        self.class_names = tuple(map(printable, classes.names)) if classes else ()
        name = found["train"] if split == "train" else found.get("test") or found.get("val")
        if name is None:
            return
        directory = os.path.join(self.root, name)
        listing = train if split == "train" else find_images(directory, above=(self.root,))
        notes = [] if name == split else [f"read from {name}/"]
        if split == "test" and found.get("val", name) != name:
            notes.append(f"{found['val']}/ is not used")
        if classes:
            if split == "train" and classes.nested():
                notes.append(classes.note())
            of = dict(zip(listing.paths, classes.labels(directory, listing), strict=True))
            order = sorted(listing.paths, key=lambda path: (path.partition(os.sep)[0], path))
            self._take(directory, order, [of[path] for path in order])
        else:
            self._take(directory, listing.paths)
        self.note = "; ".join([*notes, *filter(None, [listing.note()])])

    def _take(self, directory: str, paths: list[str], labels: list[int] | None = None) -> None:
        self.paths = [os.path.join(directory, path) for path in paths]
        self.labels = labels or [UNLABELLED] * len(paths)
        _check_readable(self.paths, directory)

    @property
    def files(self) -> list[str]:
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        name = printable(self.paths[index])
        return Record(read_image_file(self.paths[index], name), self.labels[index], name, NO_BOXES)


class Classes(NamedTuple):
    """The classes of a training split.

    Attributes:
        folders: of the classes, relative to the split, sorted.
        names: of the classes.
    """

    folders: list[str]
    names: list[str]

    @classmethod
    def of(cls, directory: str, listing: Listing) -> "Classes":
        """Finds them in a training split that has folders.

        Raises:
            ConfigError: images lie beside the class folders, a class has none, folders are classes on several levels, or the
                names of two of them cannot be told apart everywhere.
        """
        _refuse_loose(directory, listing)
        holding = {_parent(path) for path in listing.paths}
        folders = sorted({next(place for place in _way(folder) if place in holding) for folder in holding})
        classes = cls(folders, _names(folders))
        empty = sorted(set(listing.folders) - classes._related(listing.folders))
        if empty:
            _refuse_empty(os.path.join(directory, empty[0]), listing)
        outer = [folder for folder in folders if os.sep not in folder]
        if outer and classes.nested():
            deeper = next(folder for folder in folders if os.sep in folder)
            raise ConfigError(
                f"{directory}: {outer[0]}/ holds images itself, but {deeper.partition(os.sep)[0]}/ only in folders below it "
                f"({deeper}/), so it is not clear which of them are the classes; put all images directly into the class folders"
            )
        seen: dict[str, str] = {}
        for folder in folders:
            other = seen.setdefault(_fold(folder), folder)
            if other != folder:
                raise ConfigError(
                    f"{directory} has the classes {_spelled(other)} and {_spelled(folder)}, which are equal but for "
                    f"{_difference(other, folder)}; merge or rename them"
                )
        return classes

    def nested(self) -> bool:
        """Whether classes lie deeper than directly in the split."""
        return any(os.sep in folder for folder in self.folders)

    def note(self) -> str:
        """How nested folders were read."""
        return f"each of the {len(self.folders)} folders that hold images is a class, {self.folders[0]}/ is {self.names[0]}"

    def labels(self, directory: str, listing: Listing) -> list[int]:
        """The class of each image of a split.

        Raises:
            ConfigError: an image or a folder is of no class, or a class has no image.
        """
        _refuse_loose(directory, listing)
        index = {folder: label for label, folder in enumerate(self.folders)}
        of = {
            folder: next((index[place] for place in _way(folder) if place in index), None)
            for folder in {_parent(path) for path in listing.paths}
        }
        unknown = set(listing.folders) - self._related(listing.folders)
        unknown |= {folder for folder, label in of.items() if label is None}
        unknown = sorted(folder for folder in unknown if _parent(folder) not in unknown)
        if unknown:
            self._refuse_unknown(directory, unknown)
        missing = sorted(set(range(len(self.folders))) - set(of.values()))
        if missing:
            _refuse_empty(os.path.join(directory, self.folders[missing[0]]), listing)
        return [of[_parent(path)] for path in listing.paths]

    def _related(self, folders: Iterable[str]) -> set[str]:
        """Those of the folders that are a class, hold one, or lie in one."""
        classes = set(self.folders)
        holders = {place for folder in self.folders for place in ancestors(folder)}
        return {folder for folder in folders if folder in holders or any(place in classes for place in _way(folder))}

    def _refuse_unknown(self, directory: str, unknown: list[str]) -> None:
        folded = {_fold(folder): folder for folder in self.folders}
        for folder in unknown:
            twin = folded.get(_fold(folder))
            if twin:
                raise ConfigError(
                    f"{directory} has the class {_spelled(folder)}, which train/ spells {_spelled(twin)}: equal but for "
                    f"{_difference(folder, twin)}; rename one of them"
                )
        raise ConfigError(
            f"{directory} has classes that train/ has not: {', '.join(unknown[:5])}; give both splits the same class folders"
        )


def _split_folders(root: str) -> dict[str, str]:
    """Which folder is which split: key of SPLIT_NAMES -> name.

    Raises:
        ConfigError: two are the same split.
    """
    found: dict[str, str] = {}
    for name in subfolders(root):
        role = _role(name)
        if role and found.setdefault(role, name) != name:
            raise ConfigError(
                f"{root} has {found[role]}/ and {name}/, which are both the {role} split; merge them, or rename one of them"
            )
    return found


def _role(name: str) -> str | None:
    return next((role for role, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _refuse_parent(root: str, listing: Listing) -> None:
    """A folder that is read without labels must not hold splits further down: the test images would be trained on."""
    roles: defaultdict[str, set[str]] = defaultdict(set)
    for folder in listing.folders:
        role = _role(os.path.basename(folder))
        if role:
            roles[_parent(folder)].add(role)
    places = sorted(place for place, has in roles.items() if "train" in has and len(has) > 1)
    if places:
        also = f" (and {len(places) - 1} others)" if len(places) > 1 else ""
        raise ConfigError(
            f"data.folder {root} has no train/ itself, but {places[0]}/{also} in it has, and test images beside it that would "
            f"be trained on too; set data.folder to {os.path.join(root, places[0])}"
        )


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


def _names(folders: list[str]) -> list[str]:
    """Names of class folders: their own where these differ, else their paths."""
    own = [os.path.basename(folder) for folder in folders]
    return own if len(set(map(_fold, own))) == len(own) else [folder.replace(os.sep, "/") for folder in folders]


def _parent(path: str) -> str:
    return path.rpartition(os.sep)[0]


def _way(folder: str) -> Iterable[str]:
    """The folders on the way down to a folder, and itself."""
    return [*ancestors(folder), folder]


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


def _check_readable(paths: list[str], directory: str) -> None:
    closed = [path for path in paths if not os.access(path, os.R_OK)]
    if closed:
        raise DatasetError(
            f"{directory}: {len(closed):,} of {len(paths):,} images cannot be read, first {closed[0]}; make them readable "
            "(chmod a+r), or remove them and dangling links"
        )
