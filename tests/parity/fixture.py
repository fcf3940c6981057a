"""One file of golden numbers: its arrays and hyper-parameters, and what was compared with them."""

import json
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cmd_jax.weights.files import read_safetensors
from tests.conftest import quick

OUTPUTS = ("out_", "term_", "grad_", "new_")  # and "loss": the files made from equations name no direction
WEIGHTS_SUFFIX = "_weights.safetensors"


class Tolerance(NamedTuple):
    """How far a number may be off.

    Attributes:
        limit: the largest error that passes.
        measure: of the error: "absolute"; "relative", each entry to itself; "of largest", to the largest entry.
    """

    limit: float
    measure: str


FORWARD = Tolerance(2e-4, "absolute")  # outputs of networks, of order 1
LOSS = Tolerance(1e-5, "of largest")
GRADIENT = Tolerance(1e-4, "of largest")
CENTER = Tolerance(1e-6, "absolute")
PARAMETER = Tolerance(1e-6, "absolute")  # after steps of the optimizer
SCHEDULE = Tolerance(1e-9, "absolute")
VOTES = Tolerance(1e-4, "relative")
MEAN_PRECISION = Tolerance(0.01, "absolute")  # percentage points
EXACT = Tolerance(0.0, "absolute")


def compiled(function: Callable) -> Callable:
    """`jax.jit`, on a CPU compiled quickly. What the compiler of another device makes of it is compared as it is used."""
    return quick(function) if jax.default_backend() == "cpu" else jax.jit(function)


class Comparison(NamedTuple):
    """One expected array against the project's."""

    array: str
    error: float  # in the tolerance's measure; infinite where shapes or NaN differ
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance.limit

    @property
    def ratio(self) -> float:
        """Error over limit: above 1 fails."""
        return self.error / self.tolerance.limit if self.tolerance.limit else (np.inf if self.error else 0.0)


class MissingArray(KeyError):
    """An array, file or hyper-parameter that the fixture's schema has and the fixture has not."""


class Hyperparameters(dict):
    """meta_json; asking for a key that is not there is a missing array."""

    def __missing__(self, key: str) -> Any:
        raise MissingArray(f"meta_json: {key}")


class Fixture:
    """Reads `NAME.npz` and records comparisons.

    Attributes:
        name: of the file, without ending.
        meta: the hyper-parameters of `meta_json`; empty where the file has none.
        comparisons: made so far.
        missing: expected arrays that the file lacks.
    """

    def __init__(self, path: str):
        self.name = os.path.basename(path).removesuffix(".npz")
        self.weights_path = path.removesuffix(".npz") + WEIGHTS_SUFFIX
        # np.load leaves a damaged file open.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            self._arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(self._arrays.pop("meta_json", "{}")))
        self.meta: dict = json.loads(json.dumps(meta), object_hook=Hyperparameters)
        self.comparisons: list[Comparison] = []
        self.missing: list[str] = []

    def __getitem__(self, array: str) -> np.ndarray:
        if array not in self._arrays:
            raise MissingArray(array)
        return self._arrays[array]

    def __contains__(self, array: str) -> bool:
        return array in self._arrays

    def find(self, pattern: str) -> list[str]:
        """The group of a regular expression in every array's name that it matches as a whole, in the file's order."""
        found = (re.fullmatch(pattern, array) for array in self._arrays)
        return list(dict.fromkeys(match[1] for match in found if match))

    def images(self, array: str) -> np.ndarray:
        """An input of images as ours: [..., 3, height, width] -> [..., height, width, 3]."""
        return np.moveaxis(self[array], -3, -1)

    def weights(self) -> dict[str, np.ndarray]:
        """The arrays of the weights file under their PyTorch names, float32."""
        if not os.path.exists(self.weights_path):
            raise MissingArray(os.path.basename(self.weights_path))
        return read_safetensors(self.weights_path)

    def check(self, array: str, actual: Any, tolerance: Tolerance, part: Any = ...) -> None:
        """Compares an expected array, or notes that it is missing.

        Args:
            array: its name.
            actual: what the project computes.
            tolerance: that applies.
            part: index of the compared part, for arrays whose parts have other tolerances.
        """
        if array not in self._arrays:
            self.missing.append(array)
            return
        error = difference(np.asarray(actual), self._arrays[array][part], tolerance.measure)
        self.comparisons.append(Comparison(array, error, tolerance))

    def unchecked(self) -> list[str]:
        """Outputs in the file that nothing was compared with."""
        seen = {comparison.array for comparison in self.comparisons}
        return [key for key in self._arrays if (key.startswith(OUTPUTS) or key == "loss") and key not in seen]


def difference(actual: np.ndarray, expected: np.ndarray, measure: str) -> float:
    """The largest error of an array.

    Args:
        actual: rounded to the expected array's floating type first, so that exact means exact as stored.
        expected: NaN where NaN is expected.
        measure: see `Tolerance`.

    Returns:
        Infinite where the shapes differ, or one is not finite where the other is.
    """
    if actual.shape != expected.shape:
        return np.inf
    if expected.dtype.kind == "f":
        actual = actual.astype(expected.dtype)
    finite = np.isfinite(expected) & np.isfinite(actual)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return np.inf
    actual, expected = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    error, size = np.abs(actual - expected), np.abs(expected)
    if not error.size or not np.any(error):
        return 0.0
    if measure == "absolute":
        return float(np.max(error))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = error / (size if measure == "relative" else np.max(size))
    return float(np.max(np.where(error > 0, ratio, 0.0)))
