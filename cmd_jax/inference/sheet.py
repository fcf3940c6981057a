"""A picture of a search: the query beside its neighbours."""

import io
import os

import numpy as np

from cmd_jax import files
from cmd_jax.config import ConfigDict, token_px
from cmd_jax.errors import BadImage, ConfigError
from cmd_jax.inference.preprocess import file_crop
from cmd_jax.inference.search import Found
from cmd_jax.text import printable

COLUMNS = 6


def write_sheet(path: str, config: ConfigDict, folder: str, query: str, found: Found) -> None:
    """Draws evaluation crops with their similarity; of a search among patches the patches are framed.

    Args:
        path: of the .png to write.
        config: resolved, of the network.
        folder: that was embedded.
        query: path of the image.
        found: what `search` returned.

    Raises:
        ConfigError: the path is no .png or lies in the folder, or the file of features names a path outside of it.
    """
    if not path.endswith(".png"):
        raise ConfigError(f"--sheet={path} must end in .png")
    if os.path.commonpath((os.path.realpath(path), os.path.realpath(folder))) == os.path.realpath(folder):
        raise ConfigError(
            f"--sheet={path} lies in --images={folder} and would be read as one of its images; choose another path"
        )
    cells = [("query", query, found.patch)]
    for rank, match in enumerate(found.matches, 1):
        if os.path.isabs(match.path) or ".." in match.path.split(os.sep):
            raise ConfigError(f"{match.path} is not below --images; the file of features is not of this folder")
        cells.append((f"{rank}: {match.similarity:.3f}\n{match.path}", os.path.join(folder, match.path), match.patch))
    import matplotlib  # imported here: most searches draw nothing
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        count = -(-len(cells) // COLUMNS)
        figure = Figure(figsize=(1.8 * COLUMNS, 2.1 * count), layout="constrained")
        axes = figure.subplots(count, COLUMNS, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (title, place, patch) in zip(axes.flat, cells, strict=False):
            axis.imshow(_crop(place, config))
            axis.set_title("\n".join(_short(line) for line in title.splitlines()), fontsize=7, parse_math=False)
            if patch is not None:
                side = token_px(config)
                corner = (patch[1] * side - 0.5, patch[0] * side - 0.5)
                axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="lime", linewidth=1.5))
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, format="png")
    files.make_directory(os.path.dirname(os.path.abspath(path)))
    files.write(path, picture.getvalue())


def _crop(path: str, config: ConfigDict) -> np.ndarray:
    try:
        return file_crop(path, config)
    except BadImage:  # removed since it was embedded
        return np.full((config.eval.crop_px, config.eval.crop_px, 3), 128, np.uint8)


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 28 else f"...{text[-25:]}"
