"""Features of the last blocks: the references' layouts."""

import numpy as np
import pytest

from cmd_jax.inference.run import last_blocks


@pytest.fixture
def blocks():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, tokens, width)).astype(np.float32) for tokens, width in ((16, 3), (4, 6), (4, 6))]


def test_last_blocks_of_a_vit(blocks):
    blocks = blocks[1:]
    named = {"cls_token": blocks[-1][:, 0], "patch_tokens": blocks[-1][:, 1:], "blocks": tuple(blocks)}
    expected = np.concatenate([blocks[0][:, 0], blocks[1][:, 0]], -1)
    np.testing.assert_array_equal(last_blocks(named, 2), expected)
    with_mean = last_blocks(named, 1, append_mean=True)
    np.testing.assert_allclose(with_mean, np.concatenate([blocks[1][:, 0], blocks[1][:, 1:].mean(1)], -1), rtol=1e-6)


def test_registers_are_not_in_the_mean(blocks):
    named = {"patch_tokens": blocks[-1][:, 3:], "blocks": tuple(blocks[1:])}  # of four tokens one is a patch
    np.testing.assert_array_equal(last_blocks(named, 2), np.concatenate([tokens[:, 3] for tokens in blocks[1:]], axis=-1))


def test_last_blocks_of_a_swin(blocks):
    named = {"patch_tokens": blocks[-1], "blocks": tuple(blocks)}
    expected = np.concatenate([tokens.mean(1) for tokens in blocks], -1)
    np.testing.assert_allclose(last_blocks(named, 3), expected, rtol=1e-5, atol=1e-6)
    assert last_blocks(named, 2).shape == (2, 12)
