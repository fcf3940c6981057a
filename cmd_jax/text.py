"""Names that come from data, made safe for terminals, tables and captions."""


def printable(name: str) -> str:
    r"""Escapes the unprintable characters of a name: a line feed as \n, an escape sequence's start as \x1b.

    Control characters, marks that turn the direction of writing, and bytes of a file's name that are not UTF-8 count.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)
