"""Images of any kind, or of a split -> the evaluation crops that a network reads."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from cmd_jax.config import ConfigDict
from cmd_jax.data.decode import IMAGE_SUFFIXES, decode_record, decode_rgb, eval_boxes, eval_crop, image_rgb
from cmd_jax.data.listing import Listing, find_images, read_image_file
from cmd_jax.data.sources import Source
from cmd_jax.errors import ConfigError
from cmd_jax.text import printable

S, T = TypeVar("S"), TypeVar("T")
OF_OBJECTS = "OUST"  # kinds of dtypes whose elements are objects or text


def folder_images(folder: str) -> Listing:
    """The images below a folder at any depth, and what was left out: see `find_images`.

    Raises:
        ConfigError: it is no folder, or holds no image.
        DatasetError: a folder cannot be read.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is not a directory; give one with images ({', '.join(IMAGE_SUFFIXES)}) at any depth")
    listing = find_images(folder)
    if not listing.paths:
        note = f" ({listing.note()})" if listing.note() else ""
        raise ConfigError(f"{folder} holds no images{note}; put files ({', '.join(IMAGE_SUFFIXES)}) into it, at any depth")
    return listing


def prepared(pixels: np.ndarray, config: ConfigDict) -> np.ndarray:
    """The evaluation crop of pixels, as a resolved configuration wants it: [H, W, 3] uint8 -> [C, C, 3] uint8."""
    how = config.eval
    return eval_crop(pixels, how.resize_px, how.crop_px, how.resize_mode, how.interpolation)


def file_crop(path: str, config: ConfigDict) -> np.ndarray:
    """The evaluation crop of an image file: [C, C, 3] uint8. Raises BadImage."""
    name = printable(path)
    pixels = decode_rgb(read_image_file(path, name), name, grayscale=config.data.grayscale)
    return prepared(pixels, config)


def crop(image: Any, config: ConfigDict) -> np.ndarray:
    """The evaluation crop of one image.

    Args:
        image: a path, a PIL image, or an array [H, W, 3] or [H, W]: uint8, or floating-point in 0..1.
        config: resolved.

    Returns:
        [C, C, 3] uint8.

    Raises:
        BadImage: the file or the image cannot be used.
        ConfigError: it is none of these.
    """
    if isinstance(image, str | os.PathLike):
        return file_crop(os.fspath(image), config)
    if not isinstance(image, Image.Image):
        if not hasattr(image, "__array__"):
            raise ConfigError(f"an image is a {type(image).__name__}; give a path, a PIL image or an array")
        image = Image.fromarray(_levels(np.asarray(image)))
    pixels = image_rgb(image, "image", grayscale=config.data.grayscale)
    return prepared(pixels, config)


def separate(images: Any) -> Iterable[Any]:
    """Images one by one: the files of a directory, the elements of an iterable, the rows of a batch, or a single image.

    Args:
        images: a path, a PIL image or an array, as of `crop`; the path of a directory; a batch [N, H, W, 3]; or an iterable of
            images, for example a list, a generator, or an array [N] of paths.

    Raises:
        ConfigError: it is none of these, or has no order (a set, a dictionary).
    """
    if isinstance(images, str | os.PathLike):
        folder = os.fspath(images)
        return [os.path.join(folder, path) for path in folder_images(folder).paths] if os.path.isdir(folder) else [folder]
    if isinstance(images, Image.Image):
        return [images]
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        if array.dtype.kind in OF_OBJECTS:  # paths or images
            if array.ndim > 1:
                raise ConfigError(f"an array of {array.dtype} has shape {array.shape}; give paths as an array of one axis")
            return np.atleast_1d(array).tolist()
        return array if array.ndim == 4 else [array]
    if isinstance(images, set | frozenset | Mapping | bytes) or not isinstance(images, Iterable):
        raise ConfigError(f"images are a {type(images).__name__}; give paths, PIL images or arrays, one or a list of them")
    return images


def _levels(array: np.ndarray) -> np.ndarray:
    """[H, W, 3] or [H, W] -> the same as uint8 levels."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise ConfigError(
            f"an image has shape {array.shape}; give [height, width, 3] or [height, width], or a batch of the first"
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise ConfigError(f"an image has numbers of type {array.dtype}; give uint8, or floating-point in 0..1")
    if not (array.min() >= 0 and array.max() <= 1):  # NaN is in no bounds
        raise ConfigError(
            f"an image has floating-point numbers from {array.min():g} to {array.max():g}; give 0..1 (not normalised), or uint8"
        )
    return np.round(array * 255).astype(np.uint8)


class EvalImage(NamedTuple):
    """One image as evaluation reads it.

    Attributes:
        crop: [H, W, 3] uint8.
        boxes: [P, 4] float32, part boxes in the crop.
        label: class index, or UNLABELLED.
        name: path or id.
    """

    crop: np.ndarray
    boxes: np.ndarray
    label: int
    name: str


def eval_images(source: Source, config: ConfigDict, indices: Sequence[int]) -> Iterator[EvalImage]:
    """Decodes images of a split in order. Raises BadImage."""
    return in_threads(lambda index: load_eval_image(source, config, index), indices, config.data.decode_threads)


def load_eval_image(source: Source, config: ConfigDict, index: int) -> EvalImage:
    """Decodes one image of a split. Raises BadImage."""
    record, how = source[index], config.eval
    pixels = decode_record(record, grayscale=config.data.grayscale)
    boxes = eval_boxes(record.part_boxes, pixels.shape[:2], how.resize_px, how.crop_px, how.resize_mode)
    return EvalImage(prepared(pixels, config), boxes, record.label, record.name)


def in_threads(load: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """load(item) of all items in order, a few ahead of what is taken."""
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(itertools.islice(items, 4 * threads)):
            yield from pool.map(load, chunk)
