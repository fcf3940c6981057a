"""How images were prepared for a network of another project, by the files beside its weights."""

import math
import re
from typing import Any, NamedTuple

from cmd_jax.normalization import statistics_of, text_of

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,) * 3, (0.5,) * 3
USUAL_PX = 224  # crop of a network whose files name none
FILTERS = {0: "bicubic", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers; nearest is never meant


class Beside(NamedTuple):
    """The JSON files beside weights; empty where there is none.

    Attributes:
        config: `config.json` of transformers or timm.
        preprocessor: `preprocessor_config.json` of transformers.
        open_clip: `open_clip_config.json`.
    """

    config: dict[str, Any] = {}
    preprocessor: dict[str, Any] = {}
    open_clip: dict[str, Any] = {}

    def open_clip_model(self) -> dict[str, Any]:
        """What OpenCLIP's file says of the networks."""
        return self.open_clip.get("model_cfg", {})


def prepared(beside: Beside) -> dict[str, Any]:
    """How images were prepared for a network, as far as the files beside its weights say it.

    Returns:
        Values of `data.normalization` and of `eval.resize_px`, `crop_px`, `resize_mode` and `interpolation`.
    """
    if beside.preprocessor:
        return _of_transformers(beside.preprocessor)
    return _of_timm(beside.config["pretrained_cfg"]) if beside.config.get("pretrained_cfg") else _of_open_clip(beside)


def usual_preparation(family: str, image_px: int | None) -> dict[str, Any]:
    """How images are prepared for a network whose files do not say it.

    Args:
        family: as `recognise` names it.
        image_px: image side that the network was made for, if it is known.

    Returns:
        As `prepared`.
    """
    normalization = {"CLIP": text_of(*CLIP), "SigLIP": text_of(*HALF)}.get(family, "imagenet")
    crop = image_px or USUAL_PX
    if family in ("DINOv2", "DINOv3"):  # trained at the end on larger images, and used at this size
        crop = min(USUAL_PX, crop)
    resize = {"eval.resize_px": crop, "eval.resize_mode": "squash", "eval.interpolation": "bilinear"}
    return {"data.normalization": normalization, "eval.crop_px": crop} | (resize if family == "DINOv3" else {})


def _of_transformers(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Of an image processor; the numbers are those of transformers' defaults where the file has none."""
    kind = str(preprocessor.get("image_processor_type", preprocessor.get("feature_extractor_type", "")))
    cropped = preprocessor.get("do_center_crop", "crop_size" in preprocessor) is True
    by_shorter = re.match("CLIP|Bit", kind) is not None or (not kind and cropped)
    size, found = preprocessor.get("size"), {}
    if isinstance(size, dict):
        by_shorter = "shortest_edge" in size
    side = side_px(size)
    if side and preprocessor.get("do_resize", True):
        usual = 3 if by_shorter or re.match("DeiT|Siglip", kind) else 2
        found["eval.resize_px"] = side
        found["eval.resize_mode"] = "shorter_side" if by_shorter else "squash"
        found["eval.interpolation"] = FILTERS.get(preprocessor.get("resample", usual), "bicubic")
    crop = side_px(preprocessor.get("crop_size")) if cropped else side
    if crop:
        found["eval.crop_px"] = crop
    normalization = _normalization(preprocessor)
    return found | ({"data.normalization": normalization} if normalization else {})


def _normalization(preprocessor: dict[str, Any]) -> str | None:
    """(pixels * factor - mean) / std of transformers, in terms of pixels in 0..1."""
    if not {"image_mean", "image_std", "do_normalize", "do_rescale"} & preprocessor.keys():
        return None
    usual = statistics_of("imagenet")
    given = preprocessor.get("image_mean") or usual[0], preprocessor.get("image_std") or usual[1]
    mean, std = given if preprocessor.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    factor = float(preprocessor.get("rescale_factor", 1 / 255)) if preprocessor.get("do_rescale", True) else 1.0
    scale = 1.0 if abs(255 * factor - 1) < 1e-4 else 255 * factor  # files round 1/255
    return text_of([value / scale for value in mean], [value / scale for value in std])


def _of_timm(pretrained: dict[str, Any]) -> dict[str, Any]:
    """Of a pretrained_cfg; timm's mean and deviation are of pixels in 0..1."""
    found: dict[str, Any] = {}
    if {"mean", "std"} <= pretrained.keys():
        found["data.normalization"] = text_of(pretrained["mean"], pretrained["std"])
    if "input_size" in pretrained:
        crop = side_px(pretrained["input_size"][1:])
        found["eval.crop_px"] = crop
        found["eval.resize_px"] = math.floor(crop / float(pretrained.get("crop_pct") or 0.875))
    if "interpolation" in pretrained:
        known = pretrained["interpolation"] in FILTERS.values()
        found["eval.interpolation"] = pretrained["interpolation"] if known else "bicubic"
    if "crop_mode" in pretrained:
        found["eval.resize_mode"] = "squash" if pretrained["crop_mode"] == "squash" else "shorter_side"
    return found


def _of_open_clip(beside: Beside) -> dict[str, Any]:
    prepare, side = (
        beside.open_clip.get("preprocess_cfg", {}),
        side_px(beside.open_clip_model().get("vision_cfg", {}).get("image_size")),
    )
    found: dict[str, Any] = {}
    if {"mean", "std"} <= prepare.keys():
        found["data.normalization"] = text_of(prepare["mean"], prepare["std"])
    if side:
        found |= {"eval.crop_px": side, "eval.resize_px": side}
        found["eval.resize_mode"] = "squash" if prepare.get("resize_mode") == "squash" else "shorter_side"
        found["eval.interpolation"] = "bilinear" if prepare.get("interpolation") == "bilinear" else "bicubic"
    return found


def side_px(size: Any) -> int | None:
    """Pixels of a side, however they are written."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    if isinstance(size, list | tuple):
        if not size or any(side != size[0] for side in size):
            raise ValueError(f"sides of {size} px; only squares are read")
        size = size[0]
    return None if size is None else int(size)
