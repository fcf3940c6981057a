import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.method.centers import sinkhorn_center
from cmd_jax.method.chunks import Streaming

TEMP = 0.07
WHOLE = Streaming(chunk=6)


def batch(images=24, prototypes=6, width=5):
    z_key, w_key = jax.random.split(jax.random.key(0))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    # A common direction, so that without a center all images choose the same prototypes.
    return unit(jax.random.normal(z_key, (images, width)) + 2.0), unit(jax.random.normal(w_key, (prototypes, width)))


def test_sinkhorn_gives_prototypes_equal_shares():
    z, rows = batch()
    center = sinkhorn_center(z, rows, TEMP, WHOLE, iterations=200)
    shares = jnp.mean(jax.nn.softmax((z @ rows.T - center) / TEMP, axis=-1), axis=0)
    np.testing.assert_allclose(shares, 1 / len(rows), atol=1e-4)
    assert jnp.max(jnp.mean(jax.nn.softmax(z @ rows.T / TEMP, axis=-1), axis=0)) > 0.3


def test_three_iterations_are_those_of_scaling_the_matrix():
    z, rows = batch()
    matrix = np.exp(np.asarray(z, np.float64) @ np.asarray(rows, np.float64).T / TEMP)
    images, prototypes = matrix.shape
    for _ in range(3):
        matrix /= matrix.sum(1, keepdims=True) * images
        matrix /= matrix.sum(0, keepdims=True) * prototypes
    expected = matrix / matrix.sum(1, keepdims=True)
    center = sinkhorn_center(z, rows, TEMP, WHOLE)
    np.testing.assert_allclose(jax.nn.softmax((z @ rows.T - center) / TEMP, axis=-1), expected, rtol=1e-4)


def test_leading_axes_are_the_batch():
    z, rows = batch()
    np.testing.assert_allclose(
        sinkhorn_center(z.reshape(4, 3, 2, 5), rows, TEMP, WHOLE), sinkhorn_center(z, rows, TEMP, WHOLE), rtol=1e-5
    )
