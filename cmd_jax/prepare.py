"""Dataset binary: `python -m cmd_jax.prepare NAME`; makes a dataset ready on disk and describes it."""

from absl import flags

from cmd_jax import cli
from cmd_jax.config import default
from cmd_jax.errors import ConfigError

USAGE = """Prepares a dataset as ArrayRecord, which training reads, and describes it.

  python -m cmd_jax.prepare cub
  python -m cmd_jax.prepare cars --manual_dir=DIR
  python -m cmd_jax.prepare aircraft --verify
  python -m cmd_jax.prepare folder --folder=PHOTOS

NAME is synthetic_birds, cub, cars, aircraft, aircraft/family, aircraft/manufacturer, nabirds, tfds:NAME for any other
dataset of TFDS, or folder for images of your own. What its source still serves (cub, aircraft) is downloaded into the manual
directory; otherwise the error says which file to get and where to put it. An interrupted download resumes; a
step that was done is skipped; official counts are checked. Beside the data: manifest.sha256, summary.json (counts of every
class) and contact_sheet.png, with --views also views.png. Exit codes: 0 done, 64 bad flag or name, 65 archive missing or
damaged, or data that fails --verify.

folder writes PHOTOS/manifest.sha256, the digests of its images, and nothing else; once it is there, --verify finds every file
that was added, removed or changed since, by a single bit even, and decodes all images. `sha256sum --check` reads it too."""

_DATA_DIR = flags.DEFINE_string("data_dir", default().data.data_dir, "where prepared datasets lie (config.data.data_dir)")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "where archives lie; DATA_DIR/downloads/manual by default")
_FOLDER = flags.DEFINE_string("folder", None, "folder of images (config.data.folder), for the name folder")
_VIEWS = flags.DEFINE_bool("views", False, "also draw the views that training makes of the first image: views.png")
_VERIFY = flags.DEFINE_bool("verify", False, "compare all files with manifest.sha256 and decode every image")


def main(name: str = "") -> None:
    from cmd_jax.datasets import preparation  # imported after the flags are checked: it loads Pillow

    if not name:
        raise ConfigError(f"no dataset; use python -m cmd_jax.prepare NAME with one of {', '.join(preparation.DATASETS)}")
    if (name == "folder") != bool(_FOLDER.value):
        raise ConfigError("--folder=DIR belongs to python -m cmd_jax.prepare folder; pass both or neither")
    draw_views = None
    if _VIEWS.value:
        cli.start_jax()
        from cmd_jax.datasets.views_figure import views_figure as draw_views
    threads = default().data.decode_threads
    if name == "folder":
        lines = preparation.prepare_folder(_FOLDER.value, _VERIFY.value, threads)
    else:
        lines = preparation.prepare_dataset(name, _DATA_DIR.value, _MANUAL_DIR.value, _VERIFY.value, threads, draw_views)
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, USAGE, words=1)
