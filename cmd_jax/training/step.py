"""One jitted step: views on the device, both networks, the objective, AdamW, EMA and centers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.augment import Placed, crop_views, key_points
from cmd_jax.data.loader import Batch
from cmd_jax.method import mil
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.koleo import koleo
from cmd_jax.method.objective import Result, Views, cmd_objective
from cmd_jax.method.regions import Places
from cmd_jax.method.rows import Centers, PrototypePair, TermWeights
from cmd_jax.models.build import Params, with_dtype
from cmd_jax.models.network import Encoded, Network
from cmd_jax.models.sizes import UNLEARNED
from cmd_jax.training import health
from cmd_jax.training.schedules import Schedules, scaled_momentum
from cmd_jax.training.sharding import Shardings
from cmd_jax.training.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]


def encode_views(
    network: Network, params: Params, groups: tuple[Array, ...], drop_keys: Array | None
) -> tuple[tuple[Encoded, ...], tuple[Views, ...]]:
    """Runs a network on groups of views.

    Args:
        network: of student or teacher.
        params: its parameters.
        groups: [B, V, H, W, 3] normalised float each.
        drop_keys: [B] random keys of stochastic depth, one for each image; None is the teacher's deterministic forward.

    Returns:
        For each group what the network gives with leading [B * V], and the objective's reading of it with leading [B, V].
    """
    encoded = network.apply({"params": params}, groups, drop_keys, method="encode")

    def read(group: Array, encoded: Encoded) -> Views:
        split = lambda x: x.reshape(*group.shape[:2], *x.shape[1:])
        return Views(split(encoded.image_z), split(encoded.region_z), split(encoded.patch_tokens), split(encoded.mil_weights))

    return encoded, tuple(map(read, groups, encoded))


def term_weights(config: ConfigDict) -> TermWeights:
    """The weights of the objective's terms in a resolved configuration."""
    return TermWeights(**{term: config.method[f"{term}_weight"] for term in TermWeights._fields})


def make_streaming(config: ConfigDict, shardings: Shardings | None = None) -> Streaming:
    """How the objective of a resolved configuration passes over the prototypes."""
    method = config.method
    mesh = shardings.mesh if shardings and shardings.mesh.size > 1 else None
    return Streaming(method.prototype_chunk, config.model.dtype, method.matched_targets, mesh)


def ema(teacher: Params, student: Params, momentum: Array) -> Params:
    """momentum * teacher + (1 - momentum) * student."""
    return jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, teacher, student)


class Outcome(NamedTuple):
    """What a forward pass says of a batch, or the mean of what several say; [] float32 but the centers.

    Attributes:
        loss: what the gradients are of.
        terms: of the loss, unweighted, by name.
        centers: after the step.
        health: metrics of the teacher, by name.
    """

    loss: Array
    terms: Metrics
    centers: Centers
    health: Metrics


class Crops(NamedTuple):
    """Views of a batch.

    Attributes:
        groups: [B, V, H, W, 3] normalised float each, the two global views first, then the local ones if there are any.
        places: of the groups, where regions match by location.
    """

    groups: tuple[Array, ...]
    places: tuple[Places, ...] | None = None


class TeacherOutputs(NamedTuple):
    """What the teacher says of the global views of a batch, as a network gives it and as the objective reads it."""

    encoded: Encoded
    views: Views
    prototypes: PrototypePair


def prototypes_of(network: Network, params: Params) -> PrototypePair:
    """W of both levels."""
    return PrototypePair(*network.apply({"params": params}, method="prototype_rows"))


def make_teach(
    config: ConfigDict, network: Network, shardings: Shardings | None = None
) -> Callable[[Params, Array], TeacherOutputs]:
    """Builds (teacher's parameters, global views [B, 2, H, W, 3]) -> what it says of them."""
    teacher_network = with_dtype(network, jnp.dtype(config.model.teacher_dtype))

    def teach(params: Params, images: Array) -> TeacherOutputs:
        params = gather(params, shardings)
        (encoded,), (views,) = encode_views(teacher_network, params, (images,), None)
        return TeacherOutputs(encoded, views, prototypes_of(network, params))

    return teach


