"""The objective against loops written from the equations, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.method.chunks import Streaming
from cmd_jax.method.objective import cmd_objective
from cmd_jax.method.regions import Places, match_by_location
from cmd_jax.method.released import divergence
from cmd_jax.method.types import Centers, PrototypePair, TermWeights, Views
from tests.conftest import quick

CMD = TermWeights(0.5, 0.5, 1.0, 1.0)
TERMS = ("intra_image", "intra_region", "inter_student", "inter_teacher")


def _softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _problem(seed=0, images=2, local=2, patches=(4, 3), width=5, d=6, prototypes=7):
    """Random inputs: (student groups, student W, teacher, teacher W, L_T weights, centers)."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def views(count, n):
        return Views(
            unit(images, count, d),
            unit(images, count, n, d),
            rng.normal(size=(images, count, n, width)).astype(np.float32),
            _softmax(rng.normal(size=(images, count, n))).astype(np.float32),
        )

    student = (views(2, patches[0]),) + ((views(local, patches[1]),) if local else ())
    pair = lambda: PrototypePair(unit(prototypes, d), unit(prototypes, d))
    centers = Centers(*(rng.normal(size=prototypes).astype(np.float32) * 0.1 for _ in range(2)))
    weights = _softmax(rng.normal(size=(images, 2, patches[0]))).astype(np.float32)
    return student, pair(), views(2, patches[0]), pair(), weights, centers


def _objective(problem, weights=CMD, region_weights="teacher_mil", **options):
    return cmd_objective(
        *problem,
        weights=weights,
        region_weights=region_weights,
        student_temp=0.1,
        teacher_temp=0.04,
        center_momentum=0.9,
        **options,
    )


_run = quick(_objective, static_argnames=("weights", "region_weights"))


def _oracle(problem, region_weights, temps, matches=None):
    """The four terms as loops over images, pairs of views and patches, float64 (docs: method, Objective)."""
    student, student_w, teacher, teacher_w, a_t, centers = problem
    views = [(group, v) for group in student for v in range(group.image_z.shape[1])]
    image_p = lambda z: _softmax(student_w.image.astype(np.float64) @ z / temps[0])
    region_p = lambda z: _softmax(z @ student_w.region.T.astype(np.float64) / temps[0])
    teacher_image = lambda z: _softmax((teacher_w.image.astype(np.float64) @ z - centers.image) / temps[1])
    teacher_region = lambda z: _softmax((z @ teacher_w.region.T.astype(np.float64) - centers.region) / temps[1])
    kl = lambda p, q: np.sum(p * (np.log(p) - np.log(q)))
    terms = np.zeros(4)
    images = a_t.shape[0]
    pairs = [(q, v) for q in range(2) for v in range(len(views)) if v != q]
    for b in range(images):
        for q, v in pairs:
            group, row = views[v]
            target, own = teacher_image(teacher.image_z[b, q]), image_p(group.image_z[b, row])
            terms[0] -= np.sum(target * np.log(own))
            regions, targets = region_p(group.region_z[b, row]), teacher_region(teacher.region_z[b, q])
            weight, ce = [], []
            for i, feature in enumerate(group.features[b, row]):
                if matches is None:
                    others = teacher.features[b, q]
                    cosine = others @ feature / np.linalg.norm(others, axis=1) / np.linalg.norm(feature)
                    match = int(np.argmax(cosine))
                else:
                    match, seen = (x[b, q, i] for x in matches[v])
                    if not seen:
                        continue
                weight.append(teacher.mil_weights[b, q, match] if region_weights == "teacher_mil" else 1.0)
                ce.append(-np.sum(targets[match] * np.log(regions[i])))
            terms[1] += np.dot(weight, ce) / np.sum(weight) if weight else 0.0
            terms[2] += kl(group.mil_weights[b, row] @ regions, own)
            terms[3] += kl(a_t[b, q] @ targets, target)
    return terms / (images * len(pairs))


