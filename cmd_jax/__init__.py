"""Self-supervised learning of fine-grained visual categories by cross-level multi-instance distillation (CMD), in JAX.

import cmd_jax
model = cmd_jax.load("runs/photos")
features = model.embed(["a.jpg", "b.jpg"])
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`cmd_jax.load`, imported on first use: models and method must run where only jax and flax are installed."""
    if name == "load":
        from cmd_jax.api import load

        return load
    raise AttributeError(f"module 'cmd_jax' has no attribute {name!r}")