def make_views(config: ConfigDict, teach: Callable) -> Callable[[Params, Batch, Array], tuple[Crops, TeacherOutputs]]:
    """Builds (teacher's parameters, batch, key) -> (views of all sizes, what the teacher says of the global ones).

    With `views.key_patch_share` local views look where the teacher's MIL weights lie, so it reads the global ones first.
    """
    views = config.views
    patch_side = lambda view_px: token_px(config) / view_px

    def places(group: Placed) -> Places:
        return Places(group.box, group.flip, patch_side(group.pixels.shape[2]))

    def cut(params: Params, batch: Batch, key: Array) -> tuple[Crops, TeacherOutputs]:
        crop = functools.partial(crop_views, key, *batch, views=views, normalization=config.data.normalization)
        shown = crop(local=False)
        taught = teach(params, shown.pixels)
        groups = (shown,)
        if views.local_count:
            focus = None
            if views.key_patch_share:
                side = patch_side(views.global_px)
                focus = key_points(key, batch.index, taught.views.mil_weights, shown, patch_side=side, views=views)
            groups = (shown, crop(focus, local=True))
        by_location = config.method.region_matching == "location"
        return Crops(tuple(group.pixels for group in groups), tuple(map(places, groups)) if by_location else None), taught

    return cut


def make_gradients(
    config: ConfigDict, network: Network, schedules: Schedules, shardings: Shardings | None = None
) -> Callable[[TrainState, Crops, TeacherOutputs, Array], tuple[Params, Outcome]]:
    """Builds (state, views, what the teacher says of the global ones, keys [B] of stochastic depth) -> (gradients for the
    student, outcome)."""
    weights = term_weights(config)
    streaming = make_streaming(config, shardings)
    center_momentum = scaled_momentum(config.method.center_momentum, config)

    def gradients(state: TrainState, crops: Crops, taught: TeacherOutputs, drop_keys: Array) -> tuple[Params, Outcome]:
        temp, teacher = schedules.teacher_temp(state.step), taught.views

        def loss_fn(student: Params) -> tuple[Array, Result]:
            student = gather(student, shardings)
            encoded, views = encode_views(network, student, crops.groups, drop_keys)
            # L_T trains the scorer on the teacher's embeddings, and nothing else.
            inter_teacher_weights = teacher.mil_weights
            if config.method.mil_scorer not in UNLEARNED:
                inter_teacher_weights = network.apply(
                    {"params": student}, jax.lax.stop_gradient(teacher.features), method="score_patches"
                )
            result = cmd_objective(
                views,
                prototypes_of(network, student),
                teacher,
                taught.prototypes,
                inter_teacher_weights,
                state.centers,
                weights=weights,
                region_weights=config.method.region_weights,
                student_temp=config.method.student_temp,
                teacher_temp=temp,
                center_momentum=center_momentum,
                centering=config.method.centering,
                streaming=streaming,
                inter_direction=config.method.inter_direction,
                places=crops.places,
                inter_scale=schedules.inter_scale and schedules.inter_scale(state.step),
            )
            if config.method.koleo_weight:
                embeddings = encoded[0].image_embedding.reshape(*crops.groups[0].shape[:2], -1)  # [B * 2, F] -> [B, 2, F]
                spread = jnp.mean(jax.vmap(koleo, in_axes=1)(embeddings))
                loss = result.loss + config.method.koleo_weight * spread
                result = result._replace(loss=loss, terms={**result.terms, "koleo": spread})
            if config.method.mil_entropy_weight:
                entropy = jnp.mean(mil.relative_entropy(encoded[0].mil_weights))
                loss = result.loss + config.method.mil_entropy_weight * entropy
                result = result._replace(loss=loss, terms={**result.terms, "mil_entropy": entropy})
            return result.loss, result

        of_student, result = jax.grad(loss_fn, has_aux=True)(state.student)
        signs = {
            "teacher_entropy": health.relative_entropy(result.teacher_entropy, config.head.prototypes),
            "marginal_entropy": health.relative_entropy(result.marginal_entropy, config.head.prototypes),
            "feature_std": health.feature_std(taught.encoded.image_embedding),
            "mil_entropy": health.mil_entropy(taught.encoded.mil_weights),
        }
        return of_student, Outcome(result.loss, result.terms, result.centers, signs)

    return gradients


