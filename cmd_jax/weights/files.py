"""Reading and writing `.safetensors`, without PyTorch."""

import os

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from cmd_jax.errors import WeightsError

# Both timm and transformers ask for it: the layouts (out, in) and OIHW are those of PyTorch.
PYTORCH_METADATA = {"format": "pt"}


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Reads a file.

    Args:
        path: of a `.safetensors` file.

    Returns:
        name -> array; every floating type (bfloat16 and float16 too) becomes float32, integers stay.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    try:
        arrays = safetensors_numpy.load_file(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is no whole .safetensors file ({error}); download or convert it again") from error
    # bfloat16 is an extension type of NumPy's, of kind V.
    return {name: np.asarray(array, np.float32) if array.dtype.kind in "fV" else array for name, array in arrays.items()}


def read_metadata(path: str) -> dict[str, str]:
    """The texts beside the arrays of a file.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is no whole .safetensors file ({error}); download or convert it again") from error


def write_safetensors(path: str, arrays: dict[str, np.ndarray], metadata: dict[str, str] = PYTORCH_METADATA) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: of the file; its directory exists.
        arrays: name -> array.
        metadata: texts beside them.
    """
    partial = f"{path}.partial"
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # Not its save_file, which lets nobody but the owner read the file.
    with open(partial, "wb") as file:
        file.write(safetensors_numpy.save(contiguous, metadata=metadata))
    os.replace(partial, path)
