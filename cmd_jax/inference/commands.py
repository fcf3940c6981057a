"""What `cmd_jax.embed` does with its flags, as functions that return the lines it prints."""

from typing import NamedTuple

from cmd_jax.errors import ConfigError
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.inference.load import Trained, read_trained
from cmd_jax.inference.search import search
from cmd_jax.inference.sheet import write_sheet
from cmd_jax.inference.store import read_meta
from cmd_jax.text import printable


class Source(NamedTuple):
    """Arguments of `read_trained`.

    Attributes:
        path: of a run, or of weights.
        step: of a run's checkpoint; None is its result.
        features: pools of a feature; None as the run was evaluated.
        of_others: what weights of other projects are read with, by name.
    """

    path: str
    step: int | None
    features: str | None
    of_others: dict[str, int | str | None]

    def read(self, features: str | None) -> Trained:
        """The network; errors as of `read_trained`."""
        return read_trained(self.path, self.step, features, **self.of_others)


def write(network: Source, images: str, out: str, batch_size: int, patches: bool) -> list[str]:
    """Embeds a folder; errors as of `read_trained` and `embed_folder`."""
    summary = embed_folder(network.read(network.features), images, out, batch_size, patches)
    lines = [f"wrote {out}: {summary.images:,} images" if summary.computed else f"{out} is whole: {summary.images:,} images"]
    if summary.note:
        lines.append(f"{images}: {summary.note}")
    if summary.bad:
        lines.append(f"{summary.bad:,} images could not be read and are left out; {summary.bad_list} lists them")
    return lines


def find(
    network: Source,
    path: str,
    query: str,
    top: int,
    patches: bool,
    patch: tuple | None,
    sheet: str | None,
    images: str | None,
) -> list[str]:
    """Searches in a file of features; errors as of `read_trained`, `read_meta`, `search` and `write_sheet`."""
    meta = read_meta(path)
    if network.features not in (None, meta.features):
        raise ConfigError(f"--features={network.features}, but {path} holds {meta.features}; leave the flag out")
    trained = network.read(meta.features)
    found = search(trained, path, meta, query, top, patches or patch is not None, _place(patch))
    if sheet is not None:
        write_sheet(sheet, trained.config, images, query, found)
    lines = [] if found.patch is None else [f"patch ({found.patch[0]}, {found.patch[1]}) of {printable(query)}"]
    for rank, match in enumerate(found.matches, 1):
        place = "" if match.patch is None else f"({match.patch[0]}, {match.patch[1]})  "
        lines.append(f"{rank:4}  {match.similarity:7.4f}  {place}{printable(match.path)}")
    return lines + ([f"wrote {sheet}"] if sheet else [])


def _place(patch: tuple | None) -> tuple[int, int] | None:
    if patch is not None and (len(patch) != 2 or not all(type(place) is int and place >= 0 for place in patch)):
        raise ConfigError(f"--patch={','.join(map(str, patch))} is no place; give ROW,COLUMN, for example 3,5")
    return patch
