"""A model card in the layout of the Hugging Face hub, filled from the configuration and the evaluation of a run."""

import json
import re
from importlib import resources
from typing import Any, NamedTuple

import jinja2

from cmd_jax import __version__
from cmd_jax.metrics import Number
from cmd_jax.text import printable

_LIBRARIES = {"safetensors": "cmd_jax", "stablehlo": "jax", "onnx": "onnx", "timm": "timm", "hf": "transformers"}
_MARKUP = re.compile(r"([\\`*_\[\]<>#!|~$&:@/])")  # addresses and @names become links where they are bare


class CardFacts(NamedTuple):
    """What a model card says about a network.

    Attributes:
        form: format of the export.
        name: of the model.
        file: name of the file or the directory.
        config: the configuration by section, without private paths.
        step: of the checkpoint.
        network: "teacher" or "student".
        parameters: number of them.
        feature_width: F.
        grid: rows, and columns, of patches.
        fingerprint: of weights and preparation.
        statistics: mean and standard deviation of the channels, pixels in 0..1; None: local contrast is normalised.
    """

    form: str
    name: str
    file: str
    config: dict[str, Any]
    step: int
    network: str
    parameters: int
    feature_width: int
    grid: int
    fingerprint: str
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None


class _Safe(str):
    """Text that is Markdown already."""


def markdown(text: Any) -> str:
    """Escapes a text for Markdown: names of classes and files are written by strangers."""
    return text if isinstance(text, _Safe) else _Safe(_MARKUP.sub(r"\\\1", printable(str(text))))


def _quoted(value: Any) -> str:
    """A string literal of YAML, Python and JSON alike, on one line, that cannot end a block of code."""
    return _Safe(json.dumps(printable(str(value))).replace("`", "\\u0060"))


def model_card(facts: CardFacts, results: list[Number]) -> str:
    """Renders the card; every value is escaped unless the template asks for a quoted string.

    Args:
        facts: of what was exported.
        results: of its evaluation; empty if there was none.
    """
    environment = jinja2.Environment(
        finalize=markdown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quoted"] = _quoted
    environment.filters["number"] = lambda value: _Safe(f"{value:,}" if isinstance(value, int) else f"{value:g}")
    environment.filters["exact"] = lambda value: _Safe(repr(value))
    environment.filters["fixed"] = lambda value: _Safe(f"{value:.2f}")
    template = environment.from_string(resources.files("cmd_jax.weights").joinpath("card.md.jinja").read_text("utf-8"))
    return template.render(**facts._asdict(), results=results, version=__version__, library=_LIBRARIES[facts.form])
