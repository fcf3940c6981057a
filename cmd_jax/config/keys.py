"""Every key of the configuration with its default, the rule for its value and its meaning; docs/configs.md comes from here."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cmd_jax import normalization
from cmd_jax.models.sizes import (
    ACTIVATIONS,
    POSITIONS,
    QKV_BIASES,
    RESAMPLE_RULES,
    SWIN_PATCH_PX,
    SWIN_SIZES,
    SWIN_STRIDE_PX,
    VIT,
    VIT_SIZES,
)

MODELS = (*VIT_SIZES, VIT, *SWIN_SIZES)
SOURCES = ("synthetic_birds", "cub", "cars", "aircraft", "aircraft/family", "aircraft/manufacturer", "nabirds", "folder")
TFDS_PREFIX = "tfds:"  # of data.source: any other dataset of TFDS
EVAL_PROTOCOLS = (
    "knn",
    "retrieval",
    "logistic",
    "fractions",
    "linear",
    "clustering",
    "few_shot",
    "disjoint_retrieval",
    "labelling_effort",
    "pointing",
    "label_free",
)
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")


class BestMetric(NamedTuple):
    """A number by which the best step of a run can be chosen.

    Attributes:
        sign: 1 where more is better, -1 where less is.
        protocol: of the evaluation that measures it; None of a number that every step logs.
        labels: whether it needs them.
    """

    sign: int
    protocol: str | None = None
    labels: bool = False


# Of train.best_metric, by their names in metrics.jsonl.
BEST_METRICS = {
    "eval_train_rank1": BestMetric(1, "retrieval", labels=True),
    "eval_view_rank1": BestMetric(1, "label_free"),
    "eval_rank1": BestMetric(1, "retrieval", labels=True),
    "eval_map": BestMetric(1, "retrieval", labels=True),
    "feature_std": BestMetric(1),
    "loss": BestMetric(-1),
}

# What a method's name stands for: weights of the terms, pooling of the image level, matching and weights of the regions, and
# whether both levels share their heads.
_BASELINE = {
    "inter": 0.0,
    "relation": 0.0,
    "released": 0.0,
    "intra_masked": 0.0,
    "region_matching": "similarity",
    "region_weights": "uniform",
    "share": False,
}
METHODS = {
    "cmd": _BASELINE
    | {"intra_image": 0.5, "intra_region": 0.5, "inter": 1.0, "image_pool": "mil", "region_weights": "teacher_mil"},
    # of CMD what is measured to help on small data (docs/results.md): the class token joined by the bag of weighed patches, and
    # regions that match by location
    "cmd_bag": _BASELINE | {"intra_image": 1.0, "intra_region": 1.0, "image_pool": "cls+mil", "region_matching": "location"},
    # relations among images at the image level, where L_I beside them added nothing; regions as in cmd_bag
    "cmd_relation": _BASELINE
    | {"intra_image": 0.0, "intra_region": 1.0, "relation": 1.0, "image_pool": "cls+mil", "region_matching": "location"},
    "esvit": _BASELINE | {"intra_image": 0.5, "intra_region": 0.5, "image_pool": "mean"},
    # what the authors' released code computes, to reproduce it (cmd_jax/method/released.py)
    "released": _BASELINE | {"intra_image": 0.5, "intra_region": 0.5, "released": 1.0, "image_pool": "mean"},
    "dino": _BASELINE | {"intra_image": 1.0, "intra_region": 0.0, "image_pool": "cls"},
    "ibot": _BASELINE | {"intra_image": 1.0, "intra_region": 0.0, "intra_masked": 1.0, "image_pool": "cls", "share": True},
}


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        kind: type of the values.
        allowed: the values in words, to follow "it must be".
        accepts: whether a value is one of them.
    """

    kind: type
    allowed: str
    accepts: Callable[[Any], bool]


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
        default: None leaves the value open; `resolve` fills it, or documents what None means.
        rule: for every other value.
        meaning: one line.
    """

    default: Any
    rule: Rule
    meaning: str


def whole(low: int, high: int, also: int | None = None) -> Rule:
    """A whole number within bounds, or `also`; upper bounds are beyond any use and stop a slip before it takes all memory."""
    accepts = lambda value: _is(value, int) and (low <= value <= high or value == also)
    return Rule(int, f"{'' if also is None else f'{also}, or '}a whole number of at least {low} and at most {high:,}", accepts)


def number(low: float, high: float, above: bool = False) -> Rule:
    """A finite number within bounds; with `above`, `low` itself is out."""
    bounds = f"{'above' if above else 'of at least'} {low:g} and at most {high:g}"
    accepts = lambda value: _is(value, int | float) and low <= value <= high and not (above and value == low)
    return Rule(float, f"a number {bounds}", accepts)


def choice(*words: str) -> Rule:
    """One of several words."""
    return Rule(str, f"one of {', '.join(words)}", lambda value: value in words)


def joined(*words: str) -> Rule:
    """One or several words, joined by "+", each once."""

    def accepts(value: Any) -> bool:
        return isinstance(value, str) and _each_once(value.split("+"), words)

    return Rule(str, f"one of {', '.join(words)}, or several like {'+'.join(words[-2:])}, each once", accepts)


def words_of(words: tuple[str, ...]) -> Rule:
    """A tuple of one or more words, each once."""
    accepts = lambda value: isinstance(value, tuple | list) and len(value) > 0 and _each_once(value, words)
    return Rule(tuple, f"one or more of {', '.join(words)}, each once", accepts)


def several(of: Rule, length: int | None = None) -> Rule:
    """A tuple of numbers, of a given length or of at least one."""
    count = f"{length} numbers" if length else "one or more numbers"

    def accepts(value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) == (length or max(1, len(value))) and all(map(of.accepts, value))

    return Rule(tuple, f"{count}, each {of.allowed}", accepts)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _each_once(given: tuple | list, words: tuple[str, ...]) -> bool:
    return all(isinstance(word, str) and word in words for word in given) and len(set(given)) == len(given)


def _is_normalization(value: Any) -> bool:
    try:
        normalization.statistics_of(value)
    except (ValueError, AttributeError):
        return False
    return True


FLAG = Rule(bool, "True or False", lambda value: isinstance(value, bool))
TEXT = Rule(str, "text without a null character", lambda value: isinstance(value, str) and "\0" not in value)
SOME_TEXT = Rule(str, "text that is not empty, without a null character", lambda value: bool(value) and TEXT.accepts(value))
NORMALIZATION = Rule(
    str,
    "imagenet, local_contrast, or MEAN/STD of the three channels in 0..1, such as 0.5,0.5,0.5/0.5,0.5,0.5",
    _is_normalization,
)
DTYPE = choice("float32", "bfloat16")
SHARE = number(0, 1)
SOME_SHARE = number(0, 1, above=True)
WEIGHT = number(0, 1e6)
TEMPERATURE = number(0, 100, above=True)
EPOCHS = number(0, 1e6)
SOME_EPOCHS = number(0, 1e6, above=True)
SIDE_PX = whole(1, 16_384)
WIDTH = whole(1, 2**16)
IMAGES = whole(1, 2**20)  # of a batch

# Of open values that depend on init.weights.
RECIPE = "None: as from scratch, or with init.weights as for continuing (config/recipe.py)"

SECTIONS = {
    "method": "The objective and its teacher.",
    "model": "The backbone.",
    "init": "What a run starts from; student and teacher alike.",
    "head": "The projection heads and their prototypes.",
    "data": "The images.",
    "views": "The multi-crop recipe of DINO, EsViT and CMD.",
    "optim": "AdamW and its schedules.",
    "mesh": "The devices of all processes.",
    "train": "The training loop.",
    "eval": "The evaluation.",
}

KEYS: dict[str, Key] = {
    # JAX takes the lower 32 bits: two seeds beyond would be the same run
    "seed": Key(0, whole(0, 2**32 - 1), "the run is a function of (config, data, seed)"),
    "method.name": Key("cmd", choice(*METHODS), "fills the open values of this section; cmd is the paper's"),
    "method.image_pool": Key(None, joined("mil", "cls", "mean"), "how patches become the image embedding; None: by the method"),
    "method.region_matching": Key(
        None,
        choice("similarity", "location"),
        "partner of a patch in a teacher's view, for L_R: the most similar one, or the one at its place; None: by the method",
    ),
    "method.region_weights": Key(None, choice("teacher_mil", "uniform"), "weights of patches in L_R; None: by the method"),
    "method.intra_image_weight": Key(None, WEIGHT, "of L_I; None: by the method"),
    "method.intra_region_weight": Key(None, WEIGHT, "of L_R; None: by the method"),
    "method.inter_student_weight": Key(None, WEIGHT, "of L_S, the paper's lambda; None: by the method"),
    "method.inter_teacher_weight": Key(None, WEIGHT, "of L_T, the paper's lambda; None: by the method"),
    "method.relation_weight": Key(None, WEIGHT, "of L_N, which training images a view resembles; None: by the method"),
    "method.relation_teacher_temp": Key(0.05, TEMPERATURE, "of the teacher's softmax over the other training images, for L_N"),
    "method.relation_student_temp": Key(0.05, TEMPERATURE, "of the student's softmax over all training images, for L_N"),
    "method.released_weight": Key(None, WEIGHT, "of the cross-level term of the authors' code; None: 0 but in method released"),
    "method.intra_masked_weight": Key(
        None, WEIGHT, "of L_M, iBOT's term of patches that the student does not see; None: 0 but in method ibot"
    ),
    "method.mask_prob": Key(0.5, SHARE, "of a global view of the student in which patches are masked, for L_M"),
    "method.mask_share": Key((0.1, 0.5), several(SHARE, 2), "least and greatest share of a masked view's patches"),
    "method.student_temp": Key(0.1, TEMPERATURE, "temperature of the student's softmax"),
    "method.teacher_temp": Key(None, TEMPERATURE, "temperature of the teacher's softmax; None: 0.02 for few images, else 0.04"),
    "method.warmup_teacher_temp": Key(None, TEMPERATURE, "teacher temperature at the start; None: teacher_temp"),
    "method.warmup_teacher_temp_epochs": Key(0, whole(0, 10**6), "epochs from warmup_teacher_temp to teacher_temp"),
    "method.teacher_momentum": Key(
        None, SHARE, "of the EMA at the start; None: 0.99 for few images, else 0.996; with init.weights see config/recipe.py"
    ),
    "method.teacher_momentum_end": Key(1.0, SHARE, "of the EMA at the end"),
    "method.momentum_batch_size": Key(
        64, IMAGES, "batch for which the momenta of teacher and centers are given; with B images they get the power B / this"
    ),
    "method.centering": Key(
        "ema", choice("ema", "sinkhorn"), "of the teacher's logits: moving centers (DINO), or solved on each batch (DINOv2)"
    ),
    "method.center_momentum": Key(0.9, SHARE, "of centering ema"),
    "method.koleo_weight": Key(0.0, WEIGHT, "of DINOv2's KoLeo regularizer, which spreads the images of a batch; DINOv2: 0.1"),
    "method.mil_temp": Key(1.0, TEMPERATURE, "of the softmax of the MIL weights"),
    "method.mil_scorer": Key(
        "gated",
        choice("gated", "attention", "class_token", "mean"),
        "MIL logits: w . (tanh(V h) * sigmoid(U h)) | w . tanh(V h) | attention of a ViT's class token, last block | equal",
    ),
    "method.mil_heads": Key(1, whole(1, 64), "vectors w of the gated and attention scorers; each has a bag, which are joined"),
    "method.mil_hidden_dim": Key(128, WIDTH, "rows of V and U"),
    "method.prototype_chunk": Key(
        None, whole(1, 2**22), "prototypes that the objective computes at a time; None: by memory and backend"
    ),
    "method.matched_targets": Key(
        None, choice("expected", "gathered"), "how L_R computes its targets (cmd_jax/method/chunks.py); None: by the backend"
    ),
    # All but the last few of this section are None in a new configuration: the file of init.weights says what it is.
    "model.name": Key(
        None,
        choice(*MODELS),
        "architecture and size; vit: of its own width, depth and heads; None: init.weights's, or vit_small",
    ),
    "model.width": Key(None, WIDTH, "of model.name vit: channels of a token"),
    "model.depth": Key(None, whole(1, 1024), "of model.name vit: blocks"),
    "model.num_heads": Key(None, whole(1, 1024), "of a ViT: attention heads; None: those of init.weights or of the size"),
    "model.mlp_dim": Key(None, WIDTH, "of a ViT: hidden units of an MLP; None: those of init.weights, or 4 x the width"),
    "model.patch_size": Key(None, whole(1, 512), "pixels; None: that of init.weights, or 16 of a ViT, 4 of a Swin"),
    "model.table_px": Key(
        None,
        SIDE_PX,
        "image side for which positions (of a Swin: windows) are learned; None: that of init.weights, or views.global_px",
    ),
    "model.window": Key(None, whole(1, 512), "of a Swin: side of a window in tokens; None: that of init.weights, or 7"),
    "model.class_token": Key(None, FLAG, "of a ViT; None: as in init.weights, or True"),
    "model.registers": Key(
        None, whole(0, 1024), "of a ViT: learned tokens beside the class token; None: as in init.weights, or 0"
    ),
    "model.positions": Key(
        None,
        choice(*POSITIONS),
        "of a ViT, what has learned positions: class token and patches, all tokens, patches; or none, and attention rotates by "
        "position (DINOv3); None: as in init.weights, or class_patches",
    ),
    "model.resample_rule": Key(
        None,
        choice(*RESAMPLE_RULES),
        "of the table of positions for other image sides (models/vit.py); None: that of init.weights, or dino",
    ),
    "model.rope_base": Key(None, number(1, 1e9, above=True), "of positions rotary; None: that of init.weights, or 100"),
    "model.layer_scale": Key(
        None, FLAG, "of a ViT: a learned factor for each channel of a residual branch; None: as in init.weights, or False"
    ),
    "model.gated_mlp": Key(
        None, FLAG, "of a ViT: the activation of one linear layer times another (SwiGLU); None: as in init.weights, or False"
    ),
    "model.activation": Key(None, choice(*ACTIVATIONS), "of a ViT's MLPs; None: as in init.weights, or gelu (erf)"),
    "model.pre_norm": Key(
        None,
        FLAG,
        "of a ViT: a norm before the blocks, and no bias in the patch embedding (CLIP); None: as in init.weights, or False",
    ),
    "model.qkv_bias": Key(
        None,
        choice(*QKV_BIASES),
        "of a ViT: of query, key and value, of query and value alone (DINOv3), or none; None: as in init.weights, or qkv",
    ),
    "model.layer_norm_eps": Key(None, number(0, 1e-2), "None: that of init.weights, or 1e-6 (DINO, EsViT, timm)"),
    "model.drop_path": Key(None, number(0, 0.99), f"stochastic depth of the student; {RECIPE}"),
    "model.dtype": Key(
        None,
        DTYPE,
        "of activations and products (losses, norms and EMA: float32); None: bfloat16 on GPUs and TPUs, float32 on CPUs",
    ),
    "model.teacher_dtype": Key(None, DTYPE, "of the teacher's forward pass; None: model.dtype"),
    "model.product_dtype": Key(
        None,
        DTYPE,
        "of the operands of the blocks' linear layers; their results are model.dtype. bfloat16 beside float32 is "
        "faster on CPUs with AVX512_BF16; None: model.dtype",
    ),
    "model.packed_views": Key(
        None, FLAG, "a ViT takes views of all sizes as one row of tokens; None: what is fastest (docs/performance.md)"
    ),
    "model.scan_blocks": Key(None, FLAG, "a ViT's blocks are one loop, which compiles faster; None: what is fastest"),
    "model.attention": Key(
        None, choice("xla", "cudnn"), "cudnn: fused, for a ViT in bfloat16 on an NVIDIA GPU; None: what is fastest"
    ),
    "model.remat": Key(
        None,
        choice("none", "dots", "full"),
        "kept for the backward pass of a block: all, products with weights alone, or its input alone; None: by the memory",
    ),
    "init.weights": Key(None, TEXT, "file, directory, workdir of a run or hf:OWNER/NAME; None: random, from the seed"),
    "init.freeze_blocks": Key(
        0, whole(0, 1024), "of a ViT: the first blocks, with everything before them, that stay as they are in init.weights"
    ),
    "init.network": Key("teacher", choice("teacher", "student"), "which to take from a checkpoint that holds both"),
    "init.heads": Key(False, FLAG, "take the projection heads of the checkpoint too, not its backbone alone"),
    # with one prototype the normalized entropy is 0 / 0
    "head.prototypes": Key(None, whole(2, 2**22), "K; None: 4,096 for fewer than 20,000 images, else 65,536"),
    "head.share_mlp": Key(None, FLAG, "one set of layers before the prototypes for both levels; None: True in method ibot"),
    "head.share_prototypes": Key(
        None, FLAG, "one prototype matrix for the image and the region level; None: True in method ibot"
    ),
    "head.hidden_dim": Key(2048, WIDTH, "width of the hidden layers"),
    "head.bottleneck_dim": Key(256, WIDTH, "width of the embedding before the prototypes"),
    "head.layers": Key(3, whole(1, 64), "linear layers before the prototypes"),
    "head.batch_norm": Key(False, FLAG, "batch normalization in the heads, an option of DINO's"),
    "head.norm_last_layer": Key(True, FLAG, "prototypes have norm 1; False learns a gain for each"),
    "data.source": Key("synthetic_birds", TEXT, f"one of {', '.join(SOURCES)}, or tfds:NAME"),
    "data.data_dir": Key(os.path.join("~", "tensorflow_datasets"), SOME_TEXT, "prepared TFDS datasets"),
    "data.manual_dir": Key(None, TEXT, "archives that only you can download; None: DATA_DIR/downloads/manual"),
    "data.folder": Key(None, TEXT, "of source folder: train/CLASS/* and test/CLASS/*, or images without labels at any depth"),
    "data.eval_source": Key(None, TEXT, "labelled data to evaluate on, as data.source; None: the training data"),
    "data.eval_folder": Key(None, TEXT, "of data.eval_source folder, which it implies"),
    "data.canvas_px": Key(512, SIDE_PX, "longer sides are shrunk to this when an image is decoded"),
    "data.grayscale": Key(False, FLAG, "luma alone, in training and evaluation: for classes that colour does not tell apart"),
    "data.normalization": Key(
        None,
        NORMALIZATION,
        "of pixels; local_contrast removes lighting and smooth backgrounds; None: that of init.weights, or imagenet",
    ),
    "data.decode_threads": Key(4, whole(1, 1024), "threads that decode images"),
    "data.cache": Key(
        "auto",
        choice("auto", "ram", "disk", "none"),
        "of decoded images; later runs read that on disk; auto: ram if it fits, else disk",
    ),
    "data.cache_dir": Key(None, TEXT, "of cache disk, on a local disk; None: DATA_DIR/canvas_cache"),
    "data.prefetch_batches": Key(2, whole(1, 1024), "batches prefetched to the device"),
    "views.global_px": Key(
        None, SIDE_PX, "side of the two global views; None: 224, or that of init.weights if it is less; a multiple of a patch"
    ),
    "views.global_scale": Key((0.4, 1.0), several(SOME_SHARE, 2), "least and greatest share of the image's area"),
    "views.local_px": Key(None, SIDE_PX, "side of the local views; None: 3/7 of global_px, the references' 96 for 224"),
    "views.local_scale": Key((0.05, 0.4), several(SOME_SHARE, 2), "least and greatest share of the image's area"),
    "views.local_count": Key(8, whole(0, 256), "local views of an image"),
    "views.jitter_prob": Key(0.8, SHARE, "of colour jitter"),
    "views.brightness": Key(0.4, number(0, 10), "strength of the jitter"),
    "views.contrast": Key(0.4, number(0, 10), "strength of the jitter"),
    "views.saturation": Key(0.2, number(0, 10), "strength of the jitter"),
    "views.hue": Key(0.1, number(0, 0.5), "strength of the jitter, a share of the circle"),
    "views.grayscale_prob": Key(0.2, SHARE, "of a grey view"),
    "views.blur_sigma": Key((0.1, 2.0), several(number(0, 100, above=True), 2), "least and greatest, in pixels of the view"),
    "views.global_blur_prob": Key((1.0, 0.1), several(SHARE, 2), "of the two global views"),
    "views.local_blur_prob": Key(0.5, SHARE, "of each local view"),
    "views.global_solarize_prob": Key((0.0, 0.2), several(SHARE, 2), "of the two global views"),
    "views.dtype": Key("float32", DTYPE, "of the interpolation products; with bfloat16 a pixel is off by one level at most"),
    "optim.lr": Key(None, number(0, 100, above=True), f"peak, for a batch of 256; scaled linearly with the batch; {RECIPE}"),
    "optim.min_lr": Key(1e-6, number(0, 100), "at the end of the cosine schedule"),
    "optim.warmup_epochs": Key(None, EPOCHS, f"of the learning rate, linear from 0; {RECIPE}"),
    "optim.weight_decay": Key(None, number(0, 100), f"at the start; {RECIPE}"),
    "optim.weight_decay_end": Key(None, number(0, 100), f"at the end of its cosine schedule; {RECIPE}"),
    "optim.clip_grad": Key(3.0, number(0, 1e6), "greatest norm of each parameter's gradient; 0 does not clip"),
    "optim.layer_decay": Key(
        None, SOME_SHARE, f"of the learning rate from a layer of the backbone to the one before it; 1: none; {RECIPE}"
    ),
    "optim.freeze_last_layer_epochs": Key(None, EPOCHS, f"in which the prototypes do not change; {RECIPE}"),
    "optim.freeze_backbone_epochs": Key(
        None, EPOCHS, f"in which the backbone does not change, and the heads alone learn; {RECIPE}"
    ),
    "mesh.data": Key(-1, whole(1, 2**20, also=-1), "devices over which batches are split; -1: all"),
    "mesh.shard_state": Key(
        False, FLAG, "split parameters, teacher and moments over mesh.data between steps; a step starts by gathering parameters"
    ),
    "train.batch_size": Key(
        None,
        IMAGES,
        "images of a step on all devices; None: 64 on CPUs, else 64 a device, at most 1,024, fewer for little memory or data",
    ),
    "train.accumulate": Key(1, IMAGES, "parts of a batch, one after the other; gradients are their mean"),
    "train.epochs": Key(None, SOME_EPOCHS, f"passes over the training images; {RECIPE}"),
    "train.log_every_steps": Key(10, whole(1, 10**9), "steps between lines of metrics"),
    "train.checkpoint_every_epochs": Key(None, SOME_EPOCHS, f"epochs between checkpoints; {RECIPE}"),
    "train.keep_checkpoints": Key(3, whole(1, 10**6), "newest checkpoints that are kept"),
    "train.stop_on_collapse": Key(False, FLAG, "stop with exit code 70 at a collapse, instead of a warning"),
    "train.best_metric": Key(
        None,
        choice(*BEST_METRICS),
        "the best step by it is kept too, and is the result; None: with init.weights eval_train_rank1, or without labels "
        "eval_view_rank1, else none: the newest step is the result",
    ),
    # "linear" passes over all training images linear_epochs times: minutes on a GPU, hours on a CPU.
    "eval.protocols": Key(
        tuple(name for name in EVAL_PROTOCOLS if name != "linear"),
        words_of(EVAL_PROTOCOLS),
        "at the end and in cmd_jax.eval; at the start the same but linear; without labels only label_free",
    ),
    "eval.every_epochs": Key(0.0, EPOCHS, "0: only at the start and at the end"),
    "eval.protocols_between": Key(
        ("knn", "retrieval", "pointing", "label_free"), words_of(EVAL_PROTOCOLS), "of every_epochs; each takes seconds"
    ),
    "eval.batch_size": Key(64, IMAGES, "images of a forward pass"),
    "eval.resize_px": Key(None, SIDE_PX, "shorter side; None: 8/7 of crop_px, the references' 256 for 224"),
    "eval.crop_px": Key(None, SIDE_PX, "None: views.global_px"),
    "eval.resize_mode": Key(
        None,
        choice("shorter_side", "squash"),
        "to resize_px: the shorter side, or both, whatever the shape; None: as init.weights was trained, or shorter_side",
    ),
    "eval.interpolation": Key(
        None, choice(*INTERPOLATIONS), "of resizing, antialiased; None: as init.weights was trained, or bicubic"
    ),
    "eval.features": Key(
        None,
        joined("cls", "mean", "mil", "blocks"),
        "what features are; blocks: of last_blocks; None: see `resolve`",
    ),
    "eval.last_blocks": Key(4, whole(1, 1024), "that features blocks and the linear probe read; the references read 4"),
    "eval.knn_k": Key(
        (10, 20, 100, 200), several(whole(1, 10**6)), "the references'; those above the number of training images are left out"
    ),
    "eval.knn_temp": Key(0.07, TEMPERATURE, "of the votes' weights"),
    "eval.fractions": Key((0.2, 0.5), several(SOME_SHARE), "of the labels of every class, for protocol fractions"),
    "eval.label_free_images": Key(
        5000, whole(2, 10**6), "training images at most; RankMe wants more of them than a feature has dimensions"
    ),
    "eval.linear_epochs": Key(100, whole(1, 10**4), "of the linear probe"),
    "eval.linear_batch_size": Key(128, IMAGES, "of the linear probe"),
    "eval.linear_lrs": Key(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        several(number(0, 1e4, above=True)),
        "learning rates that the linear probe tries, for a batch of 256; DINO's is the first",
    ),
}


def default() -> ConfigDict:
    """The configuration with the default of every key; KEYS says what None means."""
    config = ConfigDict()
    for key, (usual, rule, _) in KEYS.items():
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = placeholder(rule.kind) if usual is None else usual
    return config


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their full key, such as "optim.lr"."""
    found: dict[str, Any] = {}
    for name in config:
        value = config[name]
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return found


def is_swin(config: ConfigDict) -> bool:
    """Whether the configured backbone is a Swin; otherwise it is a ViT."""
    return config.model.name in SWIN_SIZES


def has_class_token(config: ConfigDict) -> bool:
    """Whether the configured backbone has a class token: a Swin has none, and a ViT may have none."""
    return not is_swin(config) and config.model.class_token is not False


def patch_px(config: ConfigDict) -> int:
    """Side in pixels of the squares that the backbone embeds, resolved or not."""
    return config.model.patch_size or (SWIN_PATCH_PX if is_swin(config) else 16)


def token_px(config: ConfigDict) -> int:
    """Side in pixels of a patch token: the stride of the last stage of a Swin, the patch of a ViT."""
    return SWIN_STRIDE_PX if is_swin(config) else patch_px(config)