def make_apply(
    optimizer: optax.GradientTransformationExtraArgs, schedules: Schedules
) -> Callable[[TrainState, Params, Outcome], tuple[TrainState, Metrics]]:
    """Builds (state, gradients, outcome) -> (state after the step, metrics): AdamW, EMA and centers."""

    def apply(state: TrainState, gradients: Params, outcome: Outcome) -> tuple[TrainState, Metrics]:
        grad_norm = optax.tree.norm(gradients)
        # A bad step leaves no trace in the state: every part of it stays as it is.
        good = health.is_finite(outcome.loss, grad_norm)
        learning_rate, weight_decay = schedules.learning_rate(state.step), schedules.weight_decay(state.step)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.student, learning_rate=learning_rate, weight_decay=weight_decay, active=good
        )
        # The EMA reads the new parameters alone, so that they are written in place of the old ones.
        student = jax.lax.optimization_barrier(optax.apply_updates(state.student, updates))
        momentum = schedules.teacher_momentum(state.step)
        choose = lambda new, old: jnp.where(good, new, old)  # no product with 0: that of NaN is NaN
        teacher = jax.tree.map(choose, ema(state.teacher, student, momentum), state.teacher)
        centers = jax.tree.map(choose, outcome.centers, state.centers)
        bad_steps = health.count_bad(state.bad_steps, good)
        metrics = {
            "loss": outcome.loss,
            **{f"loss_{name}": value for name, value in outcome.terms.items()},
            "grad_norm": grad_norm,
            **outcome.health,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temp": schedules.teacher_temp(state.step),
            **({"inter_scale": schedules.inter_scale(state.step)} if schedules.inter_scale else {}),
            "bad_steps": bad_steps.total,
            "bad_steps_in_row": bad_steps.in_row,
        }
        new = TrainState(state.step + 1, student, teacher, optimizer_state, centers, bad_steps)
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return apply


def make_train_step(
    config: ConfigDict,
    network: Network,
    optimizer: optax.GradientTransformationExtraArgs,
    schedules: Schedules,
    shardings: Shardings | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step of a resolved configuration; the caller jits it.

    The step's randomness is a function of (seed, step, image index). Its metrics are float32 scalars. With `train.accumulate`
    the batch goes through in parts, and gradients, centers and metrics are the parts' means: those of the whole batch, but for
    what looks across images (KoLeo, batch statistics in the heads, Sinkhorn), which sees a part at a time.
    """
    gradients, apply = make_gradients(config, network, schedules, shardings), make_apply(optimizer, schedules)
    cut = make_views(config, make_teach(config, network, shardings))
    parts = config.train.accumulate

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def part(batch: Batch) -> tuple[Params, Outcome]:
            views, taught = cut(state.teacher, batch, jax.random.fold_in(key, 0))
            of_image = functools.partial(jax.random.fold_in, jax.random.fold_in(key, 1))
            return gradients(state, views, taught, jax.vmap(of_image)(batch.index))

        if parts == 1:
            return apply(state, *part(batch))

        # Part p takes the images p, p + parts, ...: a slice of what each device holds, so that nothing moves.
        split = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        batches = jax.tree.map(split, batch)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, jax.tree.map(lambda x: x[0], batches)))
        add = lambda total, of_part: jax.tree.map(lambda a, b: a + b / parts, total, of_part)
        mean, _ = jax.lax.scan(lambda total, one: (add(total, part(one)), None), zeros, batches)
        return apply(state, *mean)

    return train_step


def gather(params: Params, shardings: Shardings | None) -> Params:
    """Parameters as the networks use them; a state that is split is gathered here, and gradients are split as it is."""
    if not (shardings and shardings.shard_state):
        return params

    @jax.custom_vjp
    def gathered(params: Params) -> Params:
        return jax.lax.with_sharding_constraint(params, shardings.in_use(params))

    gathered.defvjp(
        lambda params: (gathered(params), None),
        lambda _, gradients: (jax.lax.with_sharding_constraint(gradients, shardings.of_state(gradients)),),
    )
    return gathered(params)
