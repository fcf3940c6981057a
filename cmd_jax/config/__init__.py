"""The configuration: every key with its default and rule, checks with a remedy, and rules that fill what is left open.

A file in `configs/` calls `default()` and changes what its experiment needs; `--config.section.key=value` changes single
values. Keys that are None are filled by `resolve` from the method, the number of training images and the hardware, so the
written `config.json` holds every value that was used.
"""

from ml_collections import ConfigDict

from cmd_jax.config.check import check_values, validate
from cmd_jax.config.keys import (
    BEST_METRICS,
    EVAL_PROTOCOLS,
    KEYS,
    METHODS,
    MODELS,
    SOURCES,
    TFDS_PREFIX,
    default,
    flatten,
    has_class_token,
    is_swin,
    patch_px,
    token_px,
)
from cmd_jax.config.resolve import (
    BY_HARDWARE,
    BY_WEIGHTS,
    ONE_CPU,
    RENAMED,
    Hardware,
    absolute_paths,
    check_attention,
    default_batch_size,
    for_inference,
    from_dict,
    load,
    method_values,
    read_json,
    region_rows,
    resolve,
    save,
    start_name,
)

__all__ = [
    "BEST_METRICS",
    "BY_HARDWARE",
    "BY_WEIGHTS",
    "EVAL_PROTOCOLS",
    "KEYS",
    "METHODS",
    "MODELS",
    "ONE_CPU",
    "RENAMED",
    "SOURCES",
    "TFDS_PREFIX",
    "ConfigDict",
    "Hardware",
    "absolute_paths",
    "check_attention",
    "check_values",
    "default",
    "default_batch_size",
    "flatten",
    "for_inference",
    "from_dict",
    "has_class_token",
    "is_swin",
    "load",
    "method_values",
    "patch_px",
    "read_json",
    "region_rows",
    "resolve",
    "save",
    "start_name",
    "token_px",
    "validate",
]
