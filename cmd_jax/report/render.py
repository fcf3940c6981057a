"""Renders templates to one HTML file that needs no other file and may load none."""

import importlib.resources
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cmd_jax.text import script_digest

SCRIPTS = ("page.js", "map.js", "explorer.js")


def render(template: str, **context: Any) -> str:
    """Fills a template of `templates/`; every value is escaped.

    The page's policy allows plotly's script and the package's own, by their digests, and no network: a script that came in
    by data would not run even where it was not escaped.

    Args:
        template: its name.
        context: values by name; `data` is read by the scripts as JSON.
    """
    from plotly.offline import get_plotlyjs  # imported here: only a report needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cmd_jax.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breaks"] = breaks
    scripts = [get_plotlyjs(), "\n".join(_text(name) for name in SCRIPTS)]
    return environment.get_template(template).render(
        **context | {"data": finite(context["data"])},
        style=Markup(_text("style.css")),
        scripts=[Markup(script) for script in scripts],
        digests=[script_digest(script) for script in scripts],
    )


def breaks(name: str) -> Markup:
    """A name, escaped, that may go on in the next line after an underscore, a slash or a dot."""
    return Markup(re.sub(r"([_/.])", r"\1<wbr>", str(escape(name))))


def finite(value: Any) -> Any:
    """A value of JSON with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(name: str) -> str:
    return importlib.resources.files("cmd_jax.report").joinpath("templates", name).read_text(encoding="utf-8")
