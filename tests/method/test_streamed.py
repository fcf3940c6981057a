"""The streamed objective against tensors that hold every logit: values, all gradients, any chunk, split over devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmd_jax.method.chunk_size import default_chunk
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.logits import teacher_logits
from cmd_jax.method.objective import plain_terms
from cmd_jax.method.released import teacher_bags
from cmd_jax.method.streamed import streamed_terms
from cmd_jax.method.types import Centers, Pairing, PrototypePair, StudentViews, TeacherViews, TermWeights
from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]
CMD = TermWeights(0.5, 0.5, 1.0, 1.0)


def problem(seed, images=2, groups=((2, 4), (3, 2)), patches=4, width=6, prototypes=17, gain=1.0, temp=0.04, dtype=np.float32):
    """Random arguments of `streamed_terms`; `gain` scales the prototypes' rows, as a learned gain does."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)

    def weights(*shape):
        x = np.exp(rng.normal(size=shape))
        return (x / x.sum(-1, keepdims=True)).astype(dtype)

    pair = lambda scale: PrototypePair(*(scale * unit(prototypes, width) for _ in range(2)))
    student = tuple(
        StudentViews(unit(images, views, width), unit(images, views, n, width), weights(images, views, n))
        for views, n in groups
    )
    pairings = tuple(
        Pairing(
            rng.random((2, views)).astype(dtype),
            rng.integers(0, patches, (images, 2, views, n), dtype=np.int32),
            rng.random((images, 2, views, n)).astype(dtype),
        )
        for views, n in groups
    )
    centers = Centers(*(rng.normal(size=prototypes).astype(dtype) * 0.1 for _ in range(2)))
    teacher = TeacherViews(unit(images, 2, width), unit(images, 2, patches, width), pair(1.0), centers, dtype(temp))
    return student, pair(dtype(gain)), weights(images, 2, patches), teacher, pairings


@functools.lru_cache
def streamed_program(weights, streaming, student_temp, compiler_options):
    def loss(student, prototypes, scorer, teacher, pairings):
        result = streamed_terms(
            student,
            prototypes,
            scorer,
            teacher,
            pairings,
            weights=weights,
            student_temp=student_temp,
            streaming=streaming,
        )
        return 3.0 * result.loss, result  # a cotangent that is not 1

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=dict(compiler_options))


@functools.partial(jax.jit, compiler_options=dict(QUICK))
@functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
def plain_program(student, prototypes, scorer, teacher, pairings, weights, student_temp):
    """One program for each shape: weights and temperature are arguments."""
    arguments = (student, prototypes, scorer, teacher, pairings)
    plain = plain_terms(*arguments, weights=CMD, student_temp=student_temp)
    return 3.0 * sum(weights[name] * term for name, term in plain.terms.items()), (plain.terms, plain[2:])


def loss_of(arguments, weights, streaming, student_temp=0.1, compiler_options=()):
    gradient, result = streamed_program(weights, streaming, student_temp, compiler_options)(*arguments)
    return jax.device_get((result, gradient))


def plain_loss_of(arguments, weights, student_temp=0.1):
    weights = {name: float(w) for name, w in weights._asdict().items()}
    gradient, result = plain_program(*arguments, weights, student_temp)
    return jax.device_get((result, gradient))


