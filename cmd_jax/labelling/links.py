"""A folder to train on, made of links: `train/CLASS/*` of what is labelled or almost sure, `rest/*` of all else."""

import os
import shutil
from collections.abc import Iterable

from cmd_jax import files
from cmd_jax.errors import ConfigError

MARK = ".cmd_jax_links"  # in a folder that may be made again


def make_links(folder: str, out: str, classes: Iterable[tuple[str, str]], rest: Iterable[str]) -> None:
    """Makes a folder of links, or makes it again: no old link stays, no photograph is touched.

    Args:
        folder: of the photographs.
        out: the folder of links: not there, empty, or made by this function.
        classes: (path relative to `folder`, class).
        rest: further paths.

    Raises:
        ConfigError: `out` holds something else, or lies in `folder`, whose images its links would become.
    """
    check_links(folder, out)
    root, partial = os.path.realpath(folder), f"{out.rstrip(os.sep)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    places = [(path, os.path.join("train", class_folder(name))) for path, name in classes]
    for path, place in places + [(path, "rest") for path in rest]:
        os.makedirs(os.path.join(partial, place), exist_ok=True)
        os.symlink(os.path.join(root, path), os.path.join(partial, place, _flat(path)))
    os.makedirs(partial, exist_ok=True)
    files.write(os.path.join(partial, MARK), "made by cmd_jax.label; made again by its next call\n")
    if os.path.exists(out):
        shutil.rmtree(out)
    os.rename(partial, out)


def check_links(folder: str, out: str) -> None:
    """Raises ConfigError where `make_links` would."""
    root, place = os.path.realpath(folder), os.path.realpath(out)
    if os.path.commonpath((root, place)) == root:
        raise ConfigError(f"--link={out} lies in --images={folder}, whose images its links would become; choose another folder")
    if os.path.exists(out) and not os.path.isdir(out):
        raise ConfigError(f"--link={out} is a file; name a folder")
    if os.path.isdir(out) and os.listdir(out) and not os.path.exists(os.path.join(out, MARK)):
        raise ConfigError(f"--link={out} holds files that cmd_jax.label has not made; choose another folder")


def class_folder(name: str) -> str:
    """A class as the name of a folder: what no file system or path allows becomes %XX; different classes stay different."""
    keep = lambda letter, first: letter.isprintable() and letter not in '%/\\:*?"<>|' and not (first and letter == ".")
    spelled = (
        letter if keep(letter, not place) else "".join(f"%{byte:02X}" for byte in letter.encode(errors="replace"))
        for place, letter in enumerate(name)
    )
    return "".join(spelled)


def _flat(path: str) -> str:
    """A relative path as the name of a file; different paths stay different."""
    return path.replace("%", "%25").replace(os.sep, "%2F")
