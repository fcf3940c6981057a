"""The objective against DINO's, EsViT's and the released code's losses, and against the paper's equations in float64.

The references' losses take logits. With the identity as prototypes, bottlenecks are the logits themselves, so their inputs
go through `method.objective` as it is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.method import released
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.logits import student_logits, teacher_logits
from cmd_jax.method.objective import Objective, cmd_objective
from cmd_jax.method.regions import match_by_similarity
from cmd_jax.method.types import Centers, PrototypePair, TermWeights, Views
from cmd_jax.training.schedules import epoch_linear
from tests.parity.fixture import CENTER, EXACT, GRADIENT, LOSS, SCHEDULE, Fixture, compiled

Array = jax.Array
DINO = TermWeights(1.0, 0.0, 0.0, 0.0)
ESVIT = TermWeights(0.5, 0.5, 0.0, 0.0)
RELEASED = TermWeights(0.5, 0.5, 0.0, 0.0, 1.0)


class Problem(NamedTuple):
    """What the objective takes of a fixture."""

    student: tuple[Views, ...]
    teacher: Views
    prototypes: PrototypePair
    meta: dict

    def program(self, weights: TermWeights, masked: bool = True) -> Callable[[Centers, float], tuple[Objective, tuple]]:
        """Takes centers and the teacher's temperature; the objective's result, and its gradient for the student's views.

        Unmasked as PyTorch from 1.13 on has the term.
        """

        @compiled
        @functools.partial(jax.grad, has_aux=True)
        def gradient_of(student: tuple[Views, ...], centers: Centers, temp: float) -> tuple[Array, Objective]:
            result = cmd_objective(
                student,
                self.prototypes,
                self.teacher,
                self.prototypes,
                self.teacher.mil_weights,
                centers,
                weights=weights,
                region_weights="uniform",
                student_temp=self.meta["student_temp"],
                teacher_temp=temp,
                center_momentum=self.meta["center_momentum"],
                streaming=Streaming(self.prototypes.image.shape[0]),
            )
            return result.loss, result

        divergence = released.divergence if masked else unmasked_divergence

        def loss(centers: Centers, temp: float) -> tuple[Objective, tuple]:
            with mock.patch.object(released, "divergence", divergence):
                gradient, result = gradient_of(self.student, centers, temp)
            return result, gradient

        return loss


def unmasked_divergence(inputs: Array, targets: Array) -> Array:
    """`released.divergence` with t (log t - a) as it is where t is not positive."""
    return jnp.mean(targets * (jnp.log(targets) - inputs), axis=(0, 2))


def batch_major(rows: np.ndarray, crops: int, images: int) -> np.ndarray:
    """The references' rows [crop * image, ...] -> [B, V, ...]."""
    return np.moveaxis(rows.reshape(crops, images, *rows.shape[1:]), 0, 1)


def crop_major(groups: list[Array]) -> np.ndarray:
    """[B, V, (N,) C] of every group -> the references' rows, crop, image, patch."""
    return np.concatenate([np.moveaxis(np.asarray(group), 0, 1).reshape(-1, group.shape[-1]) for group in groups])


def teacher_temp(meta: dict, epoch: int) -> float:
    """tau_t of an epoch, in float64."""
    schedule = epoch_linear(
        meta["warmup_teacher_temp"], meta["teacher_temp"], meta["warmup_teacher_temp_epochs"], steps_per_epoch=1
    )
    with jax.enable_x64(True):
        return float(schedule(jnp.asarray(epoch)))


def check_dino(fixture: Fixture) -> None:
    """Loss, gradient and center at every epoch, and two calls in a row."""
    meta = fixture.meta
    images, crops, prototypes = meta["batch"], meta["ncrops"], meta["out_dim"]

    def views(rows: np.ndarray) -> Views:
        nothing = np.ones((*rows.shape[:2], 1, 1), np.float32)
        return Views(rows, nothing, nothing, nothing[..., 0])

    rows = batch_major(fixture["in_student"], crops, images)
    student = tuple(views(part) for part in (rows[:, :2], rows[:, 2:]) if part.shape[1])
    teacher = views(batch_major(fixture["in_teacher"], 2, images))
    eye = jnp.eye(prototypes)
    problem = Problem(student, teacher, PrototypePair(eye, eye), meta)
    loss, start = problem.program(DINO), jnp.asarray(fixture["in_center"][0])
    for epoch in meta["epochs_evaluated"]:
        temp = teacher_temp(meta, epoch)
        result, gradient = loss(Centers(start, start), temp)
        fixture.check(f"out_epoch{epoch}_teacher_temp", np.array(temp), SCHEDULE)
        fixture.check(f"out_epoch{epoch}_loss", result.loss, LOSS)
        fixture.check(f"out_epoch{epoch}_grad_student", crop_major([group.image_z for group in gradient]), GRADIENT)
        fixture.check(f"out_epoch{epoch}_new_center", result.centers.image[None], CENTER)
    centers = Centers(jnp.zeros(prototypes), jnp.zeros(prototypes))
    calls = fixture.find(r"out_seq_loss(\d+)") or ["0", "1"]
    for call in calls:
        result, _ = loss(centers, teacher_temp(meta, meta["epochs_evaluated"][-1]))
        centers = result.centers
        fixture.check(f"out_seq_loss{call}", result.loss, LOSS)
        fixture.check(f"out_seq_center{call}", centers.image[None], CENTER)


