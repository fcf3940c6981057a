"""Flags whose value is a tuple, written as one would say it: `knn,retrieval`, `0.4,1`, `(5, 10)`."""

from absl import flags
from ml_collections import config_flags


class TupleParser(flags.ArgumentParser):
    """Text -> tuple: elements separated by commas, in parentheses, brackets or neither.

    An element is a number, or a word with or without quotes; `rules` says what each key takes. A flag that is given twice has
    its later value, as flags of other types do; the parser of ml_collections would join the two.
    """

    syntactic_help = "elements separated by commas"

    def parse(self, argument: str | tuple) -> tuple[int | float | str, ...]:
        if isinstance(argument, tuple):  # a default
            return argument
        text = argument.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1].strip()
        elements = text.removesuffix(",").split(",")  # Python writes a tuple of one as (5,)
        return tuple(_element(element.strip()) for element in elements) if text else ()

    def flag_type(self) -> str:
        return "tuple"


def _element(text: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def register() -> None:
    """Has `--config.SECTION.KEY=` read tuples with `TupleParser`."""
    config_flags.register_flag_parser_for_type(tuple, TupleParser())
