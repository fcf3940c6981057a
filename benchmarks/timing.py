"""What the benchmarks share: settings of the command line, and variants that are timed in turn."""

import ast
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Spread(NamedTuple):
    """Median, smallest and largest of some rounds."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def alternate(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every variant once a round, so that all of them meet the same state of the machine.

    Args:
        variants: by name, each returns the seconds it took.
        rounds: that count; one more before them warms up.

    Returns:
        Seconds of every round by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1 + rounds):
        for name, variant in variants.items():
            took = variant()
            if number:
                seconds[name].append(took)
    return seconds


def parse_value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_values(config: ConfigDict, settings: Sequence[str]) -> None:
    """Sets "section.key=value" each, as `--config.section.key=value` does.

    Raises:
        KeyError: unknown key.
    """
    for item in settings:
        key, _, text = item.partition("=")
        section, name = key.split(".")
        config[section][name]  # raises for an unknown key
        config[section][name] = parse_value(text)