def assert_equal(arguments, weights, streaming, tolerance, student_temp=0.1, compiler_options=QUICK):
    """Every term, the entropies, and each gradient relative to its largest entry."""
    result, gradient = loss_of(arguments, weights, streaming, student_temp, compiler_options)
    (terms, (entropy, marginal)), expected = plain_loss_of(arguments, weights, student_temp)
    for name, term in terms.items():
        expected_term = term if getattr(weights, name) else 0.0
        np.testing.assert_allclose(result.terms[name], expected_term, rtol=tolerance, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(result.teacher_entropy, entropy, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(result.marginal_entropy, marginal, rtol=tolerance, atol=tolerance)
    total = sum(getattr(weights, name) * term for name, term in terms.items())
    np.testing.assert_allclose(result.loss, total, rtol=tolerance, atol=tolerance)
    scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    for (path, of_streamed), of_plain in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        # A gradient that cancels to nothing beside the others, or where softmaxes saturate, is exact to rounding alone.
        largest = max(np.max(np.abs(of_plain)), 1e-3 * scale, 1e-2)
        np.testing.assert_allclose(of_streamed, of_plain, rtol=0, atol=tolerance * largest, err_msg=str(path))


TARGETS = pytest.mark.parametrize("targets", ["expected", "gathered"])
shapes = st.sampled_from(
    [
        {"images": 1, "groups": ((2, 3),), "patches": 4, "width": 3, "prototypes": 2},
        {"images": 3, "groups": ((2, 4), (1, 1)), "patches": 1, "width": 7, "prototypes": 17},
        {"images": 1, "groups": ((2, 5), (3, 2)), "patches": 4, "width": 7, "prototypes": 32},
        {"images": 3, "groups": ((2, 5), (3, 2)), "patches": 4, "width": 3, "prototypes": 17},
    ]
)
term_weights = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 2.5])] * 4).filter(any).map(lambda w: TermWeights(*w))
values = st.tuples(st.integers(0, 2**31), st.sampled_from([0.04, 0.07, 0.2]))  # seed, teacher's temperature
any_case = {
    "shape": shapes,
    "weights": term_weights,
    "chunk": st.integers(1, 45),
    "targets": st.sampled_from(["expected", "gathered"]),
    "student_temp": st.sampled_from([0.1, 0.3]),
    "draws": st.lists(values, min_size=8, max_size=8),
}


# Each example is a program to compile, so it is run on several draws of values.
@settings(max_examples=8, deadline=None, derandomize=True)
@given(**any_case)
def test_float64_equals_the_plain_form(shape, weights, chunk, targets, student_temp, draws):
    with jax.enable_x64(True):
        for seed, temp in draws:
            arguments, streaming = problem(seed, **shape, temp=temp, dtype=np.float64), Streaming(chunk, targets=targets)
            assert_equal(arguments, weights, streaming, 1e-10, student_temp)


@pytest.mark.parametrize(
    ("weights", "chunk"), [(CMD, 5), (CMD, 17), (TermWeights(1.0, 0.0, 0.0, 0.0), 5), (TermWeights(0.5, 0.5, 0.0, 0.0), 17)]
)
@TARGETS
def test_every_method_in_chunks_and_whole(weights, chunk, targets):
    assert_equal(problem(3, width=32), weights, Streaming(chunk, targets=targets), 1e-5)


@TARGETS
def test_float32_as_compiled_for_use(targets):
    assert_equal(problem(3, width=32), CMD, Streaming(5, targets=targets), 1e-5, compiler_options=())


@TARGETS
def test_unused_prototypes_leave_everything_finite(targets):
    arguments = problem(1, width=32, gain=30.0, temp=0.005)  # the program of the test above
    result, gradient = loss_of(arguments, CMD, Streaming(5, targets=targets))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((result, gradient)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arguments)
        (terms, _), _ = plain_loss_of(wide, CMD)
    for name in ("intra_image", "intra_region", "inter_student"):
        np.testing.assert_allclose(result.terms[name], terms[name], rtol=1e-5)


@TARGETS
def test_bfloat16_products_keep_sums_in_float32(targets):
    arguments = problem(0, width=64, prototypes=300, groups=((2, 16), (4, 5)), patches=16)
    (terms, _), expected = plain_loss_of(arguments, CMD)
    result, gradient = loss_of(arguments, CMD, Streaming(128, "bfloat16", targets=targets), compiler_options=QUICK)
    for name, term in terms.items():
        assert result.terms[name].dtype == jnp.float32
        # The operands carry 8 bits: single logits of size 10 are off by 0.02, sums of them by less.
        np.testing.assert_allclose(result.terms[name], term, rtol=1e-2, err_msg=name)
    for of_streamed, of_plain in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert of_streamed.dtype == of_plain.dtype
        error = np.linalg.norm(of_streamed - of_plain) / np.linalg.norm(of_plain)
        assert error < 3e-2


def test_neither_terms_nor_teacher_get_gradients():
    student, prototypes, scorer, teacher, pairings = problem(0)

    def run(student, teacher):
        return streamed_terms(
            student, prototypes, scorer, teacher, pairings, weights=CMD, student_temp=0.1, streaming=Streaming(8)
        )

    gradient = lambda of, at: jax.tree.leaves(jax.jit(jax.grad(of), compiler_options=dict(QUICK))(at))
    assert all(np.all(x == 0) for x in gradient(lambda s: run(s, teacher).terms["intra_image"], student))
    assert all(np.all(x == 0) for x in gradient(lambda t: run(student, t).loss, teacher))
    assert all(np.any(x != 0) for x in gradient(lambda s: run(s, teacher).loss, student))


