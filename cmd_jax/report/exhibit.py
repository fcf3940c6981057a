"""The images that a report shows, with all that is needed to show them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cmd_jax.config import ConfigDict
from cmd_jax.data.record import Source
from cmd_jax.evaluation.evaluate import Evaluation
from cmd_jax.evaluation.features import Features
from cmd_jax.evaluation.patches import Patches, inspect_patches, make_inspector
from cmd_jax.evaluation.splits import Splits
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.report.overlays import jpeg_uri, shown_crop

PICTURE_PX, QUALITY = 160, 82  # of single pictures


class Exhibit(NamedTuple):
    """Test images, or training images where there are no others, and the training images that they are compared with.

    Attributes:
        config: resolved.
        source: split of the images shown.
        features: of them.
        kind: "test" or "training".
        train: split of the training images.
        gallery: features of them.
        look: (split, rows of it) -> the teacher's patches of these images.
    """

    config: ConfigDict
    source: Source
    features: Features
    kind: str
    train: Source
    gallery: Features
    look: Callable[[Source, Sequence[int]], Patches]

    def count(self) -> int:
        """Of the images that can be shown."""
        return len(self.features.names)

    def in_gallery(self) -> bool:
        """Whether the images shown are the gallery, where each would find itself."""
        return self.source is self.train

    def name(self, label: int) -> str:
        """Of a class; "" of an image without one."""
        names = self.train.class_names
        return names[label] if 0 <= label < len(names) else ""

    def picture(self, source: Source, row: int, px: int = PICTURE_PX) -> str:
        """An image of a split as a data URI."""
        return jpeg_uri(shown_crop(source, row, self.config, px), QUALITY)


def make_exhibit(evaluation: Evaluation, config: ConfigDict, network: Network, teacher: Params, splits: Splits) -> Exhibit:
    """The exhibit of an evaluated teacher, whose parameters are on every device of this process: images that were read."""
    queries = evaluation.queries
    splits = splits.select(evaluation.gallery.indices, None if queries is None else queries.indices)
    inspect = make_inspector(config, network)
    look = lambda source, rows: inspect_patches(inspect, teacher, source, config, rows)
    if evaluation.queries is None:
        source, features, kind = splits.train, evaluation.gallery, "training"
    else:
        source, features, kind = splits.test, evaluation.queries, "test"
    return Exhibit(config, source, features, kind, splits.train, evaluation.gallery, look)


def short(name: str) -> str:
    """The last two parts of a path: enough to find an image, and nothing about the machine."""
    return "/".join(name.replace("\\", "/").split("/")[-2:])
