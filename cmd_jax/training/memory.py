"""Memory of the host."""

import ctypes
import sys


def return_free_memory() -> None:
    """Gives memory that the process no longer uses back to the system: after compiling a step that is about a gigabyte.

    glibc keeps freed memory for later otherwise; elsewhere than on Linux with glibc this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
