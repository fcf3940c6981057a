"""One jitted train step, from uint8 images to the new state.

`make_train_step` at the end of this module composes, in this order: views on the device, forward passes of teacher and student,
the objective with its gradient, AdamW, the EMA teacher and the centers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.data.augment import Placed, crop_looks, crop_views
from cmd_jax.data.loader import Batch
from cmd_jax.method.chunks import DATA, Streaming
from cmd_jax.method.masks import draw_masks
from cmd_jax.method.objective import Objective, cmd_objective
from cmd_jax.method.regions import Places
from cmd_jax.method.relations import Relations, scaled_pools, write_rows
from cmd_jax.method.types import Centers, PrototypePair, TermWeights, Views
from cmd_jax.models.build import Params, with_dtype
from cmd_jax.models.network import Encoded, Network
from cmd_jax.models.sizes import UNLEARNED
from cmd_jax.training import health
from cmd_jax.training.optimizer import frozen_parameters, joined
from cmd_jax.training.schedules import Schedules, scaled_momentum
from cmd_jax.training.sharding import Shardings
from cmd_jax.training.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
T = TypeVar("T")


class Crops(NamedTuple):
    """Augmented views of a batch.

    Attributes:
        groups: [B, V, H, W, 3] normalised float each, the two global views first, then the local ones if there are any.
        places: of the groups, where regions match by location.
        masks: [B, 2, N] bool, the patches of the global views that the student does not see; None: it sees all.
    """

    groups: tuple[Array, ...]
    places: tuple[Places, ...] | None = None
    masks: Array | None = None


class TeacherOutputs(NamedTuple):
    """Outputs of the teacher for the global views, and its prototypes."""

    views: Views
    prototypes: PrototypePair


class Forward(NamedTuple):
    """Loss, centers and metrics of a batch, or their means over the parts of one; [] float32 but the centers.

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


def encode_views(
    network: Network, params: Params, groups: tuple[Array, ...], drop_keys: Array | None, masks: Array | None = None
) -> tuple[Views, ...]:
    """Runs a network on groups of views.

    Args:
        network: of student or teacher.
        params: its parameters.
        groups: [B, V, H, W, 3] normalised float each.
        drop_keys: [B] random keys of stochastic depth, one for each image; None is the teacher's deterministic forward.
        masks: [B, V, N] bool, the patches of the first group that are not seen; None: all are.

    Returns:
        One for each group.
    """

    def views(group: Array, encoded: Encoded) -> Views:
        split = lambda x: x.reshape(*group.shape[:2], *x.shape[1:])  # [B * V, ...] -> [B, V, ...]
        fields = (encoded.image_z, encoded.region_z, encoded.patch_tokens, encoded.mil_weights, encoded.image_embedding)
        return Views(*map(split, fields))

    return tuple(map(views, groups, network.apply({"params": params}, groups, drop_keys, masks, method="encode")))


def prototypes_of(network: Network, params: Params) -> PrototypePair:
    """W of both levels."""
    return PrototypePair(*network.apply({"params": params}, method="prototype_rows"))


def gather(params: Params, shardings: Shardings | None) -> Params:
    """Parameters whole on every device, as the networks use them; their gradients are split as the state is."""
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


def on_devices(function: Callable[..., T], shardings: Shardings | None, dtype: str) -> Callable[..., T]:
    """A pass of the student's network over the images that each device holds.

    The gradient of a parameter is added up over all uses of it on a device first, those of both sizes of views, and then once
    over the devices. Left to the compiler, each product with the parameter would be a sum over devices of its own.

    Args:
        function: (parameters, arrays of images [B, ...] ...) -> arrays of images.
        shardings: None or of one device: the function as it is.
        dtype: of the sums over devices; products with operands of this dtype have no more digits.
    """
    if shardings is None or shardings.mesh.size == 1:
        return function
    mesh, images = shardings.mesh, PartitionSpec(DATA)

    @jax.custom_vjp
    def copies(param: Array) -> Array:  # [...] -> [devices, ...], one on each
        return jnp.broadcast_to(param, (mesh.size, *param.shape))

    def total(_: None, gradient: Array) -> tuple[Array]:
        return (jax.lax.reduce(gradient.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0,)).astype(gradient.dtype),)

    copies.defvjp(lambda param: (copies(param), None), total)
    own = lambda params, *arrays: function(jax.tree.map(lambda copy: copy[0], params), *arrays)
    mapped = jax.shard_map(own, mesh=mesh, in_specs=images, out_specs=images, check_vma=False)
    return lambda params, *arrays: mapped(jax.tree.map(copies, params), *arrays)


def make_teacher(
    config: ConfigDict, network: Network, shardings: Shardings | None = None
) -> Callable[[Params, Array], TeacherOutputs]:
    """Builds (teacher's parameters, global views [B, 2, H, W, 3]) -> TeacherOutputs."""
    teacher_network = with_dtype(network, jnp.dtype(config.model.teacher_dtype))

    def teacher(params: Params, images: Array) -> TeacherOutputs:
        params = gather(params, shardings)
        (views,) = encode_views(teacher_network, params, (images,), None)
        return TeacherOutputs(views, prototypes_of(network, params))

    return teacher


