"""KoLeo regulariser of DINOv2 (arXiv 2304.07193, section 4): spreads the images of a batch over the sphere."""

import jax
import jax.numpy as jnp

from cmd_jax.method.products import product

Array = jax.Array
EPS = 1e-6  # distance below which two embeddings are pushed apart no harder


def koleo(embeddings: Array) -> Array:
    """-mean_i log( min_{j != i} |x_i - x_j| ) of l2-normalised embeddings.

    Args:
        embeddings: [B, D], one for each image, so that views of one image are no neighbours; two images or more.

    Returns:
        [] float32.
    """
    x = embeddings.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
    similarity = product("bd,cd->bc", x, x) - 4.0 * jnp.eye(x.shape[0])  # no one is its own neighbour
    # A product instead of x[nearest], whose gradient adds up rows in no fixed order on a GPU.
    nearest = product("bc,cd->bd", jax.nn.one_hot(jnp.argmax(similarity, axis=-1), x.shape[0]), x)
    squared = jnp.sum(jnp.square(x - nearest), axis=-1)
    return -0.5 * jnp.mean(jnp.log(squared + EPS**2))