def _region_problem(fixture: Fixture, student_region: str) -> Problem:
    """Views of EsViT's loss; the first two crops have npatch[0] patches each, the others npatch[1]."""
    meta = fixture.meta
    images, crops, patches = meta["batch"], meta["ncrops"], meta["npatch"]

    def views(image: str, region: str, feature: str, crops: int) -> tuple[Views, ...]:
        groups, split = [], 2 * images * patches[0]
        image_rows = batch_major(fixture[image], crops, images)
        for first, count, n, rows in ((0, 2, patches[0], slice(0, split)), (2, crops - 2, patches[-1], slice(split, None))):
            if count:
                per_patch = [
                    batch_major(fixture[key][rows].reshape(count * images, n, -1), count, images) for key in (region, feature)
                ]
                weights = np.full((images, count, n), 1 / n, np.float32)
                groups.append(Views(image_rows[:, first : first + count], *per_patch, weights))
        return tuple(groups)

    eye = jnp.eye(meta["out_dim"])
    student = views("in_s_cls", student_region, "in_s_feat", crops)
    teacher = views("in_t_cls", "in_t_region", "in_t_feat", 2)
    return Problem(student, teacher[0], PrototypePair(eye, eye), meta)


def _centers(fixture: Fixture) -> Centers:
    return Centers(jnp.asarray(fixture["in_center"][0]), jnp.asarray(fixture["in_center_grid"][0]))


def _check_common(fixture: Fixture, prefix: str, result: Objective) -> None:
    """What EsViT's loss and the released one share."""
    fixture.check(f"{prefix}_part_view", 0.5 * result.terms["intra_image"], LOSS)
    fixture.check(f"{prefix}_part_region", 0.5 * result.terms["intra_region"], LOSS)
    fixture.check(f"{prefix}_new_center", result.centers.image[None], CENTER)
    fixture.check(f"{prefix}_new_center_grid", result.centers.region[None], CENTER)


def _check_gradient(fixture: Fixture, prefix: str, gradient: tuple) -> None:
    fixture.check(f"{prefix}_grad_s_cls", crop_major([group.image_z for group in gradient]), GRADIENT)
    fixture.check(f"{prefix}_grad_s_region", crop_major([group.region_z for group in gradient]), GRADIENT)


def check_esvit(fixture: Fixture) -> None:
    """Both parts, gradients, centers at every epoch, and the matching of regions."""
    problem = _region_problem(fixture, "in_s_region")
    loss = problem.program(ESVIT)
    for epoch in fixture.meta["epochs_evaluated"]:
        result, gradient = loss(_centers(fixture), teacher_temp(fixture.meta, epoch))
        fixture.check(f"out_epoch{epoch}_loss", result.loss, LOSS)
        _check_common(fixture, f"out_epoch{epoch}", result)
        _check_gradient(fixture, f"out_epoch{epoch}", gradient)
    for q in range(2):
        for v in range(fixture.meta["ncrops"]):
            if v != q:
                group, row = (problem.student[0], v) if v < 2 else (problem.student[1], v - 2)
                match = match_by_similarity(group.features[:, [row]], problem.teacher.features[:, [q]])
                fixture.check(f"out_match_t{q}_s{v}", match[:, 0, 0], EXACT)


def check_released(fixture: Fixture) -> None:
    """The released loss where it is finite, as PyTorch from 1.13 on and up to 1.12 has it where it is not, and masked."""
    temp = teacher_temp(fixture.meta, fixture.meta["epoch"])
    for case in fixture.find(r"in_(\w+)_s_region") or ["finite", "mixed"]:
        problem = _region_problem(fixture, f"in_{case}_s_region")
        bags_of = compiled(lambda region_z, rows: released.student_bags(region_z, rows, fixture.meta["student_temp"]))
        bags = [bags_of(group.region_z, problem.prototypes.region) for group in problem.student]
        stacked = np.concatenate([np.moveaxis(np.asarray(bag), 0, 1) for bag in bags])  # [V, B, K]
        fixture.check(f"out_{case}_s_region_mil", stacked, LOSS)
        result, gradient = problem.program(RELEASED)(_centers(fixture), temp)
        if np.all(stacked > 0):
            _check_released(fixture, f"out_{case}", problem, temp, result, gradient, masked=True)
            continue
        _check_released(fixture, f"out_{case}_masked", problem, temp, result, gradient, masked=True)
        # Up to 1.12 the value is the masked one; only the region gradient of a negative bag is NaN.
        negative = [bag < 0 for bag in bags]
        _check_released(fixture, f"out_{case}_legacy", problem, temp, result, _poisoned(gradient, negative), masked=True)
        # From 1.13 on the value is NaN too, and the gradient for the image logits counts negative bags.
        result, unmasked = problem.program(RELEASED, masked=False)(_centers(fixture), temp)
        of_image = tuple(group._replace(image_z=other.image_z) for group, other in zip(gradient, unmasked, strict=True))
        not_positive = [bag <= 0 for bag in bags]
        poisoned = _poisoned(of_image, not_positive)
        _check_released(fixture, f"out_{case}_torch213", problem, temp, result, poisoned, masked=False)


