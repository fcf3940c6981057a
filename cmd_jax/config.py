"""The configuration: every key with its default, the rules that fill what is left open, and checks with a remedy.

A file in `configs/` calls `default()` and changes what its experiment needs; `--config.section.key=value` changes single
values. Keys that are None are filled by `resolve` from the method and from the number of training images, so the
written `config.json` holds every value that was used.
"""

import json
import os
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cmd_jax import files
from cmd_jax.errors import ConfigError
from cmd_jax.hardware import ONE_CPU, Hardware, default_batch_size
from cmd_jax.method.chunk_size import default_chunk
from cmd_jax.models.sizes import SWIN_PATCH_PX, SWIN_SIZES, SWIN_STRIDE_PX, VIT_SIZES

# Open values that a run learns with and that `resolve` takes from the hardware. A run that is continued keeps its own, whatever
# hardware it is continued on (training/resume.py).
BY_HARDWARE = ("model.dtype", "model.teacher_dtype", "train.batch_size")

# Open values that follow the files beside `init.weights` (weights/read.py), kept in the same way.
BY_WEIGHTS = ("model.num_heads", "model.layer_norm_eps", "data.normalization")

# Keys of earlier versions, whose config.json files and exports are still read.
RENAMED = {"mesh.fsdp": "mesh.shard_state"}

# Below this many images the field uses fewer prototypes, a colder teacher and a faster EMA (see `resolve`).
SMALL_DATASET = 20_000

MODELS = (*VIT_SIZES, *SWIN_SIZES)

# What a method's name stands for: weights of the terms, pooling of the image level, matching and weights of the regions.
METHODS = {
    "cmd": {
        "intra_image": 0.5,
        "intra_region": 0.5,
        "inter": 1.0,
        "image_pool": "mil",
        "region_matching": "similarity",
        "region_weights": "teacher_mil",
    },
    # of CMD what is measured to help on small data (docs/results.md): the class token joined by the bag of weighed patches, and
    # regions that match by location
    "cmd_bag": {
        "intra_image": 1.0,
        "intra_region": 1.0,
        "inter": 0.0,
        "image_pool": "cls+mil",
        "region_matching": "location",
        "region_weights": "uniform",
    },
    "esvit": {
        "intra_image": 0.5,
        "intra_region": 0.5,
        "inter": 0.0,
        "image_pool": "mean",
        "region_matching": "similarity",
        "region_weights": "uniform",
    },
    # what the authors' released code computes, to reproduce it (cmd_jax/method/released.py says what it is and why masked)
    "released": {
        "intra_image": 0.5,
        "intra_region": 0.5,
        "inter": 0.0,
        "released": 1.0,
        "image_pool": "mean",
        "region_matching": "similarity",
        "region_weights": "uniform",
    },
    "dino": {
        "intra_image": 1.0,
        "intra_region": 0.0,
        "inter": 0.0,
        "image_pool": "cls",
        "region_matching": "similarity",
        "region_weights": "uniform",
    },
}
SOURCES = ("synthetic_birds", "cub", "cars", "aircraft", "aircraft/family", "aircraft/manufacturer", "nabirds", "folder")
TFDS_PREFIX = "tfds:"  # of data.source: any other dataset of TFDS
EVAL_PROTOCOLS = ("knn", "retrieval", "logistic", "fractions", "linear", "pointing", "label_free")
# Of train.best_metric, as in metrics.jsonl: 1 where more is better, -1 where less is.
BEST_METRICS = {"eval_rank1": 1, "eval_map": 1, "feature_std": 1, "loss": -1}


