"""L_N against its equation, the bank, and what takes part in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.method.relations import Relations, relation_term, scaled_pools, write_rows
from tests.conftest import quick

WIDTHS = (2, 3)
TEMPS = {"teacher_temp": 0.05, "student_temp": 0.2}


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    return {
        "student": rng.normal(size=(2, 3, 5)),
        "bank": rng.normal(size=(7, 2, 5)),
        "index": np.array([4, 1]),
    }


def _arrays(embeddings):
    return {name: jnp.asarray(x, jnp.int32 if name == "index" else jnp.float32) for name, x in embeddings.items()}


def _relation_term(x):
    return relation_term(x["student"], Relations(x["bank"], x["index"], WIDTHS, **TEMPS))


_program = quick(_relation_term)


def _term(embeddings, **changes):
    return _program(_arrays(embeddings | changes))


def _term_and_gradient(embeddings, name):
    x = _arrays(embeddings)
    return quick(jax.value_and_grad(lambda part: _relation_term(x | {name: part})))(x[name])


def _parts(x):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.concatenate([unit(x[..., :2]), 0.7 * unit(x[..., 2:])], axis=-1)


def _expected(student, bank, index):
    """In float64, one image after the other; rows of 0 take no part."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    seen = np.flatnonzero(np.abs(bank).sum((1, 2)))
    mean = bank[seen].mean(0)
    keys = unit(bank[seen].mean(1) - mean.mean(0))
    total = 0.0
    for b, own in enumerate(index):
        others = seen != own
        look = lambda m, k: unit(bank[m, k] - mean[k])
        cosines = np.array([[look(m, k) @ look(own, k) for m in seen[others]] for k in range(2)])
        agreed = np.minimum(*(softmax(row / TEMPS["teacher_temp"]) for row in cosines))
        target = np.where(others, 0.0, 1 - agreed.sum())
        target[others] = agreed
        for v in range(3):
            relation = softmax(keys @ unit(_parts(student[b, v]) - mean.mean(0)) / TEMPS["student_temp"])
            total -= np.sum(target * np.log(relation)) / len(index) / 3
    return total


def test_term_equals_its_equation(embeddings):
    np.testing.assert_allclose(_term(embeddings), _expected(**embeddings), rtol=1e-5)


def test_images_not_seen_yet_take_no_part(embeddings):
    bank = embeddings["bank"].copy()
    bank[[0, 5]] = 0.0
    np.testing.assert_allclose(_term(embeddings, bank=bank), _expected(**embeddings | {"bank": bank}), rtol=1e-5)
    fewer = np.delete(bank, [0, 5], axis=0)
    np.testing.assert_allclose(_term(embeddings, bank=bank), _term(embeddings, bank=fewer, index=np.array([3, 0])), rtol=1e-6)


def test_first_batch_gives_finite_numbers(embeddings):
    """Nothing but the batch is in the bank; with one image there is nothing to resemble."""
    for index in ([4, 1], [4]):
        bank = np.zeros((7, 2, 5))
        bank[index] = embeddings["bank"][index]
        some = {"student": embeddings["student"][: len(index)], "bank": bank, "index": index}
        value, gradient = _term_and_gradient(some, "student")
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_gradient_is_the_students_alone(embeddings):
    of = lambda name: _term_and_gradient(embeddings, name)[1]
    assert np.any(of("student"))
    assert not np.any(of("bank"))


def test_rows_replace_those_of_their_images(embeddings):
    bank = jnp.asarray(embeddings["bank"], jnp.float32)
    rows = scaled_pools(jnp.asarray(embeddings["bank"][:2], jnp.float32), WIDTHS)
    np.testing.assert_allclose(rows, _parts(embeddings["bank"][:2]), atol=1e-6)
    written = write_rows(bank, jnp.array([4, 1]), rows)
    expected = np.array(bank)
    expected[[4, 1]] = rows
    np.testing.assert_array_equal(written, expected)
    broken = write_rows(bank, jnp.array([4, 1]), rows.at[0, 1, 2].set(jnp.nan))
    expected[4] = bank[4]
    np.testing.assert_array_equal(broken, expected)
