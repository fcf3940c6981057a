"""Texts made safe: names that come from data for terminals, tables and captions, scripts for the policy of a page."""

import base64
import hashlib


def printable(name: str) -> str:
    r"""Escapes the unprintable characters of a name: a line feed as \n, an escape sequence's start as \x1b.

    Control characters, marks that turn the direction of writing, and bytes of a file's name that are not UTF-8 count.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


def script_digest(script: str) -> str:
    """The digest of a script, as a page's Content-Security-Policy names those that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
