"""`synthetic_birds`, the embedded fine-grained dataset: 20 species told apart by small parts only."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from typing import Any

import numpy as np
from PIL import Image

from cmd_jax.datasets import bird_renderer
from cmd_jax.progress import track

IMAGE_PX = 128
DRAWING_THREADS = 2  # numpy and Pillow leave the interpreter to each other for part of a drawing
IMAGES_PER_SPECIES = {"train": 100, "test": 25}

# Name -> variant of each part in the order of bird_renderer.PARTS. Neighbours in the list differ in one or two parts,
# all others in three or more.
SPECIES = {
    "marsh_quillet": "32111",
    "upland_quillet": "30311",
    "dusk_tarrel": "10130",
    "reed_tarrel": "13130",
    "lesser_wimble": "12002",
    "greater_wimble": "11000",
    "coast_pellin": "21010",
    "island_pellin": "21210",
    "northern_skarn": "13221",
    "southern_skarn": "33223",
    "river_hobbin": "33332",
    "brook_hobbin": "03332",
    "heath_lorrit": "30023",
    "pine_lorrit": "20033",
    "eastern_veary": "01103",
    "western_veary": "00103",
    "cliff_dunnock": "00212",
    "vale_dunnock": "01222",
    "fen_ortling": "20301",
    "meadow_ortling": "23301",
}
SPECIES_NAMES = tuple(SPECIES)


class SyntheticBirds:
    """Procedural birds in the form of a `Dataset`; the same seed gives the same images on every machine.

    A species is decided by the variants of five small parts; pose, scale, colours, light, background and clutter are drawn
    independently of it.
    """

    name, level, layouts, banner_px = "synthetic_birds", None, (), 0
    version = "1.1.0"  # since 1.0.0 colours vary in hue and less in brightness, and the sun is softer
    homepage = "https://arxiv.org/abs/2401.08860"
    seed = 0

    @property
    def description(self) -> str:
        return self.__doc__

    def features(self) -> dict[str, Any]:
        """TFDS features by name, beside the label's."""
        import tensorflow_datasets as tfds  # slow to import

        return {
            "image": tfds.features.Image(shape=(IMAGE_PX, IMAGE_PX, 3), encoding_format="png"),
            # (ymin, xmin, ymax, xmax) in fractions of the image, one row for each of bird_renderer.PARTS.
            "part_boxes": tfds.features.Tensor(shape=(len(bird_renderer.PARTS), 4), dtype=np.float32),
        }

    def splits(self, manual_dir: str) -> tuple[list[str], dict[str, Iterator[tuple[str, dict]]]]:
        """Names of the species, and keys and examples of every split; needs no files."""
        del manual_dir
        return list(SPECIES_NAMES), {split: self._generate(split) for split in IMAGES_PER_SPECIES}

    def _generate(self, split: str) -> Iterator[tuple[str, dict]]:
        numbers = range(IMAGES_PER_SPECIES[split])
        with ThreadPoolExecutor(DRAWING_THREADS) as pool:
            drawn = chain.from_iterable(
                pool.map(self._example, repeat(split), repeat(label), numbers) for label in range(len(SPECIES))
            )
            yield from track(drawn, f"synthetic_birds {split}", len(SPECIES) * len(numbers))

    def _example(self, split: str, label: int, number: int) -> tuple[str, dict]:
        # A generator for each image: independent of the order, and of the species' variants.
        rng = np.random.default_rng([self.seed, split == "test", label, number])
        name, digits = tuple(SPECIES.items())[label]
        bird = bird_renderer.render(tuple(int(digit) for digit in digits), rng, IMAGE_PX)
        encoded = io.BytesIO()
        Image.fromarray(bird.image).save(encoded, "png", compress_level=1)
        encoded.seek(0)
        boxes = np.asarray([bird.boxes[part] for part in bird_renderer.PARTS], np.float32)
        key = f"{split}/{name}/{number:03d}"
        return key, {"image": encoded, "label": label, "id": key, "part_boxes": boxes}
