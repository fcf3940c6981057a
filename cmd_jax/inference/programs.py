"""A trained network as a program for other runtimes: StableHLO by jax.export, ONNX by jax2onnx. Weights are inside."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.extend.core import jaxpr_as_fun

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.errors import ConfigError, WeightsError
from cmd_jax.inference.load import Trained
from cmd_jax.inference.run import encode
from cmd_jax.models.build import make_backbone

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("features", "mil_weights")
# 16-bit weights of luma as Pillow has them; all sums are whole numbers below 2^24, exact in float32.
_LUMA, _UNIT = (19595.0, 38470.0, 7471.0), 65536.0


def inference(trained: Trained, dtype: str | None = None) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The function that is exported: evaluation crops [B, C, C, 3] uint8 -> features [B, F] and mil_weights [B, P], float32.

    Normalisation is inside, and so is luma where the network was trained on it. What is fast in training (fused attention,
    blocks as a loop) is replaced by plain operations with the same result.

    Args:
        trained: a network with a MIL scorer.
        dtype: of activations and products; None: the configuration's.
    """
    config = trained.config.copy_and_resolve_references()
    dtype = dtype or config.model.dtype
    plain = {"attention": "xla", "scan_blocks": False, "remat": "none", "dtype": dtype, "product_dtype": dtype}
    with config.unlocked():
        config.model.update(plain)
    backbone = make_backbone(config)

    def run(images: jax.Array) -> dict[str, jax.Array]:
        images = _luma(images) if config.data.grayscale else images
        encoded = encode(config, backbone, trained.params, images)
        return {name: encoded[name] for name in OUTPUTS}

    return run


def _luma(images: jax.Array) -> jax.Array:
    """Three equal channels of whole levels; a picture that is grey already stays as it is."""
    sums = jnp.sum(images.astype(jnp.float32) * jnp.array(_LUMA), axis=-1, keepdims=True)
    return jnp.broadcast_to(jnp.floor((sums + _UNIT / 2) / _UNIT), images.shape)


def _images(config: ConfigDict) -> jax.ShapeDtypeStruct:
    (batch,) = export.symbolic_shape("b")
    return jax.ShapeDtypeStruct((batch, config.eval.crop_px, config.eval.crop_px, 3), jnp.uint8)


def write_stablehlo(path: str, trained: Trained) -> None:
    """Writes a program for CPUs, NVIDIA GPUs and TPUs and any batch, which `jax.export.deserialize` reads."""
    exported = export.export(jax.jit(inference(trained)), platforms=PLATFORMS)(_images(trained.config))
    files.write(path, bytes(exported.serialize()))


def check_onnx() -> None:
    """Raises ConfigError where the converter is not installed."""
    if importlib.util.find_spec("jax2onnx") is None:
        raise ConfigError("--format=onnx needs jax2onnx, which is not installed; pip install '.[onnx]'")


def write_onnx(path: str, trained: Trained) -> None:
    """Writes an ONNX program of any batch, in float32, with the preparation of images in its metadata.

    Raises:
        ConfigError: jax2onnx is not installed.
        WeightsError: it cannot convert this network.
    """
    check_onnx()
    from jax2onnx import to_onnx

    images = _images(trained.config)
    run = inference(trained, "float32")
    # Traced before jax2onnx exchanges modules of flax for its own, which do not know parameters that are functions.
    program = jaxpr_as_fun(jax.make_jaxpr(lambda x: tuple(run(x).values()))(images))
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of values without a type, which ONNX infers
    try:
        model: Any = to_onnx(program, [images], model_name="cmd_jax", input_names=["images"], output_names=list(OUTPUTS))
    except Exception as error:  # of any type, from wherever an operation is not known
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(
            f"jax2onnx cannot convert this {trained.config.model.name} at {trained.config.eval.crop_px} px ({reason[:200]}); "
            "use --format=stablehlo, or of a Swin sizes that its windows divide"
        ) from error
    finally:
        logging.disable(previous)
    config = trained.config
    facts = {
        "step": trained.step,
        "fingerprint": trained.fingerprint,
        "features": config.eval.features,
        "resize_px": config.eval.resize_px,
        "crop_px": config.eval.crop_px,
        "resize_mode": config.eval.resize_mode,
        "interpolation": config.eval.interpolation,
    }
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=str(value))
    files.write(path, model.SerializeToString())
