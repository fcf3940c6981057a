import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.method.koleo import koleo


def test_koleo_equals_its_equation():
    x = np.random.default_rng(0).normal(size=(9, 5))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = -np.mean([np.log(min(np.linalg.norm(a - b) for j, b in enumerate(unit) if j != i)) for i, a in enumerate(unit)])
    np.testing.assert_allclose(jax.jit(koleo)(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)


def test_does_not_see_the_norm_of_an_embedding():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    np.testing.assert_allclose(koleo(x), koleo(x * jnp.arange(1.0, 7.0)[:, None]), rtol=1e-5)


def test_koleo_moves_images_apart():
    x = jnp.array([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [-1.0, 0.0, 1.0]])
    moved = x - 0.01 * jax.grad(koleo)(x)
    assert jnp.linalg.norm(moved[0] - moved[1]) > jnp.linalg.norm(x[0] - x[1])


def test_equal_images_give_a_finite_value_and_gradient():
    value, gradient = jax.value_and_grad(koleo)(jnp.ones((4, 3)))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))
