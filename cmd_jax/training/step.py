"""One jitted step: views on the device, both networks, the objective, AdamW, EMA and centers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.loader import Batch
from cmd_jax.method.koleo import koleo
from cmd_jax.method.objective import Result, Views, cmd_objective
from cmd_jax.method.rows import PrototypePair, TermWeights
from cmd_jax.models.network import Encoded, Network
from cmd_jax.training import health
from cmd_jax.training.schedules import Schedules
from cmd_jax.training.state import Params, TrainState

Array = jax.Array
Metrics = dict[str, Array]


def encode_views(network: Network, params: Params, images: Array, drop_key: Array | None) -> tuple[Encoded, Views]:
    """Runs a network on [B, V, H, W, 3]; drop_key None is the teacher's deterministic forward.

    Returns:
        What the network gives with leading [B * V], and the objective's reading of it with leading [B, V].
    """
    batch, views = images.shape[:2]
    rngs = {} if drop_key is None else {"drop_path": drop_key}
    # batch-major: [B, V, ...] -> [B * V, ...] keeps every image's views on its device
    encoded = network.apply(
        {"params": params}, images.reshape(batch * views, *images.shape[2:]), train=drop_key is not None, rngs=rngs
    )
    split = lambda x: x.reshape(batch, views, *x.shape[1:])
    return encoded, Views(
        split(encoded.image_z), split(encoded.region_z), split(encoded.patch_tokens), split(encoded.mil_weights)
    )


def term_weights(config: ConfigDict) -> TermWeights:
    """The weights of the objective's terms in a resolved configuration."""
    return TermWeights(**{term: config.method[f"{term}_weight"] for term in TermWeights._fields})


def ema(teacher: Params, student: Params, momentum: Array) -> Params:
    """momentum * teacher + (1 - momentum) * student."""
    return jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, teacher, student)


def make_train_step(
    config: ConfigDict, network: Network, optimizer: optax.GradientTransformationExtraArgs, schedules: Schedules
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of a resolved configuration; the caller jits it.

    The step's randomness is a function of (seed, step, image index). Its metrics are float32 scalars.
    """
    weights = term_weights(config)

    def prototypes(params: Params) -> PrototypePair:
        return PrototypePair(*network.apply({"params": params}, method="prototype_rows"))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        crop_key, drop_global, drop_local = (jax.random.fold_in(step_key, use) for use in range(3))
        global_views, local_views = multi_crop(crop_key, *batch, views=config.views, normalization=config.data.normalization)
        temp = schedules.teacher_temp(state.step)

        teacher_encoded, teacher = encode_views(network, state.teacher, global_views, None)
        teacher_prototypes = prototypes(state.teacher)

        def loss_fn(student: Params) -> tuple[Array, Result]:
            student_encoded, student_global = encode_views(network, student, global_views, drop_global)
            groups = [student_global]
            if local_views is not None:
                groups.append(encode_views(network, student, local_views, drop_local)[1])
            # L_T trains the scorer on the teacher's embeddings, and nothing else.
            inter_teacher_weights = network.apply(
                {"params": student}, jax.lax.stop_gradient(teacher.features), method="score_patches"
            )
            result = cmd_objective(
                tuple(groups),
                prototypes(student),
                teacher,
                teacher_prototypes,
                inter_teacher_weights,
                state.centers,
                weights=weights,
                region_weights=config.method.region_weights,
                student_temp=config.method.student_temp,
                teacher_temp=temp,
                center_momentum=config.method.center_momentum,
                centering=config.method.centering,
            )
            if config.method.koleo_weight:
                embeddings = student_encoded.image_embedding.reshape(*global_views.shape[:2], -1)  # [B * 2, D] -> [B, 2, D]
                spread = jnp.mean(jax.vmap(koleo, in_axes=1)(embeddings))
                loss = result.loss + config.method.koleo_weight * spread
                result = result._replace(loss=loss, terms={**result.terms, "koleo": spread})
            return result.loss, result

        gradients, result = jax.grad(loss_fn, has_aux=True)(state.student)
        learning_rate, weight_decay = schedules.learning_rate(state.step), schedules.weight_decay(state.step)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.student, learning_rate=learning_rate, weight_decay=weight_decay
        )
        student = optax.apply_updates(state.student, updates)
        momentum = schedules.teacher_momentum(state.step)
        grad_norm = optax.tree.norm(gradients)
        new = TrainState(state.step, student, ema(state.teacher, student, momentum), optimizer_state, result.centers)
        new = health.keep_if_finite(result.loss, grad_norm, new, state)._replace(step=state.step + 1)
        metrics = {
            "loss": result.loss,
            **{f"loss_{name}": value for name, value in result.terms.items()},
            "grad_norm": grad_norm,
            "teacher_entropy": jnp.mean(result.teacher_entropy) / jnp.log(config.head.prototypes),
            "feature_std": health.feature_std(teacher_encoded.image_embedding),
            "mil_entropy": health.mil_entropy(teacher_encoded.mil_weights),
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temp": temp,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step
