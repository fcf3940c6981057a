"""The cross-level term that the authors' released code computes (BiQiWHU/CMD, commit 1fae3df7), kept for reproduction.

To EsViT's loss the released code adds, with weight 1,

    L_md = 1/n sum over the n pairs (q, v != q) of D(P_t[q], T_bag[q]) + D(Z_s[v], S_bag[v]),
    D(a, t) = mean over the B * K elements of t (log t - a)

where log-probabilities belong in the place of a and probabilities in the place of t, but P_t are the teacher's image-level
*probabilities*, T_bag the *sum* over patches of its region probabilities (rows sum to N), Z_s the student's image *logits* and
S_bag the sum over patches of its region *logits*, of any sign. The teacher's part is a constant; there are no MIL weights.

Where t < 0 PyTorch up to 1.12 gives the value 0 with the gradient NaN, and from 1.13 on the value is NaN: as released the
code cannot train. `divergence` gives 0 there with the gradient 0, so its value is that of PyTorch 1.12.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cmd_jax.method.chunks import Normalizer, Streaming, for_chunks, take_chunk
from cmd_jax.method.logits import student_logits, teacher_logits
from cmd_jax.method.types import Pairing, PrototypePair, StudentViews, TeacherViews

Array = jax.Array


def divergence(inputs: Array, targets: Array) -> Array:
    """D(a, t): PyTorch's `kl_div` of reduction "mean", over all axes but the second.

    Args:
        inputs: [B, V, K], a.
        targets: [B, V, K], t; elements with t <= 0 count 0, in the value and in both gradients.

    Returns:
        [V] float32.
    """
    positive = targets > 0
    # The inner where keeps the logarithm's infinite slope out of the gradient of what the outer one drops.
    inputs, targets = jnp.where(positive, inputs, 0.0), jnp.where(positive, targets, 1.0)
    return jnp.mean(jnp.where(positive, targets * (jnp.log(targets) - inputs), 0.0), axis=(0, 2))


def student_bags(region_z: Array, prototypes: Array, temp: float, dtype: str = "float32") -> Array:
    """S_bag, the sum over patches of region logits: [B, V, N, d], [K, d] -> [B, V, K] logits (linear, so z is summed)."""
    return student_logits(jnp.sum(region_z, axis=2), prototypes, temp, dtype)


def teacher_bags(z: Array, prototypes: Array, center: Array, temp: Array | float, chunk: int, dtype: str = "float32") -> Array:
    """T_bag = sum_i softmax_k((W z_i - center) / temp): [B, Q, M, d] -> [B, Q, K] float32, rows sum to M; no gradient."""
    count = prototypes.shape[0]

    def logits(start: Array | int, size: int) -> Array:
        return teacher_logits(z, take_chunk(prototypes, start, size), take_chunk(center, start, size), temp, dtype)

    states = for_chunks(
        count, chunk, lambda s, start, size: s.add(logits(start, size)), Normalizer.start(z.shape[:-1], jnp.float32)
    )
    normalizer = states.finish()[..., None]

    def add(bags: Array, start: Array | int, size: int) -> Array:
        part = jnp.sum(jnp.exp(logits(start, size) - normalizer), axis=2)
        return lax.dynamic_update_slice_in_dim(bags, part, start, axis=-1)

    return for_chunks(count, chunk, add, jnp.zeros((*z.shape[:2], count), jnp.float32))


def term(
    student: tuple[StudentViews, ...],
    prototypes: PrototypePair,
    teacher: TeacherViews,
    pairings: tuple[Pairing, ...],
    temp: float,
    streaming: Streaming,
) -> Array:
    """L_md of a batch, [] float32; arguments of `streamed.streamed_terms`."""
    total = jnp.zeros((), jnp.float32)
    for group, pairing in zip(student, pairings, strict=True):
        logits = student_logits(group.image_z, prototypes.image, temp, streaming.dtype)
        bags = student_bags(group.region_z, prototypes.region, temp, streaming.dtype)
        total += jnp.sum(pairing.image_weights * divergence(logits, bags))
    image, region = zip(teacher[:2], teacher.prototypes, teacher.centers, strict=True)  # z, W and center of a level
    image_logits = teacher_logits(*image, teacher.temp, streaming.dtype)
    bags = teacher_bags(*region, teacher.temp, streaming.chunk, streaming.dtype)
    # every teacher view stands in the same number of pairs
    return total + jnp.mean(divergence(jax.nn.softmax(image_logits, axis=-1), bags))