def default() -> ConfigDict:
    """Every key with its default; None means that `resolve` decides."""
    config = ConfigDict()
    config.seed = 0  # the run is a function of (config, data, seed)

    config.method = ConfigDict()
    config.method.name = "cmd"  # cmd (the paper's) | cmd_bag | esvit | dino | released: fills the None below
    # How patches become the image embedding: mil | cls | mean, or several like cls+mean
    config.method.image_pool = placeholder(str)
    # Of L_R, a patch's partner in a teacher's view: similarity (the most similar one) | location (the one that shows the place)
    config.method.region_matching = placeholder(str)
    config.method.region_weights = placeholder(str)  # of patches in L_R: teacher_mil | uniform
    config.method.intra_image_weight = placeholder(float)  # of L_I
    config.method.intra_region_weight = placeholder(float)  # of L_R
    config.method.inter_student_weight = placeholder(float)  # of L_S, the paper's lambda
    config.method.inter_teacher_weight = placeholder(float)  # of L_T, the paper's lambda
    config.method.released_weight = placeholder(float)  # of the authors' own cross-level term, 0 but in "released"
    config.method.student_temp = 0.1
    config.method.teacher_temp = placeholder(float)  # by the size of the data
    config.method.warmup_teacher_temp = placeholder(float)  # None: no warm-up
    config.method.warmup_teacher_temp_epochs = 0
    config.method.teacher_momentum = placeholder(float)  # of the EMA at the start, by the size of the data
    config.method.teacher_momentum_end = 1.0
    # Batch for which the momenta of teacher and centers are given; with B images they are taken to the power B / this.
    config.method.momentum_batch_size = 64
    config.method.centering = "ema"  # of the teacher's logits: ema (DINO) | sinkhorn (solved on each batch, as in DINOv2)
    config.method.center_momentum = 0.9  # of centering "ema"
    config.method.koleo_weight = 0.0  # of DINOv2's regulariser, which keeps the images of a batch apart; DINOv2 takes 0.1
    config.method.mil_temp = 1.0  # of the MIL weights' softmax
    # gated: w . (tanh(V h) * sigmoid(U h)) | attention: w . tanh(V h) | class_token: what a ViT's class token attends to in the
    # last block | mean: all patches weigh the same
    config.method.mil_scorer = "gated"
    config.method.mil_heads = 1  # w of "gated" and "attention": each weighs the patches, their bags are joined
    config.method.mil_hidden_dim = 128  # rows of V and U
    # Of L_S and L_T. bag_to_image: KL(bag || image), the image covers what its patches say | image_to_bag: KL(image || bag)
    config.method.inter_direction = "bag_to_image"
    config.method.mil_warmup_epochs = 0.0  # in which the weights of L_S and L_T rise from 0, a step at a time
    # Of the relative entropy of the student's MIL weights, which joins the loss: above 0 they sharpen, below 0 they spread
    config.method.mil_entropy_weight = 0.0
    # How the objective passes over the prototypes; None: by the memory at hand, and what is fastest on the backend.
    config.method.prototype_chunk = placeholder(int)  # prototypes at a time
    config.method.matched_targets = placeholder(str)  # of L_R: expected | gathered, see cmd_jax/method/chunks.py

    config.model = ConfigDict()
    config.model.name = "vit_small"  # one of MODELS
    config.model.patch_size = placeholder(int)  # pixels; None: 16 of a ViT, 4 of a Swin
    config.model.registers = 0  # of a ViT: learned tokens beside the class token
    config.model.window = 7  # of a Swin: side of a window in tokens
    config.model.num_heads = placeholder(int)  # of a ViT: attention heads; None: the size's, or what init.weights says
    config.model.layer_norm_eps = placeholder(float)  # None: 1e-6 (DINO, EsViT, timm), or what init.weights says
    config.model.drop_path = 0.1  # student only
    # Of activations and products: float32 | bfloat16; losses, norms and EMA stay float32. None: bfloat16 on GPUs and TPUs,
    # float32 on CPUs
    config.model.dtype = placeholder(str)
    config.model.teacher_dtype = placeholder(str)  # of the teacher's forward pass; None: model.dtype
    # How the same numbers are computed; None: what is fastest on the backend at hand (docs/performance.md).
    config.model.packed_views = placeholder(bool)  # views of all sizes share the products of one row of tokens (ViT)
    config.model.scan_blocks = placeholder(bool)  # the blocks as one loop, which compiles faster (ViT)
    config.model.attention = placeholder(str)  # xla | cudnn (fused; an NVIDIA GPU, a ViT in bfloat16)
    # Kept for a block's backward pass: none: all | dots: products with weights, no attention logits | full: its input alone
    config.model.remat = placeholder(str)

    config.init = ConfigDict()  # what a run starts from; student and teacher alike
    config.init.weights = placeholder(str)  # file, directory, workdir of a run or hf:OWNER/NAME; None: random, by the seed
    config.init.network = "teacher"  # teacher | student, of a checkpoint that holds both
    config.init.heads = False  # continue with the checkpoint's projection heads too, not with its backbone alone

    config.head = ConfigDict()
    config.head.prototypes = placeholder(int)  # K, by the size of the data
    config.head.share_prototypes = False  # one W for the image and the region level
    config.head.hidden_dim = 2048
    config.head.bottleneck_dim = 256
    config.head.layers = 3
    config.head.batch_norm = False  # batch statistics in the heads, an option of DINO's
    config.head.norm_last_layer = True  # False learns a gain for every prototype

    config.data = ConfigDict()
    config.data.source = "synthetic_birds"  # one of SOURCES, or tfds:NAME
    config.data.data_dir = os.path.join("~", "tensorflow_datasets")  # prepared TFDS datasets
    config.data.manual_dir = placeholder(str)  # archives that only you can download; default DATA_DIR/downloads/manual
    config.data.folder = placeholder(str)  # of source "folder": train/CLASS/*, test/CLASS/*, or flat and unlabelled
    config.data.eval_source = placeholder(str)  # labelled data to evaluate on, as data.source; None: the training data
    config.data.eval_folder = placeholder(str)  # of data.eval_source "folder"; alone it means that
    config.data.canvas_px = 512  # longer sides are shrunk to this when an image is decoded
    config.data.grayscale = False  # luma alone, in training and evaluation: for data whose classes colour does not tell
    # imagenet | local_contrast (lighting and smooth backgrounds taken out) | MEAN/STD of the channels in 0..1, such as
    # 0.5,0.5,0.5/0.5,0.5,0.5; None: imagenet, or what init.weights says
    config.data.normalization = placeholder(str)
    config.data.decode_threads = 4
    config.data.cache = "auto"  # of decoded pictures: ram | disk (kept for later runs) | none; auto: ram if it fits, else disk
    config.data.cache_dir = placeholder(str)  # of cache "disk", on a disk of this machine; None: DATA_DIR/canvas_cache
    config.data.prefetch_batches = 2  # that wait on the device beside the one of the step

    config.views = ConfigDict()  # the multi-crop recipe of DINO, EsViT and CMD
    config.views.global_px = 224
    config.views.global_scale = (0.4, 1.0)  # share of the image's area
    config.views.local_px = 96
    config.views.local_scale = (0.05, 0.4)
    config.views.local_count = 8
    # Of the local views, those that are placed where the teacher's MIL weights lie in the global views; the others anywhere.
    config.views.key_patch_share = 0.0
    config.views.jitter_prob = 0.8
    config.views.brightness = 0.4
    config.views.contrast = 0.4
    config.views.saturation = 0.2
    config.views.hue = 0.1  # share of the circle
    config.views.grayscale_prob = 0.2
    config.views.blur_sigma = (0.1, 2.0)  # pixels of the view
    config.views.global_blur_prob = (1.0, 0.1)  # of the two global views
    config.views.local_blur_prob = 0.5
    config.views.global_solarize_prob = (0.0, 0.2)
    config.views.dtype = "float32"  # of the interpolation products: float32 | bfloat16 (a pixel is off by a level at most)

    config.optim = ConfigDict()
    config.optim.lr = 5e-4  # for a batch of 256; scaled linearly with the batch
    config.optim.min_lr = 1e-6
    config.optim.warmup_epochs = 10.0
    config.optim.weight_decay = 0.04
    config.optim.weight_decay_end = 0.4
    config.optim.clip_grad = 3.0  # norm of each parameter's gradient; 0 does not clip
    config.optim.freeze_last_layer_epochs = 1.0

    config.mesh = ConfigDict()  # the devices of all processes
    config.mesh.data = -1  # over which batches are split; -1: all that mesh.model leaves
    config.mesh.model = 1  # over which prototypes are split along K; it divides the devices of a process
    # Parameters, teacher and moments are split over mesh.data between steps; a step gathers the parameters whole when it starts
    config.mesh.shard_state = False

    config.train = ConfigDict()
    # Images of a step, of all devices and processes together. None: 64 on CPUs; on GPUs and TPUs 64 for each device, fewer if
    # its memory is small, at most 1,024 in all; fewer if there are few images (`default_batch_size` in cmd_jax/hardware.py)
    config.train.batch_size = placeholder(int)
    config.train.accumulate = 1  # parts of a batch, one after the other; gradients are their mean
    config.train.epochs = 100.0
    config.train.log_every_steps = 10
    config.train.checkpoint_every_epochs = 10.0
    config.train.keep_checkpoints = 3
    config.train.stop_on_collapse = False  # end with exit code 70 where a collapse would otherwise be warned of
    config.train.best_metric = placeholder(str)  # one of BEST_METRICS: the best step by it is kept too; None: the newest alone

    config.eval = ConfigDict()
    # What is measured at the end of training and by cmd_jax.eval, some of EVAL_PROTOCOLS; at the start the same
    # but "linear", which passes over all training images linear_epochs times: minutes on a GPU, hours on a CPU, so it is
    # in no default but that of the presets for GPUs. Without labels "label_free" is all that is left.
    config.eval.protocols = ("knn", "retrieval", "logistic", "fractions", "pointing", "label_free")
    config.eval.every_epochs = 0.0  # 0: only at the start and at the end
    config.eval.protocols_between = ("knn", "retrieval", "pointing", "label_free")  # of every_epochs: those of seconds
    config.eval.batch_size = 64
    config.eval.resize_px = placeholder(int)  # shorter side; None: 8/7 of crop_px, the references' 256 for 224
    config.eval.crop_px = placeholder(int)  # None: views.global_px
    # cls | mean | mil | blocks (of the last blocks, see evaluation.features), or several like cls+mean; None: see `resolve`
    config.eval.features = placeholder(str)
    config.eval.last_blocks = 4  # how many "blocks" and the linear probe read; the references' probe reads 4
    config.eval.knn_k = (10, 20, 100, 200)  # the references'; those above the number of training images are left out
    config.eval.knn_temp = 0.07
    config.eval.fractions = (0.2, 0.5)  # of the labels of every class, for "fractions"
    config.eval.label_free_images = 5000  # training images, at most: RankMe wants more of them than a feature has numbers
    config.eval.linear_epochs = 100
    config.eval.linear_batch_size = 128
    config.eval.linear_lrs = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # tried, for a batch of 256; DINO takes the first
    return config