def make_views(
    config: ConfigDict, teacher: Callable[[Params, Array], TeacherOutputs]
) -> Callable[[Params, Batch, Array], tuple[Crops, TeacherOutputs]]:
    """Builds (teacher's parameters, batch, key) -> (views of all sizes, the teacher's outputs for the global ones)."""
    views = config.views
    patch_side = lambda view_px: token_px(config) / view_px

    def places(group: Placed) -> Places:
        return Places(group.box, group.flip, patch_side(group.pixels.shape[2]))

    def make(params: Params, batch: Batch, key: Array) -> tuple[Crops, TeacherOutputs]:
        crop = functools.partial(crop_views, key, *batch, views=views, normalization=config.data.normalization)
        global_views = crop(local=False)
        outputs = teacher(params, global_views.pixels)
        groups = (global_views,)
        if views.local_count:
            groups = (global_views, crop(local=True))
        by_location = config.method.region_matching == "location"
        return Crops(tuple(group.pixels for group in groups), tuple(map(places, groups)) if by_location else None), outputs

    return make


def make_bank_rows(
    config: ConfigDict, network: Network, shardings: Shardings | None = None
) -> Callable[[Params, Batch], Array] | None:
    """Builds (teacher's parameters, batch) -> rows of the bank [B, L, F]; None without L_N."""
    if not config.method.relation_weight:
        return None
    teacher = make_teacher(config, network, shardings)

    def rows(params: Params, batch: Batch) -> Array:
        looks = crop_looks(batch.canvas, batch.size, out=config.views.global_px, normalization=config.data.normalization)
        return scaled_pools(teacher(params, looks).views.image_embedding, network.pool_widths)

    return rows


