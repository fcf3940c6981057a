"""Label binary: `python -m cmd_jax.label --checkpoint=... --images=DIR --out=DIR`; photographs to labels, round by round."""

from absl import flags

from cmd_jax import cli
from cmd_jax.errors import ConfigError

USAGE = """Helps an expert to name the photographs of a folder: finds what is wrong with it, groups what is alike, makes a page
to name groups in, and fills in the rest.

  python -m cmd_jax.label --checkpoint=runs/photos --images=PHOTOS --out=labels
  python -m cmd_jax.label --checkpoint=runs/photos --images=PHOTOS --out=labels --labels=labels.csv
  python -m cmd_jax.label --checkpoint=runs/photos --images=PHOTOS --out=labels --labels=labels.csv --link=LABELLED

Open OUT/index.html in a browser, name groups, save labels.csv, pass it with --labels, and open the new page: it has what you
said, and asks for what is uncertain. OUT/look.csv lists doubles (train and test too), outliers, files that cannot be read, and,
of class folders, images whose neighbours are of another class. OUT/suggestions.csv has file, class, calibrated probability and
the nearest labelled image of all others, marked unknown where no named class is believed. OUT/history.csv keeps all that was
ever said. --link makes LABELLED/train/CLASS/* of links to what is labelled or at least --threshold probable, and
LABELLED/rest/* of the others. No photograph is changed, and nothing is sent anywhere.
--checkpoint is what cmd_jax.embed takes. Exit codes: 0 done, 64 bad flag or out of memory, 65 bad data or checkpoint, or disk
full, 130 interrupted, run again to go on. --debug shows the traceback of an error."""

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "directory of a run, or file of weights")
_STEP = flags.DEFINE_integer("step", None, "step of the run's checkpoint; that of the result by default", lower_bound=0)
_MODEL = flags.DEFINE_string("model", None, "name of the model of weights of other projects: an error if they are another")
_IMAGE_PX = flags.DEFINE_integer("image_px", None, "side of the crop for weights of other projects; theirs", lower_bound=1)
_RESIZE_PX = flags.DEFINE_integer("resize_px", None, "what images are resized to before, for the same; theirs", lower_bound=1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "attention heads of weights that do not say it", lower_bound=1)
_FEATURES = flags.DEFINE_string("features", None, "cls, mean, mil, blocks, or several joined by +; the run's eval.features")
_IMAGES = flags.DEFINE_string("images", None, "folder with photographs at any depth")
_OUT = flags.DEFINE_string("out", None, "folder of the page and the tables")
_LABELS = flags.DEFINE_multi_string("labels", [], "labels.csv that the page saved; again for each further one, oldest first")
_LINK = flags.DEFINE_string("link", None, "folder of links to make: train/CLASS/* and rest/*")
_THRESHOLD = flags.DEFINE_float(
    "threshold", 0.9, "probability from which a suggestion counts as a label (--link)", lower_bound=0.0, upper_bound=1.0
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "images that are encoded at a time", lower_bound=1, upper_bound=2**16)


def main() -> None:
    for name, flag in (("checkpoint", _CHECKPOINT), ("images", _IMAGES), ("out", _OUT)):
        if flag.value is None:
            raise ConfigError(f"--{name} is missing; see python -m cmd_jax.label --help")
    cli.start_jax()
    from cmd_jax.inference.commands import Source
    from cmd_jax.labelling.commands import label

    flags_of_others = {"model": _MODEL, "image_px": _IMAGE_PX, "resize_px": _RESIZE_PX, "num_heads": _NUM_HEADS}
    of_others = {name: flag.value for name, flag in flags_of_others.items()}
    network = Source(_CHECKPOINT.value, _STEP.value, _FEATURES.value, of_others)
    asked = (_IMAGES.value, _OUT.value, _LABELS.value, _LINK.value, _THRESHOLD.value, _BATCH.value)
    print("\n".join(label(network, *asked)))


if __name__ == "__main__":
    cli.run(main, USAGE)