def resolve(config: ConfigDict, train_images: int, hardware: Hardware = ONE_CPU) -> ConfigDict:
    """Fills every open value.

    Args:
        config: as given.
        train_images: number of training images.
        hardware: that the run is on; of the values that depend on it, those of BY_HARDWARE change what is learned.

    Returns:
        A copy without None among the learning values; frozen against unknown keys.
    """
    config = config.copy_and_resolve_references()
    _write_as_floats(config)
    small = train_images < SMALL_DATASET
    method = METHODS[config.method.name]
    rules: dict[str, Any] = {
        "model.patch_size": patch_px(config),
        "model.layer_norm_eps": 1e-6,
        "data.normalization": "imagenet",
        "method.image_pool": method["image_pool"],
        "method.region_matching": method["region_matching"],
        "method.region_weights": method["region_weights"],
        "method.intra_image_weight": method["intra_image"],
        "method.intra_region_weight": method["intra_region"],
        "method.inter_student_weight": method["inter"],
        "method.inter_teacher_weight": method["inter"],
        "method.released_weight": method.get("released", 0.0),
        # Few images cannot fill 65,536 prototypes: most would never be the teacher's choice, and each costs memory.
        "head.prototypes": 4096 if small else 65_536,
        # With few prototypes and few images the teacher's distribution stays flat for long; a colder one sharpens it.
        "method.teacher_temp": 0.02 if small else 0.04,
        # Short runs: with 0.996 the teacher averages over 250 steps, a large share of all the steps there are.
        "method.teacher_momentum": 0.99 if small else 0.996,
        "eval.crop_px": config.views.global_px,
    }
    for key, value in rules.items():
        _fill(config, key, value)
    _fill(config, "method.warmup_teacher_temp", config.method.teacher_temp)
    _fill(config, "eval.resize_px", round(config.eval.crop_px * 8 / 7))
    # The references read their own pool. For CMD what leave-one-out k-NN found best on the training images of the embedded data
    # (docs/results.md): with the class token's attention mil 77.4, beside cls+mean+mil 77.2, cls+mil 75.0, cls+mean 71.2, mean
    # 65.7, cls 57.8; with the gated scorer cls+mean+mil. A Swin has no class token, and was not measured.
    best = "mil" if config.method.mil_scorer == "class_token" else "mean+mil" if is_swin(config) else "cls+mean+mil"
    _fill(config, "eval.features", best if "mil" in method["image_pool"].split("+") else config.method.image_pool)
    _fill(config, "model.dtype", "float32" if hardware.platform == "cpu" else "bfloat16")
    _fill(config, "model.teacher_dtype", config.model.dtype)
    _fill(config, "train.batch_size", default_batch_size(train_images, hardware, config.train.accumulate))
    is_vit, cpu = not is_swin(config), hardware.platform == "cpu"
    model = config.mesh.model
    images = -(-config.train.batch_size * model // (hardware.devices * config.train.accumulate))  # at a time on a device
    prototypes = -(-config.head.prototypes // model)
    chunk = default_chunk(region_rows(config) * images, prototypes, hardware.platform, hardware.memory_bytes)
    _fill(config, "method.prototype_chunk", chunk)
    # On a CPU, the sign of a problem that is large for its memory; tiles then stay in the cache.
    chunked = cpu and config.method.prototype_chunk < prototypes
    _fill(config, "method.matched_targets", "gathered" if chunked else "expected")
    _fill(config, "model.packed_views", is_vit and hardware.platform != "tpu")
    _fill(config, "model.remat", "dots" if is_vit and chunked else "none")
    _fill(config, "model.scan_blocks", is_vit and (cpu or config.model.remat != "none"))
    _fill(config, "model.attention", "cudnn" if hardware.cuda and is_vit and config.model.dtype == "bfloat16" else "xla")
    config.lock()
    return config


def check_attention(config: ConfigDict, hardware: Hardware) -> None:
    """Checks that the attention of a resolved configuration can be computed on the hardware of its run.

    Raises:
        ConfigError: it cannot.
    """
    if config.model.attention == "cudnn" and not hardware.cuda:
        raise ConfigError(
            f"model.attention is 'cudnn', which needs NVIDIA GPUs, but the devices are {hardware.platform}; pass "
            "--config.model.attention=xla or leave it out"
        )


def for_inference(config: ConfigDict, hardware: Hardware) -> ConfigDict:
    """A run's resolved configuration, changed to what computes the same on the hardware at hand: XLA's attention where that of
    cuDNN is missing."""
    config = config.copy_and_resolve_references()
    if config.model.attention == "cudnn" and not hardware.cuda:
        config.model.attention = "xla"
    return config


def is_swin(config: ConfigDict) -> bool:
    """Whether the configured backbone is a Swin, otherwise it is a ViT."""
    return config.model.name in SWIN_SIZES


def start_name(config: ConfigDict) -> str:
    """What a run starts from, for people."""
    return f"weights of {config.init.weights}" if config.init.weights else "random weights"


def patch_px(config: ConfigDict) -> int:
    """Side in pixels of the squares that the backbone embeds, resolved or not."""
    return config.model.patch_size or (SWIN_PATCH_PX if is_swin(config) else 16)


def token_px(config: ConfigDict) -> int:
    """Side in pixels of a patch token: the stride of the last stage of a Swin, the patch of a ViT."""
    return SWIN_STRIDE_PX if is_swin(config) else patch_px(config)


def region_rows(config: ConfigDict) -> int:
    """Patches of all views of one image, student's and teacher's: the rows of the objective's logits."""
    patches = lambda side: (-(-side // token_px(config))) ** 2
    return 4 * patches(config.views.global_px) + config.views.local_count * patches(config.views.local_px)


def _write_as_floats(config: ConfigDict) -> None:
    """Numbers of a tuple as floats where its default has floats; of a single number ConfigDict takes care."""
    for section, part in default().items():
        for name, usual in part.items() if isinstance(part, ConfigDict) else ():
            if isinstance(usual, tuple) and isinstance(usual[0], float):
                config[section][name] = tuple(map(float, config[section][name]))


def _fill(config: ConfigDict, key: str, value: Any) -> None:
    section, name = key.split(".")
    if config[section][name] is None:
        config[section][name] = value


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """The configuration with local paths of the section `data` that mean the same from any directory.

    A leading ~ is expanded in the folders of images. It stays in the other keys: `data_dir` is everyone's own by default.
    """
    config = config.copy_and_resolve_references()
    for key in ("folder", "eval_folder", "data_dir", "manual_dir", "cache_dir"):
        path = config.data[key]
        if path and not files.is_remote(path):
            path = os.path.expanduser(path) if key.endswith("folder") else path
            config.data[key] = path if path.startswith("~") else os.path.abspath(path)
    return config


def save(config: ConfigDict, path: str) -> None:
    """Writes the resolved configuration as JSON, whole or not at all."""
    files.write(path, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def load(path: str) -> ConfigDict:
    """Reads a configuration that `save` wrote; keys that it lacks get their default.

    Raises:
        ConfigError: the file is no configuration.
    """
    return from_dict(read_json(path))


def from_dict(stored: dict[str, Any]) -> ConfigDict:
    """A configuration from its values by section; keys that it lacks get their default, unknown ones are kept.

    Raises:
        ValueError, TypeError or another: a section is none.
    """
    config = default()
    with config.unlocked(), config.ignore_type():
        config.update(_renamed(stored))
    config.lock()
    return config


def read_json(path: str) -> dict[str, Any]:
    """What `save` wrote, by section.

    Raises:
        ConfigError: the file is no configuration.
    """
    try:
        stored = json.loads(files.read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); restore it, or give another --workdir") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path} is no configuration but a {type(stored).__name__}; restore it, or give another --workdir")
    return _renamed(stored)


def _renamed(stored: dict[str, Any]) -> dict[str, Any]:
    """The same values with the keys of today."""
    stored = dict(stored)
    for old, new in RENAMED.items():
        (section, name), (_, now) = old.split("."), new.split(".")
        values = stored.get(section)
        if isinstance(values, dict) and name in values:
            stored[section] = {now if key == name else key: value for key, value in values.items()}
    return stored