def make_masks(config: ConfigDict) -> Callable[[Array], Array] | None:
    """Builds ([B] random keys, one for each image) -> [B, 2, N] bool, see `Crops`; None where the student sees all patches."""
    method = config.method
    if not method.intra_masked_weight:
        return None
    side = -(-config.views.global_px // token_px(config))
    return functools.partial(draw_masks, views=2, side=side, prob=method.mask_prob, share=method.mask_share)


def term_weights(config: ConfigDict) -> TermWeights:
    """The weights of the objective's terms in a resolved configuration."""
    return TermWeights(**{term: config.method[f"{term}_weight"] for term in TermWeights._fields})


def make_streaming(config: ConfigDict, shardings: Shardings | None = None) -> Streaming:
    """How the objective of a resolved configuration passes over the prototypes."""
    method = config.method
    mesh = shardings.mesh if shardings and shardings.mesh.size > 1 else None
    return Streaming(method.prototype_chunk, config.model.dtype, method.matched_targets, mesh)


def make_gradients(
    config: ConfigDict, network: Network, schedules: Schedules, shardings: Shardings | None = None
) -> Callable[[TrainState, Crops, TeacherOutputs, Array, Array], tuple[Params, Forward]]:
    """Builds (state, views, teacher outputs, keys of stochastic depth, indices) -> (gradients of the student, Forward).

    Keys and indices are [B], one for each image; the state's bank has the rows of the batch.
    """
    method = config.method
    network = network.clone(batch_axis=DATA) if shardings and shardings.mesh.size > 1 else network
    objective = functools.partial(
        cmd_objective,
        weights=term_weights(config),
        region_weights=method.region_weights,
        student_temp=method.student_temp,
        center_momentum=scaled_momentum(method.center_momentum, config),
        centering=method.centering,
        streaming=make_streaming(config, shardings),
    )
    relations = functools.partial(
        Relations,
        widths=network.pool_widths,
        teacher_temp=method.relation_teacher_temp,
        student_temp=method.relation_student_temp,
    )

    def encode(
        student: Params, groups: tuple[Array, ...], drop_keys: Array, masks: Array | None, of_teacher: Views
    ) -> tuple[tuple[Views, ...], Array]:
        """The student's views, and its MIL weights of the teacher's patches, [B, 2, N]."""
        views = encode_views(network, student, groups, drop_keys, masks)
        # L_T trains the scorer on the teacher's embeddings, and nothing else.
        inter_teacher_weights = of_teacher.mil_weights
        if method.mil_scorer not in UNLEARNED:
            features = jax.lax.stop_gradient(of_teacher.features)
            inter_teacher_weights = network.apply({"params": student}, features, method="score_patches")
        return views, inter_teacher_weights

    encode = on_devices(encode, shardings, config.model.dtype)

    def gradients(
        state: TrainState, crops: Crops, teacher: TeacherOutputs, drop_keys: Array, index: Array
    ) -> tuple[Params, Forward]:
        def loss_fn(student: Params) -> tuple[Array, Objective]:
            student = gather(student, shardings)
            views, inter_teacher_weights = encode(student, crops.groups, drop_keys, crops.masks, teacher.views)
            result = objective(
                views,
                prototypes_of(network, student),
                *teacher,
                inter_teacher_weights,
                state.centers,
                teacher_temp=schedules.teacher_temp(state.step),
                places=crops.places,
                masks=crops.masks,
                relations=relations(state.bank, index),
            )
            return result.loss, result

        of_student, result = jax.grad(loss_fn, has_aux=True)(state.student)
        return of_student, Forward(result.loss, result.terms, result.centers, teacher_health(result, teacher.views))

    def teacher_health(result: Objective, views: Views) -> Metrics:
        flat = lambda x: x.reshape(-1, x.shape[-1])  # [B, 2, ...] -> [B * 2, ...]
        return {
            "teacher_entropy": health.relative_entropy(result.teacher_entropy, config.head.prototypes),
            "marginal_entropy": health.relative_entropy(result.marginal_entropy, config.head.prototypes),
            "feature_std": health.feature_std(flat(views.image_embedding)),
            "mil_entropy": health.mil_entropy(flat(views.mil_weights)),
        }

    return gradients


def ema(teacher: Params, student: Params, momentum: Array, is_frozen: Callable[[str], bool] = lambda name: False) -> Params:
    """momentum * teacher + (1 - momentum) * student; a frozen parameter is left out, so that no rounding moves it."""

    def average(path: tuple, t: Array, s: Array) -> Array:
        return t if is_frozen(joined(path)) else momentum * t + (1.0 - momentum) * s

    return jax.tree.map_with_path(average, teacher, student)


def make_update(
    optimizer: optax.GradientTransformationExtraArgs,
    schedules: Schedules,
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> Callable[[TrainState, Params, Forward], tuple[TrainState, Metrics]]:
    """Builds (state, gradients, forward) -> (state after the step, metrics): AdamW, EMA and centers.

    A step whose loss or gradient is not finite leaves student, teacher, optimizer and centers as they are.
    """

    def update(state: TrainState, gradients: Params, forward: Forward) -> tuple[TrainState, Metrics]:
        grad_norm = optax.tree.norm(gradients)
        good = health.is_finite(forward.loss, grad_norm)
        learning_rate, weight_decay = schedules.learning_rate(state.step), schedules.weight_decay(state.step)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.student, learning_rate=learning_rate, weight_decay=weight_decay, active=good
        )
        # The EMA reads the new parameters alone, so that they are written in place of the old ones.
        student = jax.lax.optimization_barrier(optax.apply_updates(state.student, updates))
        momentum = schedules.teacher_momentum(state.step)
        choose = lambda new, old: jnp.where(good, new, old)  # no product with 0: that of NaN is NaN
        teacher = jax.tree.map(choose, ema(state.teacher, student, momentum, is_frozen), state.teacher)
        centers = jax.tree.map(choose, forward.centers, state.centers)
        bad_steps = health.count_bad(state.bad_steps, good)
        metrics = {
            "loss": forward.loss,
            **{f"loss_{name}": value for name, value in forward.terms.items()},
            "grad_norm": grad_norm,
            **forward.health,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temp": schedules.teacher_temp(state.step),
            "bad_steps": bad_steps.total,
            "bad_steps_in_row": bad_steps.in_row,
        }
        new = TrainState(state.step + 1, student, teacher, optimizer_state, centers, bad_steps, state.bank)
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return update


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
    what looks across images (L_N, KoLeo, batch statistics in the heads, Sinkhorn), which sees a part at a time.
    """
    make_crops, masks = make_views(config, make_teacher(config, network, shardings)), make_masks(config)
    bank_rows = make_bank_rows(config, network, shardings)
    gradients = make_gradients(config, network, schedules, shardings)
    update = make_update(optimizer, schedules, frozen_parameters(config))
    parts = config.train.accumulate
    # The rows of all devices are gathered: by themselves they would be added up as a whole bank from each.
    whole = lambda x: jax.lax.with_sharding_constraint(x, shardings.replicated) if shardings else x

    def write(state: TrainState, index: Array, rows: Array | None) -> TrainState:
        return state if rows is None else state._replace(bank=write_rows(state.bank, whole(index), whole(rows)))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def forward(batch: Batch) -> tuple[tuple[Params, Forward], Array | None]:
            crops, teacher = make_crops(state.teacher, batch, jax.random.fold_in(key, 0))
            keys = lambda number: jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, number)))(batch.index)
            crops = crops._replace(masks=masks and masks(keys(2)))
            rows = bank_rows and bank_rows(state.teacher, batch)
            return gradients(write(state, batch.index, rows), crops, teacher, keys(1), batch.index), rows

        if parts == 1:
            result, rows = forward(batch)
        else:
            # Part p takes the images p, p + parts, ...: a slice of what each device holds, so that nothing moves.
            split = lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
            batches = jax.tree.map(split, batch)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(forward, jax.tree.map(lambda x: x[0], batches))[0])

            def add(total: tuple[Params, Forward], part: Batch) -> tuple[tuple[Params, Forward], Array | None]:
                of_part, rows = forward(part)
                return jax.tree.map(lambda a, b: a + b / parts, total, of_part), rows

            result, rows = jax.lax.scan(add, zeros, batches)
            rows = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), rows)
        new, metrics = update(state, *result)
        return write(new, batch.index, rows), metrics

    return train_step
