"""Pages that are one HTML file: need no other file, and may load none."""

import base64
import hashlib
import importlib.resources

import jinja2


def environment(package: str) -> jinja2.Environment:
    """The templates of a package's folder `templates/`; every value is escaped, and a missing one is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def resource(package: str, name: str) -> str:
    """The text of a style sheet or script beside the templates."""
    return importlib.resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")


def script_digest(script: str) -> str:
    """The digest of a script, as a page's Content-Security-Policy names those that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
