"""Embed binary: `python -m cmd_jax.embed --checkpoint=... --images=DIR --out=features.parquet`; also searches in the result."""

from absl import flags

from cmd_jax import cli
from cmd_jax.errors import ConfigError

USAGE = """Writes the features of all images below a folder to one file, and searches in it.

  python -m cmd_jax.embed --checkpoint=runs/photos --images=PHOTOS --out=features.parquet
  python -m cmd_jax.embed --checkpoint=model.safetensors --images=PHOTOS --out=features.npz --patches
  python -m cmd_jax.embed --checkpoint=runs/photos --out=features.parquet --query=bird.jpg --top=5

--checkpoint is the directory of a run, a file of cmd_jax.convert export --format=safetensors, or a backbone of another project:
a file of DINO, DINOv2, DINOv3, MAE, MoCo v3 or EsViT, a directory of transformers, timm or OpenCLIP, or hf:OWNER/NAME. The file
holds path and features of each image, with --patches also its patch tokens
(float16) and MIL weights. An interrupted run goes on when it is started again. Images that cannot be read are left out, listed
in OUT.bad.txt and counted; more than half of them is an error, and no file is written.
--query prints the nearest images (cosine), with --patches those with the patch nearest to the query's most weighted patch;
--sheet=PICTURE.png --images=PHOTOS draws them.
Exit codes: 0 done (bad images among them or not), 64 bad flag or out of memory, 65 bad data or checkpoint, or disk full,
130 interrupted, run again to go on. --debug shows the traceback of an error."""

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "directory of a run, or file of weights")
_STEP = flags.DEFINE_integer("step", None, "step of the run's checkpoint; that of the result by default", lower_bound=0)
_MODEL = flags.DEFINE_string("model", None, "name of the model of weights of other projects: an error if they are another")
_IMAGE_PX = flags.DEFINE_integer("image_px", None, "side of the crop for weights of other projects; theirs", lower_bound=1)
_RESIZE_PX = flags.DEFINE_integer("resize_px", None, "what images are resized to before, for the same; theirs", lower_bound=1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "attention heads of weights that do not say it", lower_bound=1)
_FEATURES = flags.DEFINE_string("features", None, "cls, mean, mil, blocks, or several joined by +; the run's eval.features")
_IMAGES = flags.DEFINE_string("images", None, "folder with images at any depth")
_OUT = flags.DEFINE_string("out", None, "file of features, .parquet or .npz: written, or searched with --query")
_BATCH = flags.DEFINE_integer("batch_size", 64, "images that are encoded at a time", lower_bound=1, upper_bound=2**16)
_PATCHES = flags.DEFINE_bool("patches", False, "patch level: write patch tokens and MIL weights; search for a patch")
_QUERY = flags.DEFINE_string("query", None, "image to search for in --out")
_TOP = flags.DEFINE_integer("top", 10, "matches to print (--query)", lower_bound=1, upper_bound=10_000)
_PATCH = flags.DEFINE(
    cli.TupleParser(), "patch", None, "ROW,COLUMN of the query's patch, from 0; its most weighted one (--query --patches)"
)
_SHEET = flags.DEFINE_string("sheet", None, "picture.png of the matches to draw; needs --images (--query)")


def main() -> None:
    for name, flag in (("checkpoint", _CHECKPOINT), ("out", _OUT)):
        if flag.value is None:
            raise ConfigError(f"--{name} is missing; see python -m cmd_jax.embed --help")
    if _QUERY.value is None and _IMAGES.value is None:
        raise ConfigError("--images=DIR is missing (or --query=IMAGE, to search in --out)")
    if _SHEET.value is not None and (_IMAGES.value is None or _QUERY.value is None):
        raise ConfigError("--sheet draws what --query finds below --images; pass both")
    cli.start_jax()
    from cmd_jax.inference import commands

    flags_of_others = {"model": _MODEL, "image_px": _IMAGE_PX, "resize_px": _RESIZE_PX, "num_heads": _NUM_HEADS}
    of_others = {name: flag.value for name, flag in flags_of_others.items()}
    network = commands.Source(_CHECKPOINT.value, _STEP.value, _FEATURES.value, of_others)
    if _QUERY.value is None:
        print("\n".join(commands.write(network, _IMAGES.value, _OUT.value, _BATCH.value, _PATCHES.value)))
    else:
        asked = (_QUERY.value, _TOP.value, _PATCHES.value, _PATCH.value)
        print("\n".join(commands.find(network, _OUT.value, *asked, _SHEET.value, _IMAGES.value)))


if __name__ == "__main__":
    cli.run(main, USAGE)