@pytest.mark.parametrize("region_weights", ["teacher_mil", "uniform"])
@pytest.mark.parametrize("local", [0, 3])
def test_terms_equal_the_loops_of_the_equations(region_weights, local):
    problem = _problem(seed=local, local=local)
    result = _run(problem, region_weights=region_weights)
    expected = _oracle(problem, region_weights, (0.1, 0.04))
    np.testing.assert_allclose([result.terms[name] for name in TERMS], expected, rtol=1e-5)
    np.testing.assert_allclose(float(result.loss), np.dot(CMD[:4], expected), rtol=1e-5)
    np.testing.assert_allclose(
        result.centers.region,
        0.9 * problem[5].region + 0.1 * (problem[2].region_z @ problem[3].region.T).mean((0, 1, 2)),
        atol=1e-6,
    )


@pytest.mark.parametrize("region_weights", ["teacher_mil", "uniform"])
def test_regions_that_match_by_location_equal_the_loops(region_weights):
    problem = _problem(seed=5, local=2, patches=(9, 4))
    rng = np.random.default_rng(5)

    def places(views, patches):
        corner, size = rng.uniform(0, 40, (2, views, 2)), rng.uniform(20, 60, (2, views, 2))
        return Places(np.concatenate([corner, size], axis=-1), rng.integers(0, 2, (2, views)).astype(bool), patches**-0.5)

    global_, local = places(2, 9), places(2, 4)
    local.box[0, 1] = (200, 200, 10, 10)  # where no teacher's view is
    result = _run(problem, region_weights=region_weights, places=(global_, local))
    groups = ((global_, 9), (local, 4))
    found = [tuple(map(np.asarray, match_by_location(group, global_, patches, 9))) for group, patches in groups]
    matches = [[part[:, :, row] for part in group] for group in found for row in range(2)]
    assert not np.any(found[1][1][0, :, 1])
    assert 0.1 < np.mean(found[0][1]) < 0.9
    expected = _oracle(problem, region_weights, (0.1, 0.04), matches=matches)
    np.testing.assert_allclose([result.terms[name] for name in TERMS], expected, rtol=1e-5)


@pytest.mark.parametrize("local", [0, 3])
def test_the_released_term_equals_its_loops(local):
    problem = _problem(seed=local, local=local)
    student, student_w, teacher, teacher_w, _, centers = problem
    result = _run(problem, TermWeights(0.5, 0.5, 0.0, 0.0, 1.0), "uniform")
    views = [(group, v) for group in student for v in range(group.image_z.shape[1])]
    pairs = [(q, v) for q in range(2) for v in range(len(views)) if v != q]
    images, prototypes = teacher.image_z.shape[0], len(centers.image)
    expected = 0.0
    for q, v in pairs:
        group, row = views[v]
        for b in range(images):
            probs = _softmax((teacher_w.image @ teacher.image_z[b, q] - centers.image) / 0.04)
            bag = _softmax((teacher.region_z[b, q] @ teacher_w.region.T - centers.region) / 0.04).sum(0)
            logits = student_w.image.astype(np.float64) @ group.image_z[b, row] / 0.1
            logit_bag = (group.region_z[b, row].astype(np.float64) @ student_w.region.T).sum(0) / 0.1
            for k in range(prototypes):
                for a, t in ((probs[k], bag[k]), (logits[k], logit_bag[k])):
                    expected += t * (np.log(t) - a) if t > 0 else 0.0
    expected /= len(pairs) * images * prototypes
    np.testing.assert_allclose(result.terms["released"], expected, rtol=1e-5)
    esvit = _run(problem, TermWeights(0.5, 0.5, 0.0, 0.0), "uniform")
    np.testing.assert_allclose(result.loss, esvit.loss + expected, rtol=1e-5)
    assert "released" not in esvit.terms


