"""Opens datasets; a TFDS dataset that is not on the disk yet is prepared there as ArrayRecord first. No TensorFlow."""

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from typing import Any

from cmd_jax.config import TFDS_PREFIX, ConfigDict
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.sources import PreparedSource, Source
from cmd_jax.datasets import archives
from cmd_jax.datasets.aircraft import AIRCRAFT
from cmd_jax.datasets.birds import CUB, NABIRDS
from cmd_jax.datasets.cars import CARS
from cmd_jax.datasets.dataset import Dataset
from cmd_jax.datasets.synthetic_birds import SyntheticBirds
from cmd_jax.errors import ConfigError, DatasetError

# By their names in data.source.
DATASETS: dict[str, Dataset | SyntheticBirds] = {
    "synthetic_birds": SyntheticBirds(),
    "cub": CUB,
    "cars": CARS,
    "aircraft": AIRCRAFT["variant"],
    "aircraft/family": AIRCRAFT["family"],
    "aircraft/manufacturer": AIRCRAFT["manufacturer"],
    "nabirds": NABIRDS,
}


def open_source(config: ConfigDict, split: str) -> Source:
    """Opens a split of a folder or of a TFDS dataset, which is prepared if it was not yet; several processes may do so at once.

    Args:
        config: the config's section `data`, or `data.sources.eval_section` of it.
        split: "train" or "test". The test split of data without one has length 0.

    Raises:
        ConfigError: the folder is missing or holds nothing usable, or TFDS does not know the name.
        DatasetError: an archive is missing or damaged, or the dataset cannot be prepared here.
    """
    if config.source == "folder":
        return FolderSource(config.folder, split)
    builder = ensure_prepared(config.source, config.data_dir, config.manual_dir)
    banner_px = DATASETS[config.source].banner_px if config.source in DATASETS else 0
    return PreparedSource(builder, split, config.source, banner_px)


def ensure_prepared(name: str, data_dir: str, manual_dir: str | None) -> Any:
    """Prepares a dataset unless it is on the disk already.

    Args:
        name: one of DATASETS, or tfds:NAME.
        data_dir: of TFDS.
        manual_dir: see `manual_directory`.

    Returns:
        Its TFDS builder.

    Raises:
        ConfigError: TFDS knows no such dataset.
        DatasetError: an archive is missing or not the genuine one, or the dataset cannot be prepared here.
    """
    manual = manual_directory(data_dir, manual_dir)
    if name.startswith(TFDS_PREFIX):
        return _prepare_foreign(name, os.path.expanduser(data_dir), manual)
    import tensorflow_datasets as tfds  # slow to import

    dataset = DATASETS[name]
    builder = _builder(dataset, data_dir, manual)
    if builder.is_prepared():
        return builder
    if dataset.layouts:
        archives.locate(manual, dataset.layouts, name)
    directory = os.fspath(builder.data_path)
    with _alone(os.path.dirname(directory)):
        builder = _builder(dataset, data_dir, manual)  # another process may have prepared it meanwhile
        if not builder.is_prepared():
            _remove_leftovers(directory)
            tfds.disable_progress_bar()  # our datasets print their own progress
            builder.download_and_prepare()
    return builder


def is_prepared(name: str, data_dir: str) -> bool:
    """Whether one of DATASETS is on the disk."""
    return _builder(DATASETS[name], data_dir, "").is_prepared()


def manual_directory(data_dir: str, manual_dir: str | None) -> str:
    """Where archives lie: `manual_dir`, or TFDS's own place below `data_dir`."""
    return os.path.expanduser(manual_dir or os.path.join(data_dir, "downloads", "manual"))


def _builder(dataset: Dataset | SyntheticBirds, data_dir: str, manual_dir: str) -> Any:
    """The TFDS builder of a dataset."""
    import tensorflow_datasets as tfds  # slow to import

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset.name
        VERSION = tfds.core.Version(dataset.version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=dataset.level)] if dataset.level else []

        def _info(self) -> tfds.core.DatasetInfo:
            features = dataset.features() | {"label": tfds.features.ClassLabel(), "id": tfds.features.Text()}
            return self.dataset_info_from_configs(
                description=dataset.description,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=dataset.homepage,
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
            del dl_manager  # archives are downloaded and found by `archives`
            class_names, splits = dataset.splits(manual_dir)
            self.info.features["label"].names = class_names
            return splits

        def _generate_examples(self) -> None:
            raise NotImplementedError("the splits are generators already")

    return Builder(data_dir=os.path.expanduser(data_dir), file_format="array_record")


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Waits until no other process prepares in a directory."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, ".lock"), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process ends
        yield


def _remove_leftovers(directory: str) -> None:
    """Removes what a killed preparation left; a dataset gets its name only when it is whole."""
    parent, version = os.path.split(directory)
    for leftover in glob.glob(os.path.join(glob.escape(parent), f"incomplete.*_{version}")):
        shutil.rmtree(leftover)


def _prepare_foreign(name: str, data_dir: str, manual_dir: str) -> Any:
    """The builder of any TFDS dataset (tfds:NAME, tfds:NAME/CONFIG, tfds:NAME:VERSION), prepared if that works here."""
    import tensorflow_datasets as tfds

    of_tfds = name.removeprefix(TFDS_PREFIX)
    try:
        builder = tfds.builder(of_tfds, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        if "File format is already set" in str(error):
            raise DatasetError(
                f"{name} in {data_dir} is not in random-access files; prepare it again with TensorFlow: "
                f"`tfds build {of_tfds} --file_format=array_record --overwrite`"
            ) from error
        raise ConfigError(
            f"data.source is '{name}', which TFDS neither knows ({_first_line(error)}) nor finds prepared in {data_dir}; "
            "check the name, or set data.data_dir"
        ) from error
    if not builder.is_prepared():
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
        # Builders of other people fail in their own ways: no TensorFlow, no network, files that must be fetched by hand.
        except Exception as error:
            raise DatasetError(
                f"{name} could not be prepared here ({type(error).__name__}: {_first_line(error)}); most builders of "
                f"TFDS need TensorFlow: where it is installed run `tfds build {of_tfds} --file_format=array_record`, and "
                f"copy the result into {data_dir}"
            ) from error
    return builder


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else "no message"
