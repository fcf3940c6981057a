"""Damaged files of features and of weights: rows of their own size, or one error that names the file."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from cmd_jax.errors import ConfigError, DatasetError, WeightsError
from cmd_jax.inference import store
from cmd_jax.inference.load import read_trained
from tests.fuzz.mutations import cases, changes, mutate, report

CASES = 250


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """suffix -> bytes of a small file."""
    directory = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    columns = {
        "features": rng.normal(size=(5, 3)),
        "patch_tokens": rng.normal(size=(5, 8)),
        "mil_weights": np.full((5, 4), 0.25),
    }
    store.write_part(str(directory / "part"), [f"{number}.png" for number in range(5)], columns)
    widths = {name: array.shape[1] for name, array in columns.items()}
    meta = store.Meta("0", "run", 1, "f", "j", "mil", 16, 2, widths, 5)
    contents = {}
    for suffix in store.SUFFIXES:
        path = directory / f"a{suffix}"
        store.join_parts([str(directory / "part")], str(path), meta)
        contents[suffix] = path.read_bytes()
    return contents


@pytest.mark.parametrize("suffix", store.SUFFIXES)
def test_damaged_features(suffix, whole, tmp_path, record_property):
    outcomes, messages, path = Counter(), [], tmp_path / f"a{suffix}"

    @cases(CASES)
    @given(changes)
    def damage(changes):
        path.write_bytes(mutate(whole[suffix], changes))
        try:
            meta = store.read_meta(str(path))
            for names, columns in store.rows(str(path), meta, list(meta.widths)):
                assert all(array.shape == (len(names), meta.widths[name]) for name, array in columns.items())
        except DatasetError as error:
            messages.append(str(error))
            outcomes["DatasetError"] += 1
            return
        outcomes["rows"] += 1

    damage()
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert report(record_property, f"damaged {suffix} files", outcomes) >= CASES
    assert outcomes["DatasetError"] > 100
    assert outcomes["rows"] > 3  # damage that reaches no number: a zip entry has a checksum


def test_damaged_weights(exported, tmp_path, record_property):
    outcomes, messages, path = Counter(), [], tmp_path / "a.safetensors"
    content = exported.read_bytes()

    @cases(60)
    @given(changes)
    def damage(changes):
        path.write_bytes(mutate(content[:20_000], changes) + content[20_000:])  # header, metadata and the first arrays
        try:
            read_trained(str(path))
        except (WeightsError, ConfigError) as error:  # what is no longer ours is asked for its model
            messages.append(str(error))
            outcomes[type(error).__name__] += 1
        else:
            outcomes["network"] += 1

    damage()
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert report(record_property, "damaged exports", outcomes) >= 60
    assert outcomes["WeightsError"] > 30