@TARGETS
def test_no_array_has_patches_and_prototypes(targets):
    arguments = problem(0, images=2, groups=((2, 16), (4, 5)), patches=16, prototypes=1024)
    *differentiable, teacher, pairings = arguments

    def loss(student, prototypes, scorer, chunk):
        return streamed_terms(
            student,
            prototypes,
            scorer,
            teacher,
            pairings,
            weights=CMD,
            student_temp=0.1,
            streaming=Streaming(chunk, targets=targets),
        ).loss

    def temporary(chunk):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3).lower(*differentiable, chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

    rows = 2 * (2 * 16 + 4 * 5)
    streamed, text = temporary(32)
    stored, _ = temporary(1024)
    assert streamed < 4 * rows * 1024 < stored
    # the student's regions with the axis of K, in any of the layouts that the products use
    assert not any(shape in text for shape in ("16,1024]", "5,1024]", f"{2 * 2 * 16},1024]", f"{2 * 4 * 5},1024]"))


def test_bags_of_probabilities_are_sums_over_patches():
    teacher = problem(0)[3]
    probs = jax.nn.softmax(teacher_logits(teacher.region_z, teacher.prototypes.region, teacher.centers.region, 0.04), axis=-1)
    bags = teacher_bags(teacher.region_z, teacher.prototypes.region, teacher.centers.region, 0.04, chunk=5)
    np.testing.assert_allclose(bags, jnp.sum(probs, axis=2), rtol=1e-5, atol=1e-7)


def test_the_default_chunk_fits_into_memory():
    assert default_chunk(1072, 4096, "cpu") == 4096  # 17 MiB whole
    assert default_chunk(1072, 65_536, "cpu") == 256
    assert default_chunk(10**6, 65_536, "cpu") == 256
    assert default_chunk(68_608, 65_536, "gpu", 80 * 2**30) == 8192
    assert default_chunk(68_608, 8192, "gpu", 80 * 2**30) == 8192
    assert default_chunk(8576, 65_536, "tpu", 16 * 2**30) == 2048
    assert default_chunk(50, 24, "cuda") == 24


DEVICES_FLAGS = " ".join(f"--{name}={value}" for name, value in (("xla_force_host_platform_device_count", 4), *QUICK))
DEVICES_SCRIPT = """
import jax, numpy as np
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cmd_jax.method.centers import sinkhorn_center
from cmd_jax.method.chunks import Streaming
from cmd_jax.method.streamed import Terms, streamed_terms
from cmd_jax.method.types import Centers, PrototypePair
from tests.method.test_streamed import CMD, problem
arguments = problem(5, images=4, prototypes=64)
student, prototypes, scorer, teacher, pairings = arguments

def gradients(student, prototypes, scorer, teacher, streaming, options):
    def loss(student, prototypes, scorer):
        result = streamed_terms(
            student, prototypes, scorer, teacher, pairings, weights=CMD, student_temp=0.1, streaming=streaming, **options
        )
        return result.loss, result
    gradient, result = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(student, prototypes, scorer)
    center = sinkhorn_center(teacher.image_z, teacher.prototypes.image, teacher.temp, streaming)
    return result, gradient, center

for targets, options in CASES:
    whole = jax.jit(partial(gradients, streaming=Streaming(7, targets=targets), options=options))
    alone = whole(student, prototypes, scorer, teacher)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    images, alike = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    pair = PrototypePair(alike, alike)
    of_teacher = teacher._replace(image_z=images, region_z=images, prototypes=pair, centers=Centers(alike, alike), temp=alike)
    split = jax.jit(
        partial(gradients, streaming=Streaming(7, targets=targets, mesh=mesh), options=options),
        in_shardings=(images, pair, images, of_teacher),
        out_shardings=(Terms(alike, alike, images, alike), (images, pair, images), alike),
    )
    compiled = split.lower(student, prototypes, scorer, teacher).compile()
    assert "all-gather" not in compiled.as_text(), "something is gathered"
    together = compiled(student, prototypes, scorer, teacher)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=str(path))
print("equal", jax.device_count())
"""


def test_images_split_over_devices_give_the_same_numbers():
    cases = [("expected", {}), ("gathered", {})]
    environment = os.environ | {"XLA_FLAGS": DEVICES_FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"CASES = {cases!r}{DEVICES_SCRIPT}"]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.stdout == "equal 4\n", out.stderr
