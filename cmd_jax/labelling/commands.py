"""What `cmd_jax.label` does with its flags, as a function that returns the lines it prints."""

import csv
import io
import os

import numpy as np

from cmd_jax import files
from cmd_jax.errors import ConfigError
from cmd_jax.inference.commands import Source
from cmd_jax.inference.embed_folder import embed_folder
from cmd_jax.labelling import labels as labels_lib
from cmd_jax.labelling import links, suggest
from cmd_jax.labelling.groups import group_images, grow
from cmd_jax.labelling.labels import NAMED, STRUCK, Conflict, Said
from cmd_jax.labelling.look import look_again
from cmd_jax.labelling.look import to_csv as findings_csv
from cmd_jax.labelling.page import write_page
from cmd_jax.labelling.photos import Photos, read_photos
from cmd_jax.labelling.thumbs import read_kept, write_kept
from cmd_jax.text import printable

SHOWN = 5  # conflicts that are printed
SURE = 0.9  # probability whose suggestions are counted


def label(
    network: Source, images: str, out: str, labels: list[str], link: str | None, threshold: float, batch_size: int
) -> list[str]:
    """Looks at a folder, groups it, writes the page for the expert, and fills in what the labels so far tell.

    Args:
        network: that embeds.
        images: folder of the photographs.
        out: folder of all that is written; the features, thumbnails and findings in it are used again.
        labels: paths of what the page saved, the oldest first.
        link: folder of links to make, see `links.make_links`; None: none.
        threshold: probability from which a suggestion is linked as if it was a label.
        batch_size: images that are encoded at a time.

    Raises:
        ConfigError: a path that cannot be, or links without any label.
        DatasetError: a table of labels is damaged.
    """
    place = lambda name: os.path.join(out, name)
    if files.is_remote(out):
        raise ConfigError(f"--out={out} must be a local folder; copy it when it is written")
    files.make_directory(out)
    history, conflicts = labels_lib.read_history(place("history.csv")), []
    for path in labels:
        history, differing = labels_lib.add(history, labels_lib.read_labels(path))
        conflicts += differing
    said = labels_lib.current(history)
    if link is not None:
        links.check_links(images, link)
        if not any(statement.state == NAMED for statement in said.values()):
            raise ConfigError(f"--link={link} needs labels, and none are known; pass --labels=labels.csv")
    if labels:
        labels_lib.write_history(place("history.csv"), history)
    lines = [f"{len(said):,} images have been spoken of, {place('history.csv')} keeps all that was said"] if said else []
    lines += _report(conflicts, labels_lib.all_conflicts(history), place("conflicts.csv"))

    trained = network.read(network.features)
    summary = embed_folder(trained, images, place("features.parquet"), batch_size, patch_weights=True)
    kept, unusable = read_kept(place("thumbs.parquet"))
    lines += [unusable] if unusable else []
    photos = read_photos(images, place("features.parquet"), trained.config, _bad(summary.bad_list), kept)
    thumbs = dict(zip(photos.paths, photos.thumbs, strict=True))
    if thumbs.keys() != kept.keys() or any(thumbs[path] is not kept[path] for path in thumbs):
        write_kept(place("thumbs.parquet"), thumbs)
    looked = look_again(photos, place("look.json"))
    files.write(place("look.csv"), findings_csv(looked.findings))
    lines += [*looked.lines, f"wrote {place('look.csv')}"]

    states = [said.get(path, Said()) for path in photos.paths]
    missing = len(said.keys() - set(photos.paths))
    if missing:
        lines.append(f"{missing:,} images that labels name are not in {images}, or cannot be read")
    names = np.array([state.name for state in states], object)
    struck = np.array([state.state == STRUCK for state in states], bool)
    ruled_out = {row: state.ruled_out for row, state in enumerate(states) if state.ruled_out}
    found = suggest.suggest(photos.features, names, ruled_out) if (names != "").any() else None
    if found is not None:
        lines += _suggest(photos, names, struck, found, place("suggestions.csv"))
    done = np.nonzero((names != "") | struck)[0]
    tree = grow(photos.features)
    groups = group_images(photos.features, tree, done, found)
    said_twice, page = labels_lib.all_conflicts(history), place("index.html")
    write_page(page, photos, tree, groups, names, struck, ruled_out, found, looked.findings, said_twice)
    left = len(photos.paths) - len(done)
    lines.append(f"wrote {page}: {len(groups):,} groups of {left:,} images; open it in a browser")
    if link is not None:
        lines.append(_link(photos, names, struck, found, link, threshold))
    return lines


def _report(new: list[Conflict], every: list[Conflict], path: str) -> list[str]:
    if every:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([("file", "before", "after"), *every])
        files.write(path, out.getvalue())
    if not new:
        return []
    shown = [f"  {printable(file)}: {printable(before)}, then {printable(after)}" for file, before, after in new[:SHOWN]]
    return [f"{len(new):,} images are called otherwise than before; what was said last counts, {path} lists all:", *shown]


def _bad(path: str | None) -> list[tuple[str, str]]:
    """(path, reason) of the images that could not be embedded."""
    lines = files.read(path).splitlines() if path else []
    return [tuple(line.split("\t", 1)) for line in lines]


def _suggest(photos: Photos, names: np.ndarray, struck: np.ndarray, found: suggest.Suggestions, path: str) -> list[str]:
    labelled = names != ""
    rows = np.nonzero(~labelled & ~struck)[0]
    files.write(path, suggest.to_csv(found, photos.paths, rows))
    unknown = found.unknown[rows]
    sure = np.sum(found.probability[rows][~unknown] >= SURE)
    lines = [
        f"{labelled.sum():,} images of {len(set(names[labelled])):,} classes are labelled, {struck.sum():,} are struck",
        f"wrote {path}: {len(rows):,} suggestions, {unknown.sum():,} of them unknown, {sure:,} with probability {SURE} or more",
    ]
    agreed = suggest.agreement(found, labelled, np.where(struck, "", photos.classes))
    if agreed is not None:
        lines.append(
            f"beside the class folders of {agreed.images:,} images without a label: {100 * agreed.accuracy:.1f} % right, "
            f"expected calibration error {agreed.calibration_error:.3f} ({suggest.BINS} bins)"
        )
    return lines


def _link(
    photos: Photos, names: np.ndarray, struck: np.ndarray, found: suggest.Suggestions, link: str, threshold: float
) -> str:
    sure = (names != "") | ((found.probability >= threshold) & ~found.unknown)
    classes = [(photos.paths[row], str(found.classes[row])) for row in np.nonzero(sure & ~struck)[0]]
    rest = [photos.paths[row] for row in np.nonzero(~sure & ~struck)[0]]
    links.make_links(photos.folder, link, classes, rest)
    return f"wrote {link}: {len(classes):,} links below train/, {len(rest):,} in rest/"
