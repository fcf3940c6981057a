"""Damaged .safetensors files, headers that lie among them: arrays of their own size or a WeightsError."""

import contextlib
import json
import struct
from collections import Counter

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cmd_jax.errors import WeightsError
from cmd_jax.weights.files import read_safetensors, write_safetensors
from cmd_jax.weights.fit import fit
from cmd_jax.weights.names import identify
from cmd_jax.weights.preparation import Beside
from cmd_jax.weights.recognise import recognise
from tests.fuzz.mutations import cases, changes, mutate, report
from tests.weights.checkpoints import dino_vit

CASES = 600
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", ""]
        ),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**62, -1]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 48, 2**40, 2**64 - 1, -4]), max_size=3),
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "", "../../a", "a\x1b[31m", "__metadata__", "norm.weight", "a/b", "é" * 50]),
    ENTRY | st.none() | st.just({"format": "pt"}) | st.integers(),
    max_size=3,
).map(lambda header: json.dumps(header).encode())


def _model():
    return {"backbone/norm/scale": (96,), "backbone/cls_token": (1, 1, 96)}


def test_damaged_weights(record_property, tmp_path):
    outcomes, messages, path = Counter(), [], tmp_path / "a.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16), "c": np.arange(3)}
    write_safetensors(str(path), arrays)
    whole = path.read_bytes()

    def read(content, same_shapes):
        path.write_bytes(content)
        try:
            found = read_safetensors(str(path))
        except WeightsError as error:
            messages.append(str(error))
            outcomes["WeightsError"] += 1
            return
        outcomes["arrays"] += 1
        assert sum(array.size for array in found.values()) <= len(content)
        assert all(array.dtype == np.float32 or array.dtype.kind in "biuc" for array in found.values())
        if same_shapes:
            assert {name: array.shape for name, array in found.items()} == {"a": (2, 3), "b": (4,), "c": (3,)}
        with contextlib.suppress(WeightsError):
            named = identify(found, "teacher", "file")
            recognise(named, Beside(), "file")
            fit(named, _model(), "file", heads=False)

    @cases(CASES)
    @given(changes)
    def damage(changes):
        read(mutate(whole, changes), False)

    @cases(CASES // 2)
    @given(st.lists(st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)), min_size=1, max_size=4))
    def flip_data(changes):
        read(mutate(whole, changes, start=8 + struct.unpack("<Q", whole[:8])[0]), True)

    @cases(CASES)
    @given(HEADERS, st.binary(max_size=64), st.sampled_from([0, 0, 0, 1, -1, 2**20, 2**62]))
    def lie(header, data, off):
        read(struct.pack("<Q", max(0, len(header) + off)) + header + data, False)

    damage()
    flip_data()
    lie()
    assert all(str(path) in message for message in messages)
    assert report(record_property, "damaged .safetensors files", outcomes) >= 300
    assert min(outcomes.values()) > 50


def test_whole_files_are_read_as_written(tmp_path):
    path = str(tmp_path / "a.safetensors")
    write_safetensors(path, dino_vit())
    for name, array in read_safetensors(path).items():
        np.testing.assert_array_equal(array, dino_vit()[name])
