"""Cholesky factors read backwards, and inverses of triangular matrices.

On a CPU in products of blocks: the library turns rows into columns and back, and its threads wait in loops for tens of
milliseconds after each call, which keeps XLA's from the cores (4096 inputs on 2 cores: 0.57 s of CPU time with the
library for blocks of 128 rows, 0.37 s without it).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HIGHEST = lax.Precision.HIGHEST
# Rows of a block of products, at most, and of one that is solved row by row.
BLOCK, LEAF = 768, 64


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(size for size in range(min(most, n), 0, -1) if n % size == 0)


def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The lower triangular G with GᵀG a symmetric matrix, of which the lower triangle is given, with zeros above.

    NaN where the matrix is not positive definite.
    """
    sizes = _sizes(matrix.shape[0])
    if jax.default_backend() == "cpu" and sizes:
        return _by_blocks(matrix, sizes)
    # Read backwards, the triangle that is given lies above.
    return lax.linalg.cholesky(matrix[::-1, ::-1].T, symmetrize_input=False)[::-1, ::-1].T


def _sizes(n: int) -> tuple[int, ...]:
    """Rows of blocks, of blocks within them, ..., of a leaf; none where n is small or has no divisors that would do."""
    if n > BLOCK:
        found = ((size, *_sizes(size)) for size in range(BLOCK, 2 * LEAF - 1, -1) if n % size == 0)
        return next((sizes for sizes in found if sizes[-1] <= LEAF), ())
    size = divisor(n, LEAF)
    return (size,) if LEAF // 4 <= size < n else ()


def _by_blocks(matrix: Float[Array, "n n"], sizes: tuple[int, ...]) -> Float[Array, "n n"]:
    if not sizes:
        return _by_rows(matrix)
    size, count = sizes[0], matrix.shape[0] // sizes[0]

    def block(matrix, i, j):
        return lax.dynamic_slice(matrix, (i * size, j * size), (size, size))

    def left(matrix, i, j):
        """What is left of a block when the rows after it are done."""

        def product(k, left):
            return left - jnp.dot(block(matrix, k, i).T, block(matrix, k, j), precision=HIGHEST)

        return lax.fori_loop(i + 1, count, product, block(matrix, i, j))

    def row(step, matrix):
        i = count - 1 - step
        corner = _by_blocks(jnp.tril(left(matrix, i, i)), sizes[1:])
        inverse = inverses(corner[None])[0]
        matrix = lax.dynamic_update_slice(matrix, corner, (i * size, i * size))

        def before(j, matrix):
            solved = jnp.dot(inverse.T, left(matrix, i, j), precision=HIGHEST)
            return lax.dynamic_update_slice(matrix, solved, (i * size, j * size))

        return lax.fori_loop(0, i, before, matrix)

    return lax.fori_loop(0, count, row, matrix)


def _by_rows(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    n, index = matrix.shape[0], jnp.arange(matrix.shape[0])

    def row(step, matrix):
        j = n - 1 - step
        own = jnp.where(index <= j, matrix[j] / jnp.sqrt(matrix[j, j]), 0.0)
        matrix -= jnp.where(index[:, None] < j, own[:, None] * own[None], 0.0)
        return matrix.at[j].set(own)

    return lax.fori_loop(0, n, row, matrix)


def inverses(lower: Float[Array, "blocks n n"]) -> Float[Array, "blocks n n"]:
    """The inverses of lower triangular matrices: of small blocks on the diagonal, then of pairs of them, and so on."""
    n = lower.shape[-1]
    if jax.default_backend() != "cpu":
        eye = jnp.broadcast_to(jnp.eye(n, dtype=lower.dtype), lower.shape)
        return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    size = n
    while size > LEAF and size % 2 == 0:
        size //= 2
    diagonal = jnp.stack([lower[:, at : at + size, at : at + size] for at in range(0, n, size)], axis=1)
    diagonal = diagonal.reshape(-1, size, size)

    def row(j, inverse):
        own = diagonal[:, j]
        sums = jnp.einsum("bk,bkn->bn", own, inverse, precision=HIGHEST)
        return inverse.at[:, j].set(((jnp.arange(size) == j)[None] - sums) / own[:, j, None])

    inverse = lax.fori_loop(0, size, row, jnp.zeros_like(diagonal))
    while size < n:
        below = [lower[:, at + size : at + 2 * size, at : at + size] for at in range(0, n, 2 * size)]
        below = jnp.stack(below, axis=1).reshape(-1, size, size)
        first, second = inverse[0::2], inverse[1::2]
        corner = -jnp.matmul(second, jnp.matmul(below, first, precision=HIGHEST), precision=HIGHEST)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])
        size *= 2
    return inverse
