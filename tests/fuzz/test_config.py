"""Any text after --config.SECTION.KEY=: a configuration that resolves, or an error of ours or of the flag."""

import functools
import sys
from collections import Counter
from unittest import mock

import numpy as np
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

import cmd_jax.cli  # noqa: F401 (it registers the parser of tuples)
from cmd_jax.config import SOURCES, default, resolve, validate
from cmd_jax.errors import ConfigError
from tests.fuzz.mutations import cases, report

CASES = 1000
# What `cli` turns into one line and exit code 64.
FLAG_ERRORS = (flags.Error, KeyError, AttributeError, ValueError, OSError)
KEYS = [key for key, _ in default().items() if isinstance(default()[key], ConfigDict)]
LEAVES = ["seed", *(f"{section}.{name}" for section in KEYS for name in default()[section])]
WORDS = (
    "", "0", "1", "-1", "2", "3", "7", "8", "16", "64", "224", "1e300", "-1e300", "nan", "inf", "-inf", "1.5", "1e-9",
    "99999999999999999999", "9" * 5000, "0x10", "None", "none", "True", "false", "()", "(1,)", "(0.1, 0.9)", "(0.9, 0.1)",
    "(nan, nan)", "('a', 'b')", "(1, 2, 3)", "(((", "(" * 300, "[1]", "{}", "'", '"', "\\", "\0", "\n", "\x1b[31m", "é", "日本",
    "$(reboot)", "`id`", "../../etc/passwd", "/dev/zero", "~", "__import__('os')", "cls+mean", "mil+", "+", "cls", "mean",
    "tfds:", "tfds:../x", "dino", "esvit", "released", "swin_tiny", "vit_micro", "folder", "bfloat16", "cudnn", *SOURCES,
)  # fmt: skip


def _parse(arguments):
    """What a binary reads whose --config names a file that changes nothing."""
    values = flags.FlagValues()
    with mock.patch.object(sys, "argv", ["main", *arguments]):  # where ml_collections looks
        config_flags.DEFINE_config_dict("config", default(), flag_values=values, lock_config=True)
        values(sys.argv)
    return values["config"].value


def test_any_override(record_property):
    outcomes = Counter()
    usual = st.none()  # the key's own default, written out
    texts = st.sampled_from(WORDS) | st.text(max_size=6) | st.floats().map(str) | usual | usual

    @cases(CASES)
    @given(st.lists(st.tuples(st.sampled_from(LEAVES), texts), min_size=1, max_size=2), st.integers(0, 9))
    def attempt(values, misspelt):
        defaults = default().to_dict()
        arguments = []
        for key, value in values:
            written = functools.reduce(lambda node, name: node[name], key.split("."), defaults) if value is None else value
            arguments.append(f"--config.{key}{'x' * (not misspelt)}={written}")
        try:
            config = _parse(arguments)
        except FLAG_ERRORS:
            outcomes["flag errors"] += 1
            return
        assert misspelt
        try:
            validate(config)
            resolved = resolve(config, 5000)
            validate(resolved)
        except ConfigError:
            outcomes["ConfigError"] += 1
        else:
            outcomes["configurations"] += 1
            for section in KEYS:
                for key, value in resolved[section].items():
                    assert not isinstance(value, float) or np.isfinite(np.float32(value)), key
                    assert not isinstance(value, int) or abs(value) < 2**31, key

    attempt()
    assert report(record_property, "overrides of the configuration", outcomes) >= 500
    assert min(outcomes[kind] for kind in ("flag errors", "ConfigError", "configurations")) > 50
