"""The CUB builder on a miniature archive in the genuine layout."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from cmd_jax.config import ConfigError
from cmd_jax.data.builders import cub
from cmd_jax.data.decode import decode_rgb
from cmd_jax.data.sources import TFDSSource

CLASSES = ("001.Black_footed_Albatross", "002.Brewer_s_Blackbird")


class MiniCub(cub.Cub):
    """The builder with the counts of the miniature."""

    name = "mini_cub"
    CLASSES, COUNTS = 2, {"train": 4, "test": 2}


def _archive(path, drop=None, train=4):
    """Six images: ids are 1-based, one image is grey, the order of the tables is not that of the files."""
    files = {"classes.txt": "".join(f"{i + 1} {name}\n" for i, name in enumerate(CLASSES))}
    tables = dict.fromkeys(("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs"), "")
    for number in range(1, 7):
        label = 1 + (number - 1) // 3
        mode = "L" if number == 2 else "RGB"
        name = f"{CLASSES[label - 1]}/Some_Bird_{number:04d}_7961.11.jpg"
        pixels = (
            np.full((40, 60), 40 * number, np.uint8) if mode == "L" else np.full((40, 60, 3), (40 * number, 0, 255), np.uint8)
        )
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "jpeg", quality=95)
        files[f"images/{name}"] = encoded.getvalue()
        tables["images"] += f"{number} {name}\n"
        tables["image_class_labels"] += f"{number} {label}\n"
        tables["train_test_split"] += f"{number} {int(number <= train)}\n"
        tables["bounding_boxes"] += f"{number} 6.0 4.0 30.0 20.0\n"
        for part in range(1, 16):
            tables["parts/part_locs"] += (
                f"{number} {part} {15.0 if part == 2 else 0.0} {10.0 if part == 2 else 0.0} {int(part == 2)}\n"
            )
    files |= {f"{name}.txt": text for name, text in tables.items()}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [*files.items()][::-1]:
            if name != drop:
                data = content if isinstance(content, bytes) else content.encode()
                member = tarfile.TarInfo(f"CUB_200_2011/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _source(tmp_path, config, split="train"):
    config.data.data_dir, config.data.manual_dir = str(tmp_path / "data"), str(tmp_path)
    return TFDSSource(MiniCub, config.data, split)


def test_genuine_layout_is_read(tmp_path, tiny_config):
    _archive(tmp_path / cub.ARCHIVE)
    train, test = (_source(tmp_path, tiny_config, split) for split in ("train", "test"))
    assert train.class_names == CLASSES
    records = sorted((train[index] for index in range(len(train))), key=lambda record: record.name)
    assert [record.label for record in records] == [0, 0, 0, 1]
    assert len(test) == 2
    np.testing.assert_allclose(decode_rgb(records[0].encoded, "")[0, 0], (40, 0, 255), atol=4)
    assert decode_rgb(records[1].encoded, "grey").shape == (40, 60, 3)
    boxes = records[0].part_boxes
    # the one visible part: (y, x) = (10, 15) of 40 x 60, a square of 15 % of the longer side of the box, 30 px
    np.testing.assert_allclose(boxes[1], [(10 - 2.25) / 40, (15 - 2.25) / 60, (10 + 2.25) / 40, (15 + 2.25) / 60], rtol=1e-5)
    assert np.all(boxes[[0, 2, 14]] == 0)


def test_a_missing_archive_says_which_file_and_where(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match=r"CUB_200_2011\.tgz.*data\.caltech\.edu.*manual_dir"):
        _source(tmp_path, tiny_config)


@pytest.mark.parametrize(
    ("drop", "train", "message"),
    [
        ("parts/part_locs.txt", 4, "lacks parts/part_locs.txt"),
        (f"images/{CLASSES[0]}/Some_Bird_0001_7961.11.jpg", 4, "lacks 1 images"),
        (None, 3, "lists 3 train images"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, tiny_config, drop, train, message):
    _archive(tmp_path / cub.ARCHIVE, drop, train)
    with pytest.raises(ConfigError, match=message):
        _source(tmp_path, tiny_config)


def test_what_is_no_archive_is_refused(tmp_path, tiny_config):
    (tmp_path / cub.ARCHIVE).write_bytes(b"<html>404</html>")
    with pytest.raises(ConfigError, match="cannot be read"):
        _source(tmp_path, tiny_config)
