"""One jitted step: views on the device, both networks, the objective, AdamW, EMA and centers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cmd_jax.config import ConfigDict
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.loader import Batch
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.koleo import koleo
from cmd_jax.method.objective import Result, Views, cmd_objective
from cmd_jax.method.rows import PrototypePair, TermWeights
from cmd_jax.models.network import Encoded, Network
from cmd_jax.training import health
from cmd_jax.training.schedules import Schedules
from cmd_jax.training.state import Params, TrainState, with_dtype

Array = jax.Array
Metrics = dict[str, Array]


def encode_views(
    network: Network, params: Params, groups: tuple[Array, ...], drop_key: Array | None
) -> tuple[tuple[Encoded, ...], tuple[Views, ...]]:
    """Runs a network on groups [B, V, H, W, 3] of views; drop_key None is the teacher's deterministic forward.

    Returns:
        For each group what the network gives with leading [B * V], and the objective's reading of it with leading [B, V].
    """
    encoded = network.apply({"params": params}, groups, drop_key, method="encode")

    def read(group: Array, encoded: Encoded) -> Views:
        split = lambda x: x.reshape(*group.shape[:2], *x.shape[1:])
        return Views(split(encoded.image_z), split(encoded.region_z), split(encoded.patch_tokens), split(encoded.mil_weights))

    return encoded, tuple(map(read, groups, encoded))


def term_weights(config: ConfigDict) -> TermWeights:
    """The weights of the objective's terms in a resolved configuration."""
    return TermWeights(**{term: config.method[f"{term}_weight"] for term in TermWeights._fields})


def make_streaming(config: ConfigDict) -> Streaming:
    """How the objective of a resolved configuration passes over the prototypes."""
    method = config.method
    return Streaming(method.prototype_chunk, config.model.dtype, targets=method.matched_targets)


def ema(teacher: Params, student: Params, momentum: Array) -> Params:
    """momentum * teacher + (1 - momentum) * student."""
    return jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, teacher, student)


def make_update(
    config: ConfigDict, network: Network, optimizer: optax.GradientTransformationExtraArgs, schedules: Schedules
) -> Callable[[TrainState, tuple[Array, ...]], tuple[TrainState, Metrics]]:
    """Builds the part of a step that follows the augmentation: (state, groups of views [B, V, H, W, 3]) -> (state, metrics)."""
    weights = term_weights(config)
    streaming = make_streaming(config)
    teacher_network = with_dtype(network, jnp.dtype(config.model.teacher_dtype))

    def prototypes(params: Params) -> PrototypePair:
        return PrototypePair(*network.apply({"params": params}, method="prototype_rows"))

    def update(state: TrainState, groups: tuple[Array, ...]) -> tuple[TrainState, Metrics]:
        drop_key = jax.random.fold_in(_step_key(config, state), 1)
        temp = schedules.teacher_temp(state.step)
        (teacher_encoded,), (teacher,) = encode_views(teacher_network, state.teacher, groups[:1], None)
        teacher_prototypes = prototypes(state.teacher)

        def loss_fn(student: Params) -> tuple[Array, Result]:
            encoded, views = encode_views(network, student, groups, drop_key)
            # L_T trains the scorer on the teacher's embeddings, and nothing else.
            inter_teacher_weights = network.apply(
                {"params": student}, jax.lax.stop_gradient(teacher.features), method="score_patches"
            )
            result = cmd_objective(
                views,
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
                streaming=streaming,
            )
            if config.method.koleo_weight:
                embeddings = encoded[0].image_embedding.reshape(*groups[0].shape[:2], -1)  # [B * 2, D] -> [B, 2, D]
                spread = jnp.mean(jax.vmap(koleo, in_axes=1)(embeddings))
                loss = result.loss + config.method.koleo_weight * spread
                result = result._replace(loss=loss, terms={**result.terms, "koleo": spread})
            return result.loss, result

        gradients, result = jax.grad(loss_fn, has_aux=True)(state.student)
        grad_norm = optax.tree.norm(gradients)
        # A bad step leaves no trace in the state: every part of it stays as it is.
        good = health.is_finite(result.loss, grad_norm)
        learning_rate, weight_decay = schedules.learning_rate(state.step), schedules.weight_decay(state.step)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.student, learning_rate=learning_rate, weight_decay=weight_decay, active=good
        )
        # The EMA reads the new parameters alone, so that they are written in place of the old ones.
        student = jax.lax.optimization_barrier(optax.apply_updates(state.student, updates))
        momentum = schedules.teacher_momentum(state.step)
        teacher_params = ema(state.teacher, student, jnp.where(good, momentum, 1.0))
        centers = jax.tree.map(lambda new, old: jnp.where(good, new, old), result.centers, state.centers)
        new = TrainState(state.step + 1, student, teacher_params, optimizer_state, centers)
        metrics = {
            "loss": result.loss,
            **{f"loss_{name}": value for name, value in result.terms.items()},
            "grad_norm": grad_norm,
            "teacher_entropy": health.relative_entropy(result.teacher_entropy, config.head.prototypes),
            "feature_std": health.feature_std(teacher_encoded.image_embedding),
            "mil_entropy": health.mil_entropy(teacher_encoded.mil_weights),
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temp": temp,
        }
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return update


def make_train_step(
    config: ConfigDict, network: Network, optimizer: optax.GradientTransformationExtraArgs, schedules: Schedules
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of a resolved configuration; the caller jits it.

    The step's randomness is a function of (seed, step, image index). Its metrics are float32 scalars.
    """
    update = make_update(config, network, optimizer, schedules)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        crop_key = jax.random.fold_in(_step_key(config, state), 0)
        views = multi_crop(crop_key, *batch, views=config.views, normalization=config.data.normalization)
        return update(state, tuple(group for group in views if group is not None))

    return train_step


def _step_key(config: ConfigDict, state: TrainState) -> Array:
    return jax.random.fold_in(jax.random.key(config.seed), state.step)
