"""Self-supervised learning of fine-grained visual categories by cross-level multi-instance distillation (CMD), in JAX."""

__version__ = "0.1.0"
