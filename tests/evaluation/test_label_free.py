"""Label-free numbers against slow oracles, and whether they order checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import config as config_lib
from cmd_jax.evaluation.knn import knn_classify, nearest
from cmd_jax.evaluation.label_free import (
    KEYS,
    agreement,
    alignment,
    alpha_req,
    rank_correlations,
    rankme,
    teacher_entropies,
    uniformity,
)
from cmd_jax.metrics import Metrics, Number
from cmd_jax.models.build import init_params, make_network
from tests.conftest import quick, tiny


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 12)) * np.arange(1, 13)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_rankme_is_the_entropy_of_the_singular_values(features):
    for rows in (features, features[:7]):  # more images than numbers, and fewer
        singular = np.linalg.svd(rows, compute_uv=False)
        share = singular / singular.sum()
        assert rankme(rows) == pytest.approx(np.exp(-sum(p * np.log(p) for p in share)), rel=1e-5)
    assert rankme(np.eye(9)) == pytest.approx(9)
    assert rankme(np.ones((9, 4))) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_of_a_power_law_spectrum(alpha):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 60))
    rows -= rows.mean(axis=0)
    columns, _ = np.linalg.qr(rows)  # orthonormal, without a mean
    spectrum = np.arange(1, 61.0) ** -alpha
    spectrum[:3] = 5  # the first three ranks do not count
    assert alpha_req(columns * np.sqrt(spectrum) + 3) == pytest.approx(alpha, rel=1e-6)


def test_alpha_weighs_a_rank_by_its_inverse(features):
    wide = np.concatenate([features, features**3], axis=1)
    values = np.linalg.svd(wide - wide.mean(0), compute_uv=False)[3:] ** 2
    ranks = np.arange(4, 4 + len(values))
    weights, x, y = 1 / ranks, np.log(ranks), np.log(values)
    mean = lambda z: np.sum(weights * z) / np.sum(weights)
    slope = mean((x - mean(x)) * (y - mean(y))) / mean((x - mean(x)) ** 2)
    assert alpha_req(wide) == pytest.approx(-slope, rel=1e-3)


def test_alpha_of_too_short_a_spectrum_is_none(features):
    assert alpha_req(features[:, :10]) is None
    assert alpha_req(np.ones((20, 30))) is None


def test_uniformity_and_alignment_are_loops_over_pairs(features):
    kernel = [np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(features) for b in features[:i]]
    assert uniformity(features, rows_at_once=16) == pytest.approx(np.log(np.mean(kernel)), rel=1e-4)
    assert uniformity(np.tile(features[:1], (5, 1))) == pytest.approx(0, abs=1e-5)
    views = np.stack([features[:25], features[25:]], axis=1)
    assert alignment(views) == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in views]), rel=1e-5)


@pytest.fixture(scope="module")
def teacher():
    config = tiny()
    config.head.batch_norm = True
    config = config_lib.resolve(config, 100)
    network = make_network(config)
    pooled = np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)  # more than are taken at once
    return config, network, quick(lambda: init_params(config, network))(), pooled


def _entropy(p):
    return -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)


def test_teacher_entropies_equal_the_oracle(teacher):
    config, network, params, pooled = teacher
    z = network.apply({"params": params}, jnp.asarray(pooled), method=lambda network, x: network.image_head(x))
    rows = network.apply({"params": params}, method="prototype_rows")[0]
    logits = np.asarray(z, np.float64) @ np.asarray(rows, np.float64).T
    logits = (logits - logits.mean(axis=0)) / config.method.teacher_temp
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    expected = np.array([_entropy(probs).mean(), _entropy(probs.mean(axis=0))]) / np.log(24)
    np.testing.assert_allclose(teacher_entropies(config, network, params, pooled), expected, rtol=1e-4)


def test_sinkhorns_centers_share_the_prototypes_out(teacher):
    config, *rest = teacher
    moving, solved = config.copy_and_resolve_references(), config.copy_and_resolve_references()
    solved.method.centering = "sinkhorn"
    (_, before), (_, marginal) = teacher_entropies(moving, *rest), teacher_entropies(solved, *rest)
    assert 1 >= marginal > before + 0.05


def test_a_constant_teacher_has_collapsed(teacher):
    config, network, params, pooled = teacher
    constant = jax.tree.map(jnp.zeros_like, params["image_head"])
    entropy, marginal = teacher_entropies(config, network, {**params, "image_head": constant}, pooled)
    assert (entropy, marginal) == pytest.approx((1, 1), abs=1e-4)  # no prototype is preferred: entropy 1 is the other collapse


def _checkpoint(progress, noise):
    """Numbers of 300 features: classes differ in 16 directions, of which the first dominate early; and directions of noise."""
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(10, 16))
    labels = np.arange(300) % 10
    scales = np.arange(1, 17.0) ** (-2.5 * (1 - progress))
    latent = (classes[labels] + 0.9 * rng.normal(size=(300, 16))) * scales
    rows = np.concatenate([latent, rng.normal(size=(300, noise))], axis=1)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    neighbours = nearest(rows[:200], rows[200:], 20)
    result = knn_classify(neighbours, labels[:200], labels[200:], k=20, temp=0.07, classes=10)
    return {
        "knn20_top1": result.top1,
        "rankme": rankme(rows),
        "alpha_req": alpha_req(rows),
        "uniformity": uniformity(rows),
    }


def test_label_free_numbers_order_checkpoints_as_knn():
    history = [_checkpoint(progress, noise=0) for progress in np.linspace(0, 1, 9)]
    assert history[-1]["knn20_top1"] > history[0]["knn20_top1"] + 20
    found = rank_correlations(history, "knn20_top1")
    assert found["rankme"] > 0.9
    assert found["uniformity"] < -0.9
    assert found["alpha_req"] < -0.9


def test_they_are_wrong_where_noise_fills_the_spectrum():
    """The known limit: rank and spread say that directions are used, not for what."""
    history = [_checkpoint(1.0, noise) for noise in range(0, 72, 8)]
    found = rank_correlations(history, "knn20_top1")
    assert found["rankme"] < -0.8
    assert found["uniformity"] > 0.8
    assert found["alpha_req"] > 0.8


def test_rank_correlations():
    history = [{"k": value, "rankme": value**3, "alignment": -value, "uniformity": 1.0} for value in (1.0, 4.0, 2.0, 3.0)]
    history += [{"rankme": 0.0}, {"k": 9.0}]  # of other protocols
    assert rank_correlations(history, "k") == pytest.approx({"rankme": 1.0, "alignment": -1.0})
    assert rank_correlations(history[:3], "k") == {}
    swapped = [{"k": k, "alpha_req": a} for k, a in ((1, 1), (2, 2), (3, 4), (4, 3), (5, 5))]
    assert rank_correlations(swapped, "k") == pytest.approx({"alpha_req": 1 - 6 * 2 / (5 * 24)})
    histories = [
        Metrics(0, "", [Number(key, "", value, "") for key, value in step.items()], {}, "", [], {}) for step in swapped
    ]
    assert "alpha_req +0.90" in agreement(histories, "k")
    assert set(KEYS) > set(rank_correlations(history, "k"))
