"""TFDS datasets on disk as ArrayRecord: our builders, prepared from genuine archives, and any other by name. No TensorFlow."""

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from cmd_jax.config import TFDS_PREFIX
from cmd_jax.datasets import archives
from cmd_jax.errors import ConfigError, DatasetError


def manual_directory(data_dir: str, manual_dir: str | None) -> str:
    """Where archives lie: `manual_dir`, or TFDS's own place below `data_dir`."""
    return os.path.expanduser(manual_dir or os.path.join(data_dir, "downloads", "manual"))


def builder_class(name: str) -> Callable:
    """Our TFDS builder of a source's name, which may have the labels' level behind a slash."""
    from cmd_jax.datasets.builders import aircraft, cars, cub, nabirds, synthetic_birds  # TFDS is slow to import

    return {
        "synthetic_birds": synthetic_birds.SyntheticBirds,
        "cub": cub.Cub,
        "cars": cars.Cars,
        "aircraft": aircraft.Aircraft,
        "nabirds": nabirds.Nabirds,
    }[name.split("/")[0]]


def open_builder(name: str, data_dir: str, manual_dir: str | None) -> Any:
    """The TFDS builder of a source, prepared if it was not yet.

    Args:
        name: one of config.SOURCES but "folder", or "tfds:NAME".
        data_dir: of TFDS.
        manual_dir: see `manual_directory`.

    Raises:
        ConfigError: TFDS knows no such dataset, or it has no images.
        DatasetError: an archive is missing or not the genuine one, or the dataset cannot be prepared here.
    """
    if name.startswith(TFDS_PREFIX):
        return foreign_builder(name.removeprefix(TFDS_PREFIX), data_dir, manual_dir)
    return prepare(builder_class(name), data_dir, manual_dir, name)


def prepare(make: Callable, data_dir: str, manual_dir: str | None, name: str) -> Any:
    """Builds one of our datasets on disk if it is not there yet, and returns its builder.

    Args:
        make: the builder's class.
        data_dir: of TFDS.
        manual_dir: see `manual_directory`.
        name: of the source; labels' level behind a slash.
    """
    import tensorflow_datasets as tfds

    options = {"config": name.split("/")[1]} if "/" in name else {}
    build = lambda: make(data_dir=os.path.expanduser(data_dir), file_format="array_record", **options)
    builder = build()
    if builder.is_prepared():
        return builder
    manual = manual_directory(data_dir, manual_dir)
    if hasattr(make, "LAYOUTS"):
        archives.locate(manual, make.LAYOUTS, name)
    with _alone(os.path.dirname(os.fspath(builder.data_path))):
        builder = build()  # another process may have prepared it meanwhile
        if not builder.is_prepared():
            _remove_leftovers(builder)
            tfds.disable_progress_bar()  # our builders say how far they are
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return builder


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Waits until no other process prepares in a directory."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, ".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, or its process ends
        yield


def _remove_leftovers(builder: Any) -> None:
    """Directories that a killed preparation left; a dataset gets its name only when it is whole."""
    version = os.fspath(builder.data_path)
    pattern = os.path.join(glob.escape(os.path.dirname(version)), f"incomplete.*_{os.path.basename(version)}")
    for directory in glob.glob(pattern):
        shutil.rmtree(directory)


def foreign_builder(name: str, data_dir: str, manual_dir: str | None) -> Any:
    """The builder of any TFDS dataset, prepared if that works here.

    Args:
        name: as TFDS writes it: NAME, NAME/CONFIG, NAME:VERSION.
        data_dir: of TFDS.
        manual_dir: see `manual_directory`.
    """
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        if "File format is already set" in str(error):
            raise DatasetError(
                f"{TFDS_PREFIX}{name} in {data_dir} is not in random-access files; prepare it again with TensorFlow: "
                f"`tfds build {name} --file_format=array_record --overwrite`"
            ) from error
        raise ConfigError(
            f"data.source is '{TFDS_PREFIX}{name}', which TFDS neither knows ({_first_line(error)}) nor finds prepared in "
            f"{data_dir}; check the name, or set data.data_dir"
        ) from error
    if not builder.is_prepared():
        config = tfds.download.DownloadConfig(manual_dir=manual_directory(data_dir, manual_dir))
        try:
            builder.download_and_prepare(download_config=config)
        # Builders of other people fail in their own ways: no TensorFlow, no network, files that must be fetched by hand.
        except Exception as error:
            raise DatasetError(
                f"{TFDS_PREFIX}{name} could not be prepared here ({type(error).__name__}: {_first_line(error)}); most builders "
                f"of TFDS need TensorFlow: where it is installed run `tfds build {name} --file_format=array_record`, and copy "
                f"the result into {data_dir}"
            ) from error
    return builder


def files(builder: Any) -> list[str]:
    """The files that TFDS wrote, sorted."""
    directory = os.fspath(builder.data_path)
    names = ("*.array_record*", "dataset_info.json", "features.json", "*.labels.txt")
    return sorted(path for name in names for path in glob.glob(os.path.join(glob.escape(directory), name)))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else "no message"