def _poisoned(gradient: tuple[Views, ...], where: list[Array]) -> tuple[Views, ...]:
    """The gradient with NaN at the region logits whose bags [B, V, K] are marked.

    Set by hand: on its way through the prototypes to z a single NaN would spread over all K.
    """
    return tuple(
        group._replace(region_z=jnp.where(marked[:, :, None], jnp.nan, group.region_z))
        for group, marked in zip(gradient, where, strict=True)
    )


def _check_released(
    fixture: Fixture, prefix: str, problem: Problem, temp: float, result: Objective, gradient: tuple, masked: bool
) -> None:
    centers, eye = _centers(fixture), problem.prototypes
    divergence = released.divergence if masked else unmasked_divergence

    @compiled
    def of_teacher(teacher: Views, eye: PrototypePair, centers: Centers) -> Array:
        probs = jax.nn.softmax(teacher_logits(teacher.image_z, eye.image, centers.image, temp), axis=-1)
        bags = released.teacher_bags(teacher.region_z, eye.region, centers.region, temp, chunk=eye.region.shape[0])
        return released.divergence(probs, bags)

    @compiled
    def of_student(group: Views, eye: PrototypePair) -> Array:
        logits = student_logits(group.image_z, eye.image, fixture.meta["student_temp"])
        return divergence(logits, released.student_bags(group.region_z, eye.region, fixture.meta["student_temp"]))

    fixture.check(f"{prefix}_loss", result.loss, LOSS)
    fixture.check(f"{prefix}_part_md", result.terms["released"], LOSS)
    fixture.check(f"{prefix}_md_teacher_terms", of_teacher(problem.teacher, eye, centers), LOSS)
    student_terms = [of_student(group, eye) for group in problem.student]
    fixture.check(f"{prefix}_md_student_terms", np.concatenate(student_terms), LOSS)
    _check_common(fixture, prefix, result)
    _check_gradient(fixture, prefix, gradient)


def check_paper(fixture: Fixture) -> None:
    """Every term, the loss, all gradients and the centers of the variant "paper"."""
    local = int(fixture["n_local"])
    names = ("image_z", "region_z", "features", "mil_weights")

    def views(who: str, numbers: range) -> Views:
        return Views(*(jnp.stack([fixture[f"{who}_{name}_{v}"] for v in numbers], axis=1) for name in names))

    def pair(kind: str) -> tuple[Array, Array]:
        return tuple(jnp.asarray(fixture[kind.format(level)]) for level in ("image", "region"))

    student = (views("student", range(2)),) + ((views("student", range(2, 2 + local)),) if local else ())
    teacher = views("teacher", range(2))
    prototypes = PrototypePair(*pair("student_{}_prototypes"))
    inter = float(fixture["inter_weight"])

    def objective(
        student: tuple[Views, ...], prototypes: PrototypePair, a_t: Array, region_weights: str = "teacher_mil"
    ) -> tuple[Array, Objective]:
        result = cmd_objective(
            student,
            prototypes,
            teacher,
            PrototypePair(*pair("teacher_{}_prototypes")),
            a_t,
            Centers(*pair("{}_center")),
            weights=TermWeights(0.5, 0.5, inter, inter),
            region_weights=region_weights,
            student_temp=float(fixture["student_temp"]),
            teacher_temp=float(fixture["teacher_temp"]),
            center_momentum=float(fixture["center_momentum"]),
            streaming=Streaming(prototypes.image.shape[0]),
        )
        return result.loss, result

    gradients_of = compiled(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
    gradients, result = gradients_of(student, prototypes, teacher.mil_weights)
    fixture.check("loss", result.loss, LOSS)
    for name, term in result.terms.items():
        fixture.check(f"term_{name}", term, LOSS)
    _, uniform = compiled(functools.partial(objective, region_weights="uniform"))(student, prototypes, teacher.mil_weights)
    fixture.check("term_intra_region_uniform", uniform.terms["intra_region"], LOSS)
    for level, center in result.centers._asdict().items():
        fixture.check(f"new_{level}_center", center, CENTER)
    for level, gradient in gradients[1]._asdict().items():
        fixture.check(f"grad_student_{level}_prototypes", gradient, GRADIENT)
    for v in range(2 + local):
        group, row = (gradients[0][0], v) if v < 2 else (gradients[0][1], v - 2)
        for name in ("image_z", "region_z", "mil_weights"):
            fixture.check(f"grad_student_{name}_{v}", getattr(group, name)[:, row], GRADIENT)
    for q in range(2):
        fixture.check(f"grad_teacher_mil_weights_{q}", gradients[2][:, q], GRADIENT)
