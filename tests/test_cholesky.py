"""Triangular factors and inverses of triangles against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.cholesky import BLOCK, LEAF, _sizes, factorize, inverses


def positive_definite(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((2 * n, n))
    return (x.T @ x / (2 * n) + 0.1 * np.eye(n)).astype(np.float32)


def backwards(matrix: np.ndarray) -> np.ndarray:
    """The lower triangular G with GᵀG = matrix."""
    return np.linalg.cholesky(matrix[::-1, ::-1].astype(np.float64))[::-1, ::-1].T


# Too small, in blocks of rows, in blocks of blocks, and of no number of rows that divides into such.
@pytest.mark.parametrize(("n", "by_blocks"), [(7, False), (96, True), (344, True), (1056, True), (501, False)])
def test_factors_and_inverses_are_those_of_numpy(n, by_blocks):
    assert bool(_sizes(n)) == by_blocks
    matrix = positive_definite(n)
    root = backwards(matrix)
    exact = root / np.diagonal(root)[:, None]
    found = factorize(jnp.tril(jnp.asarray(matrix)), inverse=True)
    assert (np.triu(found.lower, 1) == 0).all()
    np.testing.assert_allclose(found.lower, exact, atol=2e-6)
    np.testing.assert_allclose(found.pivots, np.diagonal(root) ** 2, rtol=5e-6)
    np.testing.assert_allclose(found.inverse, np.linalg.inv(exact), atol=5e-6)
    alone = factorize(jnp.tril(jnp.asarray(matrix)))
    assert alone.inverse is None
    np.testing.assert_allclose(alone.lower, found.lower, atol=1e-6)


@pytest.mark.parametrize("n", [1, 43, 75, 100, 256])
def test_inverses_are_those_of_numpy(n):
    lower = np.stack([backwards(positive_definite(n)), np.tril(np.full((n, n), 0.1 / n)) + np.eye(n)])
    found = np.asarray(inverses(jnp.asarray(lower, jnp.float32)))
    assert (np.triu(found, 1) == 0).all()
    np.testing.assert_allclose(found, np.linalg.inv(lower), atol=1e-5)


def test_a_batch_of_factors():
    matrices = np.stack([positive_definite(96), 2 * positive_definite(96)])
    lower, pivots, _ = jax.vmap(factorize)(jnp.tril(jnp.asarray(matrices)))
    rebuilt = np.einsum("bki,bk,bkj->bij", *(np.asarray(each, np.float64) for each in (lower, pivots, lower)))
    np.testing.assert_allclose(rebuilt, matrices, atol=2e-6)
    assert (np.triu(lower, 1) == 0).all()
    np.testing.assert_array_equal(np.diagonal(lower, axis1=1, axis2=2), 1)


@pytest.mark.parametrize("n", [7, 96])
@pytest.mark.parametrize("where", [0, 50, 95])
def test_a_matrix_that_is_not_positive_definite_has_a_pivot_that_says_so(n, where):
    matrix = np.eye(n, dtype=np.float32)
    negative, between = matrix.copy(), matrix.copy()
    negative[where % n, where % n] = -1
    between[max(where % n, 1), 0] = 1.5
    for indefinite in (negative, between):
        pivots = np.asarray(factorize(jnp.asarray(indefinite)).pivots)
        assert not (pivots > 0).all()


def test_leaves_are_never_wider_than_they_may_be():
    for n in range(1, 30_000, 7):
        sizes = _sizes(n)
        assert not sizes or (sizes[-1] <= LEAF and sizes[0] <= BLOCK)
        assert all(wide % narrow == 0 for wide, narrow in zip((n, *sizes), sizes, strict=False))
