"""The configuration of those who name no file: `default`, whose keys flags may change."""

from cmd_jax.config.keys import default as get_config

__all__ = ["get_config"]
