"""Pickled PyTorch checkpoints: read by PyTorch with `weights_only` in a child process, never unpickled here."""

import importlib.util
import os
import subprocess
import sys
import tempfile

from cmd_jax.errors import WeightsError
from cmd_jax.weights import pickled_child
from cmd_jax.weights.files import read_safetensors
from cmd_jax.weights.names import Arrays


def read_pickled(path: str, network: str) -> Arrays:
    """Reads one network of a checkpoint.

    Args:
        path: of the file, which exists.
        network: "teacher" or "student", for checkpoints that hold both; others give the one they hold.

    Returns:
        name -> array as in the file, float32.

    Raises:
        WeightsError: PyTorch is not installed, or the file holds anything else than arrays, plain containers and the
            argparse.Namespace of the references' options.
    """
    if importlib.util.find_spec("torch") is None:
        raise WeightsError(
            f"{path} is a pickled checkpoint, which needs PyTorch: pip install torch, or convert it to "
            ".safetensors where PyTorch is installed"
        )
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, "network.safetensors")
        # -P: the folder of the script is not searched for modules.
        command = [sys.executable, "-P", pickled_child.__file__, path, network, out]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            lines = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
            raise WeightsError(f"{path} was not read: {lines[-1]}")
        return read_safetensors(out)
