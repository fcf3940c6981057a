"""Tuples on the command line: every natural form, for every key that takes one, and the later of two wins."""

import pytest
from absl import flags
from ml_collections import config_flags

from cmd_jax import config as config_lib
from cmd_jax import tuple_flag
from cmd_jax.errors import ConfigError
from cmd_jax.rules import check_values, keys
from cmd_jax.tuple_flag import TupleParser

TUPLES = {key: value for key, value in keys(config_lib.default()).items() if isinstance(value, tuple)}


def _config(*arguments):
    """What a binary makes of its flags."""
    tuple_flag.register()
    values, command = flags.FlagValues(), ["binary", *arguments]
    config = config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values, sys_argv=command)
    values(command)
    check_values(config.value)
    return config_lib.resolve(config.value, 1000)


def _forms(value):
    """Ways to write a tuple."""
    bare = [f"{element:g}" if isinstance(element, float) else str(element) for element in value]  # 1.0 as 1
    yield str(value)  # ('knn', 'retrieval')
    yield str(list(value))
    for separator in (",", ", "):
        text = separator.join(bare)  # knn,retrieval
        yield from (text, f"({text})", f"[{text}]", f" {text},")


@pytest.mark.parametrize("key", TUPLES)
def test_every_tuple_is_read_in_every_natural_form(key):
    usual = TUPLES[key]
    other = usual[:1] * len(usual) if isinstance(usual[0], float) else usual[::-1]
    for form in _forms(usual):
        for given in ((f"--config.{key}={form}",), (f"--config.{key}={other}", f"--config.{key}", form)):
            read = keys(_config(*given))[key]
            assert (read, list(map(type, read))) == (usual, list(map(type, usual))), given


def test_one_element_needs_no_comma():
    assert _config("--config.eval.knn_k=5").eval.knn_k == (5,)
    assert _config("--config.eval.knn_k=(5)").eval.knn_k == (5,)
    assert _config("--config.eval.protocols=knn").eval.protocols == ("knn",)


@pytest.mark.parametrize("key", TUPLES)
@pytest.mark.parametrize("text", ["", "()", "some words", "5,,10", "5;10", "((1, 2), 3)"])
def test_what_is_no_list_of_the_right_elements_is_refused_by_the_rule_of_its_key(key, text):
    with pytest.raises(ConfigError, match=rf"^{key} is \(.*; it must be"):
        _config(f"--config.{key}={text}")


def test_a_default_is_left_as_it_is():
    assert TupleParser().parse(("a", 1.5)) == ("a", 1.5)
