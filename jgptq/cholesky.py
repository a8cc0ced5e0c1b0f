"""Triangular factors Lᵀ D L of symmetric matrices, L unit lower triangular, and inverses of triangles.

On a CPU in products of blocks: the library turns rows into columns and back, and its threads wait in loops for tens of
milliseconds after each call, which keeps XLA's from the cores (4096 inputs on 2 cores: 0.57 s of CPU time with the
library for blocks of 128 rows, 0.36 s without it).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import slices

HIGHEST = lax.Precision.HIGHEST
# Rows of a block of products, at most, and of one that is solved row by row.
BLOCK, LEAF = 768, 64


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(size for size in range(min(most, n), 0, -1) if n % size == 0)


class Triangle(NamedTuple):
    """Lᵀ · diag(pivots) · L, and L⁻¹ if it was asked for."""

    lower: Float[Array, "n n"]
    pivots: Float[Array, " n"]
    inverse: Float[Array, "n n"] | None = None


def factorize(matrix: Float[Array, "n n"], *, inverse: bool = False) -> Triangle:
    """The factor of a symmetric matrix, of which the lower triangle is given, with zeros above.

    Pivots are not all positive and finite where the matrix is not positive definite. [Golub and Van Loan 2013, section
    4.1, read from the last row to the first]
    """
    sizes = _sizes(matrix.shape[0])
    if jax.default_backend() == "cpu" and sizes:
        return _by_blocks(matrix, sizes, inverse)
    # Read backwards, the triangle that is given lies above.
    root = lax.linalg.cholesky(matrix[::-1, ::-1].T, symmetrize_input=False)[::-1, ::-1].T
    roots = jnp.diagonal(root)
    lower = root / roots[:, None]
    return Triangle(lower, roots * roots, inverses(lower[None])[0] if inverse else None)


def _sizes(n: int) -> tuple[int, ...]:
    """Rows of blocks, of blocks within them, ..., of a leaf; none where n is small or has no divisors that would do."""
    if n > BLOCK:
        found = ((size, *_sizes(size)) for size in range(BLOCK, 2 * LEAF - 1, -1) if n % size == 0)
        return next((sizes for sizes in found if sizes[-1] <= LEAF), ())
    size = divisor(n, LEAF)
    return (size,) if LEAF // 4 <= size < n else ()


def _by_blocks(matrix: Float[Array, "n n"], sizes: tuple[int, ...], inverse: bool) -> Triangle:
    if not sizes:
        return _by_rows(matrix)
    size, count = sizes[0], matrix.shape[0] // sizes[0]

    def left(matrix, pivots, i, j):
        """What is left of a block when the rows after it are done."""

        def product(k, left):
            scaled = slices.rows(pivots, k * size, size)[:, None] * slices.block(matrix, k, i, size)
            return left - jnp.dot(scaled.T, slices.block(matrix, k, j, size), precision=HIGHEST)

        return lax.fori_loop(i + 1, count, product, slices.block(matrix, i, j, size))

    def row(step, state):
        matrix, pivots, diagonal = state
        i = count - 1 - step
        corner = _by_blocks(jnp.tril(left(matrix, pivots, i, i)), sizes[1:], True)
        matrix = slices.with_block(matrix, i, i, corner.lower)
        half = corner.inverse.T / corner.pivots[:, None]

        def before(j, matrix):
            solved = jnp.dot(half, left(matrix, pivots, i, j), precision=HIGHEST)
            return slices.with_block(matrix, i, j, solved)

        matrix = lax.fori_loop(0, i, before, matrix)
        pivots = slices.with_rows(pivots, i * size, corner.pivots)
        if inverse:
            diagonal = slices.with_block(diagonal, i, i, corner.inverse)
        return matrix, pivots, diagonal

    start = matrix, jnp.zeros(matrix.shape[0], matrix.dtype), jnp.zeros_like(matrix) if inverse else None
    lower, pivots, diagonal = lax.fori_loop(0, count, row, start)
    return Triangle(lower, pivots, _completed(lower, diagonal, size) if inverse else None)


def _completed(lower: Float[Array, "n n"], diagonal: Float[Array, "n n"], size: int) -> Float[Array, "n n"]:
    """L⁻¹, given its blocks on the diagonal, D: of L X = I, row i of blocks is X_i = D_i - D_ii Σ_{k<i} L_ik X_k. While
    row i is D_i, the sum over all k has one D_ii L_ii D_i = D_i too many."""

    def row(i, inverse):
        sums = jnp.dot(slices.rows(lower, i * size, size), inverse, precision=HIGHEST)
        corner = slices.block(inverse, i, i, size)
        own = 2 * slices.rows(inverse, i * size, size) - jnp.dot(corner, sums, precision=HIGHEST)
        return slices.with_rows(inverse, i * size, own)

    return lax.fori_loop(0, lower.shape[0] // size, row, diagonal)


def _by_rows(matrix: Float[Array, "n n"]) -> Triangle:
    """Elimination of [A | I] from the last row up leaves [D L | L⁻ᵀ].

    What a row takes off those above is a product of itself, over its pivot's root, with itself.
    """
    n, index = matrix.shape[0], jnp.arange(matrix.shape[0])
    symmetric = jnp.tril(matrix) + jnp.tril(matrix, -1).T

    def scaled(rows, j):
        own = slices.row(rows, j)
        return own / jnp.sqrt(slices.row(own, j))

    def row(step, state):
        # The row to come is made here, for what a loop changes in place must not be read in any other order.
        rows, own = state
        j = n - 1 - step
        rows -= jnp.where(index < j, own[:n], 0.0)[:, None] * own[None]
        return rows, scaled(rows, jnp.maximum(j - 1, 0))

    one = jnp.eye(n, dtype=matrix.dtype)
    rows = jnp.concatenate([symmetric, one], axis=1)
    rows, _ = lax.fori_loop(0, n, row, (rows, scaled(rows, n - 1)))
    pivots = jnp.diagonal(rows)
    return Triangle(jnp.tril(rows[:, :n] / pivots[:, None], -1) + one, pivots, rows[:, n:].T)


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
        own = slices.row(diagonal, j, axis=1)
        pivot = slices.rows(own, j, 1, axis=1)
        sums = jnp.einsum("bk,bkn->bn", own, inverse, precision=HIGHEST)
        solved = ((jnp.arange(size) == j)[None] - sums) / pivot
        return slices.with_row(inverse, j, solved, axis=1)

    inverse = lax.fori_loop(0, size, row, jnp.zeros_like(diagonal))
    while size < n:
        below = [lower[:, at + size : at + 2 * size, at : at + size] for at in range(0, n, 2 * size)]
        below = jnp.stack(below, axis=1).reshape(-1, size, size)
        first, second = inverse[0::2], inverse[1::2]
        corner = -jnp.matmul(second, jnp.matmul(below, first, precision=HIGHEST), precision=HIGHEST)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])
        size *= 2
    return inverse
