"""Features in a notebook: `cmd_jax.load("runs/photos").embed(images)`."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError
from cmd_jax.inference.load import Trained, read_trained
from cmd_jax.inference.preprocess import crop, in_threads, separate
from cmd_jax.inference.run import check_finite, grid_side, place, widths
from cmd_jax.labelling.groups import Group, group_images, grow
from cmd_jax.labelling.suggest import Suggestions, suggest


def load(
    source: str | os.PathLike,
    step: int | None = None,
    features: str | None = None,
    batch_size: int = 64,
    model: str | None = None,
    image_px: int | None = None,
    resize_px: int | None = None,
    num_heads: int | None = None,
) -> "Model":
    """Loads a trained network for inference.

    Args:
        source: the work directory of a run (a local one or gs://), a file of `cmd_jax.convert export --format=safetensors`,
            or a backbone of another project (DINO to DINOv3, MAE, MoCo v3, CLIP, EsViT; a .safetensors, a directory of timm,
            transformers or OpenCLIP, hf:OWNER/NAME, or a .pth), which says itself what it is.
        step: of a run's checkpoint; None is its result: the best by `train.best_metric`, or the newest.
        features: "cls", "mean", "mil", "blocks" or several joined by "+"; None: what the run was evaluated with.
        batch_size: images that are encoded at a time.
        model: name of the model, for weights of other projects alone, for example "vit_small": an error if they are another.
        image_px: side of the crop that is read, for weights of other projects alone; None: the side that they were made for.
        resize_px: what images are resized to before, for weights of other projects alone; with both at S an image of S x S is
            read as it is. None: as they were made for, in proportion to the crop.
        num_heads: attention heads, for weights of other projects whose files do not say it.

    Returns:
        The network; its methods take images and return NumPy arrays.

    Raises:
        ConfigError: arguments that do not fit the source, or a configuration that cannot work.
        CheckpointError: the run has no such step.
        WeightsError: the weights cannot be read, or are of another model. Methods raise it where features are not finite.

    Example:
        model = cmd_jax.load("runs/photos")
        features = model.embed(["a.jpg", "b.jpg"])  # [2, F], rows of unit norm
        similarity = features[0] @ features[1]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on, for example 64")
    with _errors_alone():
        trained = read_trained(os.fspath(source), step, features, model, image_px, resize_px=resize_px, num_heads=num_heads)
    return Model(trained, batch_size)


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    """Orbax warns of every option that reading without writing does not use."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Model:
    """A trained network. Its methods take `images`: a path, a PIL image or an array, or an iterable of them.

    An array is [H, W, 3] or [H, W], of uint8 or of floating-point numbers in 0..1, or a batch [N, H, W, 3] of them; an iterable
    is a list, a generator or an array [N] of paths, for example. The path of a directory, given alone, stands for all images
    below it, sorted by path. Pictures of any size are prepared as in the evaluation: the shorter side is resized to
    `config.eval.resize_px` (with `resize_mode` "squash" both sides), and the central `crop_px` x `crop_px` is read; one of just
    that size is read as it is. An image that cannot be read raises BadImage, so that rows always match images.

    Attributes:
        config: the resolved configuration.
        step: of the checkpoint; None of other projects' weights.
        source: where it was loaded from.
        fingerprint: of weights and preparation; equal for a run and the file that was exported from it.
        crop_px: side of what is read of an image.
        grid: (rows, columns) of its patches.
        feature_width: F.
        patch_width: D.
    """

    def __init__(self, trained: Trained, batch_size: int):
        self._trained, self._batch_size = trained, batch_size
        self._encoder = place(trained)
        self._widths = widths(trained.config, trained.params)
        self.config: ConfigDict = trained.config
        self.step, self.source, self.fingerprint = trained.step, trained.source, trained.fingerprint
        self.crop_px = trained.config.eval.crop_px
        self.grid = (grid_side(trained.config),) * 2
        (self.feature_width,) = self._widths["features"]
        self.patch_width = self._widths["patch_tokens"][1]

    def __repr__(self) -> str:
        model = f"{self.config.model.name}/{self.config.model.patch_size}"
        step = "" if self.step is None else f", step {self.step:,}"
        what = f"{self.config.eval.features} features of {self.feature_width}"
        return f"<cmd_jax model {model} at {self.crop_px} px, {what}{step}, from {self.source}>"

    def embed(self, images: Any) -> np.ndarray:
        """Features: [N, F] float32, rows of unit norm; their products are cosine similarities."""
        return self._run(images, "features")

    def mil_weights(self, images: Any) -> np.ndarray:
        """How much each patch counts for the image: [N, rows, columns] float32, sum to 1 over an image.

        Raises:
            ConfigError: weights of other projects have no MIL scorer, and those of `method.mil_scorer` "mean" say nothing.
        """
        if not self._trained.has_scorer:
            raise ConfigError(f"{self.source} holds a backbone without a MIL scorer; load a run or an export of one")
        return self._on_grid(self._run(images, "mil_weights"))

    def patch_tokens(self, images: Any) -> np.ndarray:
        """Embeddings of the patches: [N, rows, columns, D] float32, not normalised."""
        return self._on_grid(self._run(images, "patch_tokens"), axis=1)

    def attention(self, images: Any) -> np.ndarray:
        """Probabilities of the class token over the patches in the last block: [N, heads, rows, columns] float32.

        Raises:
            ConfigError: the model has no class token.
        """
        if "attention" not in self._widths:
            raise ConfigError(
                f"{self.config.model.name} has no class token, whose attention this is; load a model that has one"
            )
        return self._on_grid(self._run(images, "attention"), axis=2)

    def groups(
        self, images: Any, labels: Sequence[str | None] | None = None, ruled_out: Mapping[int, Collection[str]] | None = None
    ) -> list[Group]:
        """Images that are alike, in the order in which to name them: each group has `rows`, and the `name` that labels suggest.

        Args:
            images: N of them.
            labels: names of those that have one, None of the others; None: none is named. Named images are in no group.
            ruled_out: names that images are not of, by row.
        """
        features = self.embed(images)
        if labels is None:
            return group_images(features, grow(features))
        done = [row for row, label in enumerate(labels) if label]
        return group_images(features, grow(features), done, suggest(features, labels, ruled_out))

    def suggest(
        self, images: Any, labels: Sequence[str | None], ruled_out: Mapping[int, Collection[str]] | None = None
    ) -> Suggestions:
        """What the labels of some images say of all: `classes`, `probability`, `nearest` labelled image, `unknown`, each [N].

        Args:
            images: N of them.
            labels: names of those that have one, None of the others.
            ruled_out: names that images are not of, by row: none of them is suggested there.

        Raises:
            ConfigError: there are not N labels, or none at all.
        """
        return suggest(self.embed(images), labels, ruled_out)

    def crop(self, image: Any) -> np.ndarray:
        """The crop of one image that the network reads, [crop_px, crop_px, 3] uint8: to lay MIL weights over."""
        return crop(image, self.config)

    def _on_grid(self, array: np.ndarray, axis: int = 1) -> np.ndarray:
        return array.reshape(*array.shape[:axis], *self.grid, *array.shape[axis + 1 :])

    def _run(self, images: Any, output: str) -> np.ndarray:
        crops = in_threads(lambda image: crop(image, self.config), separate(images), self.config.data.decode_threads)
        found, first = [], 0
        for encoded in self._encoder.run(crops, (output,), self._batch_size, fill=False):
            names = [f"image {number}" for number in range(first, first + len(encoded[output]))]
            found.append(check_finite(encoded, names)[output])
            first += len(names)
        return np.concatenate(found) if found else np.zeros((0, *self._widths[output]), np.float32)
