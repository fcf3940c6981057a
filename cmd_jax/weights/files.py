"""Arrays in files: `.safetensors` in and out, and pickled PyTorch checkpoints through a child process."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from cmd_jax import files
from cmd_jax.errors import WeightsError
from cmd_jax.weights import pickled_child

# transformers asks for it: the layouts (out, in) and OIHW are those of PyTorch.
PYTORCH_METADATA = {"format": "pt"}


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is no whole .safetensors file ({error}); download or convert it again") from error


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Reads a file.

    Args:
        path: of a `.safetensors` file.

    Returns:
        name -> array; every floating type (bfloat16 and float16 too) becomes float32, integers stay.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    with _readable(path):
        arrays = safetensors_numpy.load_file(path)
    # bfloat16 is an extension type of NumPy's, of kind V.
    return {name: np.asarray(array, np.float32) if array.dtype.kind in "fV" else array for name, array in arrays.items()}


def read_safetensors_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """name -> shape of what `read_safetensors` reads; the numbers stay on the disk.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    with _readable(path), safetensors.safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def read_metadata(path: str) -> dict[str, str]:
    """Reads the texts beside the arrays of a file.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    with _readable(path), safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}


def write_safetensors(path: str, arrays: dict[str, np.ndarray], metadata: dict[str, str] = PYTORCH_METADATA) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: of the file; its directory exists.
        arrays: name -> array.
        metadata: texts beside them.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    files.write(path, safetensors_numpy.save(contiguous, metadata=metadata))


def read_pickled(path: str, network: str) -> dict[str, np.ndarray]:
    """Reads one network of a pickled checkpoint: PyTorch unpickles it in a child process, with `weights_only`.

    Args:
        path: of the file, which exists.
        network: "teacher" or "student", for checkpoints that hold both; others give the one they hold.

    Returns:
        name -> array as in the file, float32.

    Raises:
        WeightsError: PyTorch is not installed, or the file holds anything else than arrays, plain containers and the
            argparse.Namespace of the references' options.
    """
    with _of_child(path, network, "network.safetensors") as out:
        return read_safetensors(out)


def read_pickled_shapes(path: str, network: str) -> dict[str, tuple[int, ...]]:
    """name -> shape of what `read_pickled` reads; arguments and errors are its."""
    with _of_child(path, network, "shapes.json") as out, open(out, encoding="utf-8") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


@contextlib.contextmanager
def _of_child(path: str, network: str, name: str) -> Iterator[str]:
    """Path of what the child process wrote."""
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            f"{path} is a pickled checkpoint, which needs PyTorch: pip install torch, or convert it to "
            ".safetensors where PyTorch is installed"
        )
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, name)
        # -P: the folder of the script is not searched for modules.
        command = [sys.executable, "-P", pickled_child.__file__, path, network, out]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
            raise WeightsError(f"{path} was not read: {lines[-1]}")
        yield out
