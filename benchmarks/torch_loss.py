"""The objective of CMD in PyTorch as the field writes it: every patch's K logits in memory (docs/method.md, "paper").

The loops over pairs of views, the gathered K-vectors and the log-softmax inside the loop are those of DINO
(arXiv 2104.14294) and EsViT (arXiv 2106.09785). Letters: B images, V student views, N_v patches of view v, D backbone
width, d bottleneck width, K prototypes, T = sum_v B * N_v. Views are crop-major, the two global ones first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # as everybody calls it
from torch import Tensor


class Encoded(NamedTuple):
    """What the loss reads of a network's views; method "dino" has the first alone.

    Attributes:
        image_z: [V * B, d], unit norm.
        region_z: [T, d], unit norm, the patches of one view after those of another.
        features: V tensors [B, N_v, D], compared by cosine to match regions.
        mil_weights: V tensors [B, N_v], sum to 1 over N_v.
    """

    image_z: Tensor
    region_z: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    mil_weights: tuple[Tensor, ...] = ()


class Levels(NamedTuple):
    """A pair of the image and the region level: prototype rows [K, d], or centers [K]."""

    image: Tensor
    region: Tensor | None = None


class TermWeights(NamedTuple):
    """Weights of L_I, L_R, L_S and L_T; a term of weight 0 is not computed."""

    intra_image: float
    intra_region: float = 0.0
    inter_student: float = 0.0
    inter_teacher: float = 0.0


METHODS = {"dino": TermWeights(1.0), "cmd": TermWeights(0.5, 0.5, 1.0, 1.0)}


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)  # what autocast does on a GPU, on the CPU too


def _softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.float32)


@torch.no_grad()
def _teach(z: Tensor, prototypes: Tensor, center: Tensor, temp: float, momentum: float) -> tuple[Tensor, Tensor]:
    """The teacher's [..., K] scaled logits of z [..., d] and the center after this batch."""
    logits = F.linear(z, prototypes)
    batch_center = logits.mean(dim=0, dtype=torch.float32)
    return (logits - center) / temp, center * momentum + batch_center * (1.0 - momentum)


def _matched(student: Tensor, teacher: Tensor) -> Tensor:
    """[B, N] index of the teacher patch most similar to each student patch: [B, N, D], [B, M, D] features."""
    with torch.no_grad():
        return (F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2)).argmax(dim=2)


def _region_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, match: Tensor, teacher_mil: Tensor) -> Tensor:
    """L_R of one pair of views, batch mean: [B, N, K] logits, [B, M, K] probabilities, [B, N] matches, [B, M] weights."""
    indexed = torch.gather(teacher_probs, 1, match.unsqueeze(2).expand(-1, -1, teacher_probs.shape[2]))
    ce = -torch.sum(indexed * _log_softmax(student_logits), dim=-1)  # [B, N]
    weights = torch.gather(teacher_mil, 1, match).detach()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * ce).sum(dim=1).mean()


def _mixture_divergence(mil_weights: Tensor, region_probs: Tensor, image_log_probs: Tensor) -> Tensor:
    """KL( sum_i a_i p_reg_i || p_img ), [B]: [B, N] weights, [B, N, K] probabilities, [B, K] log-probabilities."""
    with torch.autocast(region_probs.device.type, enabled=False):  # a mixture in bfloat16 would be too coarse for its log
        mixture = torch.einsum("bn,bnk->bk", mil_weights.float(), region_probs)
    mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny)  # a prototype no patch uses
    return torch.sum(mixture * (mixture.log() - image_log_probs), dim=-1)


def cmd_loss(
    student: Encoded,
    student_prototypes: Levels,
    teacher: Encoded,
    teacher_prototypes: Levels,
    inter_teacher_weights: tuple[Tensor, ...],
    centers: Levels,
    *,
    weights: TermWeights,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    center_momentum: float = 0.9,
) -> tuple[Tensor, dict[str, Tensor], Levels]:
    """The loss of a batch, its unweighted terms by name and the centers after it.

    Args:
        student: V views.
        student_prototypes: rows of the student.
        teacher: the two global views, computed without gradient.
        teacher_prototypes: rows of the teacher.
        inter_teacher_weights: two [B, N], the student's scorer on the teacher's features: through it alone L_T trains.
        centers: of the teacher's logits before the step.
        weights: of the terms; with L_I alone nothing of the region level is read.
        student_temp: tau_s.
        teacher_temp: tau_t.
        center_momentum: of the centers' moving average.
    """
    batch = teacher.image_z.shape[0] // 2
    views = student.image_z.shape[0] // batch
    pairs = [(q, v) for q in range(2) for v in range(views) if v != q]

    terms, image_center = {}, centers.image
    if weights.intra_image or weights.inter_teacher:
        scaled, image_center = _teach(teacher.image_z, teacher_prototypes.image, centers.image, teacher_temp, center_momentum)
        teacher_image_log_probs = _log_softmax(scaled).chunk(2)  # [B, K] of each view
    if weights.intra_image or weights.inter_student:
        student_image_logits = (F.linear(student.image_z, student_prototypes.image) / student_temp).chunk(views)
    if weights.intra_image:
        teacher_image_probs = _softmax(scaled).chunk(2)
        intra_image = 0.0
        for q, v in pairs:
            ce = -torch.sum(teacher_image_probs[q] * _log_softmax(student_image_logits[v]), dim=-1)
            intra_image = intra_image + ce.mean() / len(pairs)
        terms["intra_image"] = intra_image
    if not any(weights[1:]):
        return weights.intra_image * intra_image, terms, Levels(image_center, centers.region)

    scaled, region_center = _teach(teacher.region_z, teacher_prototypes.region, centers.region, teacher_temp, center_momentum)
    # [2 * B * N, K] -> [B, N, K] of each view
    teacher_region_probs = [probs.unflatten(0, (batch, -1)) for probs in _softmax(scaled).chunk(2)]
    del scaled
    sizes = [batch * features.shape[1] for features in student.features]
    if weights.intra_region or weights.inter_student:
        student_region_logits = F.linear(student.region_z, student_prototypes.region) / student_temp
        # [T, K] -> [B, N_v, K] of each view
        student_region_logits = [logits.unflatten(0, (batch, -1)) for logits in student_region_logits.split(sizes)]
    if weights.intra_region:
        intra_region = 0.0
        for q, v in pairs:
            match = _matched(student.features[v], teacher.features[q])
            ce = _region_cross_entropy(student_region_logits[v], teacher_region_probs[q], match, teacher.mil_weights[q])
            intra_region = intra_region + ce / len(pairs)
        terms["intra_region"] = intra_region
    if weights.inter_student:
        inter_student = 0.0
        for v in range(views):
            divergence = _mixture_divergence(
                student.mil_weights[v], _softmax(student_region_logits[v]), _log_softmax(student_image_logits[v])
            )
            times = 1 if v < 2 else 2  # a global view stands in one pair, a local view in two
            inter_student = inter_student + times * divergence.mean() / len(pairs)
        terms["inter_student"] = inter_student
    if weights.inter_teacher:
        inter_teacher = 0.0
        for q in range(2):
            divergence = _mixture_divergence(inter_teacher_weights[q], teacher_region_probs[q], teacher_image_log_probs[q])
            inter_teacher = inter_teacher + divergence.mean() / 2
        terms["inter_teacher"] = inter_teacher
    loss = sum(weight * terms[name] for name, weight in weights._asdict().items() if weight)
    return loss, terms, Levels(image_center, region_center)
