"""ViT, Swin and projection heads against the references' forward passes and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cmd_jax.inference.run import last_blocks
from cmd_jax.method.logits import student_logits
from cmd_jax.models.heads import ProjectionHead, Prototypes
from cmd_jax.models.network import Network
from cmd_jax.models.swin import Swin, block_windows, relative_position_bias
from cmd_jax.models.vit import ViT
from cmd_jax.training.step import encode_views
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import to_ours
from tests.parity.fixture import EXACT, FORWARD, GRADIENT, Fixture, compiled


def check_vit(fixture: Fixture) -> None:
    """Every size through DINO's class and, where it is square, through EsViT's, with the same weights."""
    meta = fixture.meta
    params = _params(fixture.weights(), "dino")["backbone"]
    models = {
        rule: ViT(
            patch_size=meta["patch_size"],
            width=meta["embed_dim"],
            depth=meta["depth"],
            num_heads=meta["num_heads"],
            table_px=meta["img_size"],
            mlp_dim=round(meta["mlp_ratio"] * meta["embed_dim"]),
            resample_rule=rule,
        )
        for rule in ("dino", "esvit")
    }
    for size in sorted({*meta["sizes"], *_sizes(fixture)}):
        images = fixture.images(f"in_{size}")
        out = compiled(models["dino"].apply)({"params": params}, images)
        fixture.check(f"out_{size}_cls", out["cls_token"], FORWARD)
        for index, tokens in enumerate(out["blocks"]):
            fixture.check(f"out_{size}_tokens_block{index}", tokens, FORWARD)
        fixture.check(f"out_{size}_attn_last", out["attention"], FORWARD)
        fixture.check(f"out_{size}_pos_embed", out["positions"], FORWARD)
        if images.shape[1] != images.shape[2]:
            continue
        out = compiled(models["esvit"].apply)({"params": params}, images)
        fixture.check(f"out_{size}_esvit_cls", out["cls_token"], FORWARD)
        fixture.check(f"out_{size}_esvit_region", out["patch_tokens"], FORWARD)
        fixture.check(f"out_{size}_esvit_pos_embed", out["positions"], FORWARD)
        linear = last_blocks(out, meta["esvit_linear_n_last_blocks"], append_mean=meta["esvit_linear_avgpool"])
        fixture.check(f"out_{size}_esvit_linear", linear, FORWARD)


def check_swin(fixture: Fixture) -> None:
    """Every size through the backbone, the layout of windows, and where given the multi-crop forward with both heads."""
    meta, params = fixture.meta, _params(fixture.weights(), "swin")
    model = Swin(
        width=meta["embed_dim"],
        depths=tuple(meta["depths"]),
        num_heads=tuple(meta["num_heads"]),
        window=meta["window_size"],
        table_px=meta["img_size"],
        patch_size=meta["patch_size"],
        mlp_ratio=meta["mlp_ratio"],
    )
    windows = block_windows(model.table_px // model.patch_size, model.depths, model.window)
    fixture.check("out_block_window_and_shift", np.array(windows), EXACT)
    window = windows[0][0]
    rows = np.arange((2 * window - 1) ** 2, dtype=np.float32)[:, None]  # a table whose entries are their rows
    index = np.asarray(relative_position_bias(rows, window)[0], np.int32)
    fixture.check("out_relative_position_index_stage0", index, EXACT)
    counts = {int(count) for count in fixture.find(r"out_\w+_linear_last(\d+)")} or {4}
    for size in _sizes(fixture):
        out = compiled(model.apply)({"params": params["backbone"]}, fixture.images(f"in_{size}"))
        fixture.check(f"out_{size}_region", out["patch_tokens"], FORWARD)
        fixture.check(f"out_{size}_pooled", last_blocks(out, 1), FORWARD)
        for count in counts:
            fixture.check(f"out_{size}_linear_last{count}", last_blocks(out, count), FORWARD)
        inside = {f"out_{size}_stage{stage}": tokens for stage, tokens in enumerate(out["stages"])}
        inside |= {f"out_{size}_patch_embed": out["embedded"], f"out_{size}_attn_last": out["attention"]}
        if any(array in fixture for array in inside):  # given for one of the sizes
            for array, actual in inside.items():
                fixture.check(array, actual, FORWARD)
    if "mc" in meta:
        _check_multi_crop(fixture, model, params)


def _check_multi_crop(fixture: Fixture, model: Swin, params: dict) -> None:
    """The network of training on global and local crops; the reference's rows are crop-major."""
    head = fixture.meta["head"]
    network = Network(
        backbone=model,
        image_pool="mean",
        prototypes=head["out_dim"],
        bottleneck_dim=head["bottleneck_dim"],
        hidden_dim=head["hidden_dim"],
        head_layers=head["nlayers"],
        head_batch_norm=False,
        learned_gain=True,
        share_prototypes=False,
        mil_hidden_dim=1,
        mil_temp=1.0,
    )
    groups = [fixture.images("in_mc_global")]
    if fixture.meta["mc"]["n_local"]:
        groups.append(fixture.images("in_mc_local"))
    first = jax.ShapeDtypeStruct(groups[0].shape[1:], np.float32)
    shapes = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, method="initialise"), first)["params"]
    # The reference has no MIL scorer; its weights do not reach what is compared.
    params = params | {"mil_scorer": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["mil_scorer"])}
    encode = compiled(lambda params, crops: encode_views(network, params, crops, None))
    views = encode(params, tuple(np.moveaxis(crops, 0, 1) for crops in groups))  # [crop, B, ...] -> [B, crop, ...]
    image_rows, region_rows = compiled(lambda params: network.apply({"params": params}, method="prototype_rows"))(params)

    def crop_major(arrays: list) -> np.ndarray:
        return np.concatenate([np.moveaxis(np.asarray(array), 0, 1).reshape(-1, array.shape[-1]) for array in arrays])

    image = [student_logits(group.image_z, image_rows, 1.0) for group in views]
    region = [student_logits(group.region_z, region_rows, 1.0) for group in views]
    fixture.check("out_mc_cls_logits", crop_major(image), FORWARD)
    fixture.check("out_mc_region_logits", crop_major(region), FORWARD)
    fixture.check("out_mc_region_feats", crop_major([group.features for group in views]), FORWARD)
    fixture.check("out_mc_npatch", np.array([group.features.shape[2] for group in views]), EXACT)


