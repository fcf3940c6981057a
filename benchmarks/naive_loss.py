"""The objective's terms with every [B, V, N, K] tensor stored: the oracle of the streamed forms, and what they replace.

Gradients come from autodiff. Everything is computed in the dtype of its inputs.
"""

import jax
import jax.numpy as jnp

from cmd_jax.method.rows import Pairing, PrototypePair, StudentRows, TeacherRows


def naive_terms(
    student: tuple[StudentRows, ...],
    prototypes: PrototypePair,
    inter_teacher_weights: jax.Array,
    teacher: TeacherRows,
    pairings: tuple[Pairing, ...],
    student_temp: float,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """The four terms, and the entropies of the teacher's distributions and of their mean.

    Arguments are those of `prototypes.distil`.
    """
    times = lambda z, rows: jnp.einsum("...d,kd->...k", z, rows, precision="highest")
    image_probs, region_probs = (
        jax.lax.stop_gradient(jax.nn.softmax((times(z, rows) - center) / teacher.temp, axis=-1))
        for z, rows, center in zip((teacher.image_z, teacher.region_z), teacher.prototypes, teacher.centers, strict=True)
    )
    divergence = lambda bag, probs: jnp.sum(bag * (jnp.log(bag) - jnp.log(probs)), axis=-1)
    terms = dict.fromkeys(("intra_image", "intra_region", "inter_student", "inter_teacher"), 0.0)
    batch = image_probs.shape[0]
    for group, pairing in zip(student, pairings, strict=True):
        image_log_probs = jax.nn.log_softmax(times(group.image_z, prototypes.image) / student_temp, axis=-1)
        region_log_probs = jax.nn.log_softmax(times(group.region_z, prototypes.region) / student_temp, axis=-1)
        bag = jnp.sum(group.mil_weights[..., None] * jnp.exp(region_log_probs), axis=2)  # [B, V, K]
        of_bag = divergence(bag, jnp.exp(image_log_probs))
        for q in range(image_probs.shape[1]):
            for v in range(group.image_z.shape[1]):
                weight = pairing.image_weights[q, v] / batch
                terms["intra_image"] -= weight * jnp.sum(image_probs[:, q] * image_log_probs[:, v])
                targets = jnp.take_along_axis(region_probs[:, q], pairing.match[:, q, v, :, None], axis=1)  # [B, N, K]
                ce = -jnp.sum(targets * region_log_probs[:, v], axis=-1)
                terms["intra_region"] += jnp.sum(pairing.region_weights[:, q, v] * ce) / batch
                terms["inter_student"] += weight * jnp.sum(of_bag[:, v])
    mixture = jnp.sum(inter_teacher_weights[..., None] * region_probs, axis=2)
    terms["inter_teacher"] = jnp.mean(divergence(mixture, image_probs))
    entropy = lambda probs: -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
    return terms, (entropy(image_probs), entropy(jnp.mean(image_probs, axis=(0, 1))))
