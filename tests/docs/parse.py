"""`python -m tests.docs.parse MODULE ARGUMENT ...`: reads the flags of a program as it does, and runs nothing."""

import importlib
import sys

from absl import flags

from cmd_jax import cli

program = sys.argv[1]
sys.argv = sys.argv[1:]  # where ml_collections looks for the flags of the configuration
try:
    binary = importlib.import_module(program)
    if not hasattr(binary, "USAGE"):
        importlib.import_module(f"{program}.__main__")
except ModuleNotFoundError as error:
    sys.exit(str(error))
flags.FLAGS(sys.argv)
if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
    cli.given_config()