def check_head(fixture: Fixture) -> None:
    """Logits of the projection head and the gradients of sum(logits * cotangent), with fixed and with learned gain."""
    meta, weights = fixture.meta, fixture.weights()
    x, cotangent = fixture["in_x"], fixture["in_cotangent"]
    mlp = ProjectionHead(meta["hidden_dim"], meta["bottleneck_dim"], meta["nlayers"])
    for variant, learned_gain in (("norm_true", False), ("norm_false", True)):
        prototypes = Prototypes(meta["out_dim"], meta["bottleneck_dim"], learned_gain)
        arrays = {f"head.{name.removeprefix(f'{variant}.')}": array for name, array in weights.items() if variant in name}
        params = _params(arrays, "dino")
        if not learned_gain:
            params["image_last_layer"].pop("weight_g")  # all ones

        def logits(params: dict, x: jax.Array, prototypes: Prototypes = prototypes) -> jax.Array:
            z = mlp.apply({"params": params["image_head"]}, x)
            return student_logits(z, prototypes.apply({"params": params["image_last_layer"]}), 1.0)

        fixture.check(f"out_{variant}_logits", compiled(logits)(params, x), FORWARD)
        gradients = jax.grad(lambda params, x, logits=logits: jnp.sum(logits(params, x) * cotangent), argnums=(0, 1))
        of_params, of_x = compiled(gradients)(params, x)
        fixture.check(f"out_{variant}_grad_x", of_x, GRADIENT)
        for leaf, gradient in of_params["image_last_layer"].items():
            fixture.check(f"out_{variant}_grad_{leaf}", gradient, GRADIENT)
        for layer in range(meta["nlayers"]):
            array = f"out_{variant}_grad_mlp{2 * layer}"  # an activation stands between two linear layers
            of_layer = of_params["image_head"][f"mlp_{layer}"]
            if layer == 0 or f"{array}_weight" in fixture:
                fixture.check(f"{array}_weight", of_layer["kernel"].T, GRADIENT)
            if f"{array}_bias" in fixture:
                fixture.check(f"{array}_bias", of_layer["bias"], GRADIENT)


def _params(arrays: dict[str, np.ndarray], layout: str) -> dict:
    """Weights under the references' names as our tree; a `weight_g` without a gain to learn stays as it is."""
    ours, unknown = to_ours(arrays, LAYOUTS[layout])
    if unknown:
        raise ValueError(f"weights of unknown names: {', '.join(unknown)}")
    return unflatten_dict({name: jnp.asarray(array) for name, array in ours.items()}, sep="/")


def _sizes(fixture: Fixture) -> list[str]:
    """Names of the image sizes of inputs and outputs, without the multi-crop arrays."""
    return sorted(set(fixture.find(r"in_((?!mc_)\w+)")) | set(fixture.find(r"out_((?!mc_)\w+?)(?:_esvit)?_region")))
