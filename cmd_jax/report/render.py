"""Renders templates to one HTML file that needs no other file and may load none."""

import math
import re
from typing import Any

from markupsafe import Markup, escape

from cmd_jax import html

PACKAGE = "cmd_jax.report"
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

    environment = html.environment(PACKAGE)
    environment.filters["breaks"] = breaks
    scripts = [get_plotlyjs(), "\n".join(html.resource(PACKAGE, name) for name in SCRIPTS)]
    return environment.get_template(template).render(
        **context | {"data": finite(context["data"])},
        style=Markup(html.resource(PACKAGE, "style.css")),
        scripts=[Markup(script) for script in scripts],
        digests=[html.script_digest(script) for script in scripts],
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
