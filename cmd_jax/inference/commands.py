"""What `cmd_jax.embed` does with its flags, as functions that return the lines it prints."""

from cmd_jax.errors import ConfigError
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.inference.load import read_trained
from cmd_jax.inference.search import search
from cmd_jax.inference.sheet import write_sheet
from cmd_jax.inference.store import read_meta
from cmd_jax.text import printable

LoadArguments = tuple[str, int | None, str | None, str | None, int | None]  # arguments of `read_trained`


def write(network: LoadArguments, images: str, out: str, batch_size: int, patches: bool) -> list[str]:
    """Embeds a folder; errors as of `read_trained` and `embed_folder`."""
    summary = embed_folder(read_trained(*network), images, out, batch_size, patches)
    lines = [f"wrote {out}: {summary.images:,} images" if summary.computed else f"{out} is whole: {summary.images:,} images"]
    if summary.note:
        lines.append(f"{images}: {summary.note}")
    if summary.bad:
        lines.append(f"{summary.bad:,} images could not be read and are left out; {summary.bad_list} lists them")
    return lines


def find(
    network: LoadArguments,
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
    source, step, features, model, image_px = network
    if features is not None and features != meta.features:
        raise ConfigError(f"--features={features}, but {path} holds {meta.features}; leave the flag out")
    trained = read_trained(source, step, meta.features, model, image_px)
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
