"""Cholesky factors read backwards and inverses of triangles against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.cholesky import BLOCK, LEAF, _sizes, cholesky, inverses


def positive_definite(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((2 * n, n))
    return (x.T @ x / (2 * n) + 0.1 * np.eye(n)).astype(np.float32)


def backwards(matrix: np.ndarray) -> np.ndarray:
    """The lower triangular G with GᵀG = matrix."""
    return np.linalg.cholesky(matrix[::-1, ::-1].astype(np.float64))[::-1, ::-1].T


# By rows alone, in blocks of rows, in blocks of blocks, and by the library.
@pytest.mark.parametrize(("n", "by_blocks"), [(7, False), (96, True), (344, True), (1056, True), (501, False)])
def test_factors_and_inverses_are_those_of_numpy(n, by_blocks):
    assert bool(_sizes(n)) == by_blocks
    matrix = positive_definite(n)
    exact = backwards(matrix)
    found = np.asarray(cholesky(jnp.tril(jnp.asarray(matrix))))
    assert (np.triu(found, 1) == 0).all()
    np.testing.assert_allclose(found, exact, atol=2e-6)


@pytest.mark.parametrize("n", [1, 43, 75, 100, 256])
def test_inverses_are_those_of_numpy(n):
    lower = np.stack([backwards(positive_definite(n)), np.tril(np.full((n, n), 0.1 / n)) + np.eye(n)])
    found = np.asarray(inverses(jnp.asarray(lower, jnp.float32)))
    assert (np.triu(found, 1) == 0).all()
    np.testing.assert_allclose(found, np.linalg.inv(lower), atol=1e-5)


def test_a_batch_of_factors():
    matrices = np.stack([positive_definite(96), 2 * positive_definite(96)])
    found = jax.vmap(cholesky)(jnp.tril(jnp.asarray(matrices)))
    np.testing.assert_allclose(found, [backwards(matrix) for matrix in matrices], atol=2e-6)


@pytest.mark.parametrize("where", [0, 50, 95])
def test_a_negative_pivot_is_not_a_number(where):
    matrix = np.eye(96, dtype=np.float32)
    matrix[where, where] = -1
    assert np.isnan(np.diagonal(cholesky(jnp.asarray(matrix)))).any()


def test_leaves_are_never_wider_than_they_may_be():
    for n in range(1, 30_000, 7):
        sizes = _sizes(n)
        assert not sizes or (sizes[-1] <= LEAF and sizes[0] <= BLOCK)
        assert all(wide % narrow == 0 for wide, narrow in zip((n, *sizes), sizes, strict=False))
