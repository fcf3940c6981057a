"""Loops over chunks of the K prototypes, with a running log-sum-exp."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from cmd_jax.method.products import operand

Array = jax.Array
Carry = TypeVar("Carry")

Targets = Literal["expected", "gathered"]
DATA = "data"  # the axis of a mesh: images of a batch


class Streaming(NamedTuple):
    """How the objective passes over K.

    Attributes:
        chunk: prototypes in a chunk (`chunk_size.default_chunk`).
        dtype: of the products' operands, "float32" or "bfloat16"; sums, softmax and log-sum-exp are float32 in any case.
        targets: how L_R gets its matched targets. "expected" sums up M of every teacher patch and matches those d-vectors: two
            products more for the teacher, no gather of K-vectors, which suits TPUs and GPUs. "gathered" matches the teacher's
            probabilities inside a chunk, which CPUs read from their cache.
        mesh: over whose axis DATA the images are split; None: one device.
    """

    chunk: int
    dtype: str = "float32"
    targets: Targets = "expected"
    mesh: jax.sharding.Mesh | None = None

    @property
    def devices(self) -> int:
        """Devices that share the images of a batch."""
        return self.mesh.shape[DATA] if self.mesh else 1

    def total(self, sums: Any) -> Any:
        """Sums over all devices, inside of `on_mesh`."""
        return lax.psum(sums, DATA) if self.devices > 1 else sums

    def total_gradients(self, gradients: Any) -> Any:
        """The same for gradients, sent in `dtype`."""
        if self.devices == 1:
            return gradients
        sums = self.total(jax.tree.map(lambda gradient: operand(gradient, self.dtype), gradients))
        return jax.tree.map(lambda total, gradient: total.astype(gradient.dtype), sums, gradients)

    def on_mesh(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function on the parts that each device holds; without a mesh the function itself."""
        if not self.mesh:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def for_chunks(count: int, chunk: int, body: Callable[[Carry, Array | int, int], Carry], carry: Carry) -> Carry:
    """carry = body(carry, start, size) for the chunks of 0..count in order; the last may be smaller.

    A single chunk is no loop: the compiler then shares what several passes over it compute.

    Args:
        count: K.
        chunk: size of all chunks but the last.
        body: `size` is a Python integer, `start` may be traced.
        carry: updated in place where the body uses `put_chunk`.
    """
    size = min(chunk, count)
    whole, rest = divmod(count, size)
    step = lambda i, carry: body(carry, i * size, size)
    carry = step(0, carry) if whole == 1 else lax.fori_loop(0, whole, step, carry)
    return body(carry, whole * size, rest) if rest else carry


def take_chunk(x: Array, start: Array | int, size: int) -> Array:
    """x[start : start + size] along the first axis."""
    return lax.dynamic_slice_in_dim(x, start, size)


def put_chunk(x: Array, part: Array, start: Array | int) -> Array:
    """x with x[start : start + len(part)] = part along the first axis."""
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, 0)


class Normalizer(NamedTuple):
    """Running log-sum-exp of the last axis: the largest value so far, and the sum of exponentials relative to it."""

    largest: Array
    total: Array

    @classmethod
    def start(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "Normalizer":
        return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))

    def add(self, logits: Array) -> "Normalizer":
        """Counts in finite logits [..., chunk]."""
        largest = jnp.maximum(self.largest, jnp.max(logits, axis=-1))
        added = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        return Normalizer(largest, self.total * jnp.exp(self.largest - largest) + added)

    def finish(self) -> Array:
        """log-sum-exp [...]."""
        return self.largest + jnp.log(self.total)