@pytest.mark.parametrize("targets", ["plain", "expected", "gathered"])
def test_the_masked_term_equals_its_loops(targets):
    """Value, and gradients by differences of the loop; patches that are seen, and local views, have none."""
    problem = _problem(seed=2, local=2, patches=(4, 1))
    student, student_w, teacher, teacher_w, _, centers = problem
    masks = np.array([[[1, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 1, 1, 0]]], bool)
    target = _softmax((teacher.region_z @ teacher_w.region.T.astype(np.float64) - centers.region) / 0.04)

    def loop(z, rows):
        total = 0.0
        for b, q in np.ndindex(2, 2):
            of_patch = [
                -np.sum(target[b, q, i] * np.log(_softmax(rows @ z[b, q, i] / 0.1))) for i in np.flatnonzero(masks[b, q])
            ]
            total += np.mean(of_patch) if of_patch else 0.0
        return total / 4

    weights = TermWeights(0.5, 0.0, 0.0, 0.0, intra_masked=2.0)
    streaming = None if targets == "plain" else Streaming(chunk=3, targets=targets)

    def run(z, prototypes):
        groups = (student[0]._replace(region_z=z), student[1])
        result = _objective((groups, prototypes, *problem[2:]), weights, masks=masks, streaming=streaming)
        return result.loss, result

    z, prototypes = student[0].region_z, student_w
    (loss, result), gradients = quick(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(z, prototypes)
    np.testing.assert_allclose(result.terms["intra_masked"], loop(z, student_w.region), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * result.terms["intra_image"] + 2 * result.terms["intra_masked"], rtol=1e-6)
    assert float(result.terms["intra_region"]) == 0
    assert np.any(np.asarray(result.centers.region) != centers.region)
    assert np.all(np.any(gradients[0] != 0, axis=-1) == masks)
    z, rows, rng = z.astype(np.float64), student_w.region.astype(np.float64), np.random.default_rng(0)
    for number, (gradient, x) in enumerate(((gradients[0], z), (gradients[1].region, rows))):
        step = 1e-5 * rng.normal(size=x.shape)
        ends = [loop(*((x + sign * step, rows) if number == 0 else (z, x + sign * step))) for sign in (1, -1)]
        np.testing.assert_allclose(np.sum(gradient * step), ends[0] - ends[1], rtol=1e-3)


def test_released_divergence_drops_what_is_not_positive():
    inputs, targets = jnp.array([[[2.0, 3.0, 5.0]]]), jnp.array([[[4.0, -1.0, 0.0]]])
    value, gradients = jax.value_and_grad(lambda a, t: divergence(a, t)[0], argnums=(0, 1))(inputs, targets)
    np.testing.assert_allclose(value, 4 * (np.log(4) - 2) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [[[-4 / 3, 0, 0]]], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [[[(np.log(4) + 1 - 2) / 3, 0, 0]]], rtol=1e-6)


def test_nothing_flows_into_the_teacher():
    """And L_T trains the scorer alone."""
    problem = _problem()
    gradient_of = lambda weights: quick(jax.grad(lambda problem: _objective(problem, weights).loss))(problem)
    gradient = gradient_of(CMD)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((gradient[2], gradient[3], gradient[5])))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((gradient[1], gradient[4])))
    gradient = gradient_of(TermWeights(0.0, 0.0, 0.0, 1.0))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((gradient[:4], gradient[5])))
    assert np.any(gradient[4] != 0)


def test_the_order_of_patches_does_not_matter():
    problem = _problem()
    turn = lambda views: Views(views.image_z, *(x[:, :, ::-1] for x in views[1:4]))
    turned = (tuple(map(turn, problem[0])), problem[1], turn(problem[2]), problem[3], problem[4][:, :, ::-1], problem[5])
    np.testing.assert_allclose(_run(turned).loss, _run(problem).loss, rtol=1e-6)


def test_l_s_is_zero_for_regions_like_images():
    student, prototypes, *rest = _problem(local=0)
    group = student[0]
    same = group._replace(region_z=np.repeat(group.image_z[:, :, None], group.region_z.shape[2], axis=2))
    shared = PrototypePair(prototypes.image, prototypes.image)
    result = _run(((same,), shared, *rest))
    assert abs(float(result.terms["inter_student"])) < 1e-6


def test_a_term_of_weight_zero_is_left_out():
    result = _run(_problem(), TermWeights(1.0, 0.0, 0.0, 0.0))
    assert [float(result.terms[name]) for name in ("intra_region", "inter_student", "inter_teacher")] == [0, 0, 0]
    assert float(result.loss) == float(result.terms["intra_image"])
