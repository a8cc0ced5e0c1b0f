"""Slices at computed places that are never negative; one that would end outside is moved back, as in `jax.lax`.

What `jax.lax` has counts a negative place from the end: that question is a kernel of its own for each slice, and what a
program costs to compile is in proportion to its kernels.
"""

import jax
from jax import lax


def rows(array: jax.Array, start, count: int, axis: int = 0) -> jax.Array:
    """array[start : start + count], or the same along another axis."""
    return lax.dynamic_slice_in_dim(array, start, count, axis=axis, allow_negative_indices=False)


def with_rows(array: jax.Array, start, new: jax.Array, axis: int = 0) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, new, start, axis=axis, allow_negative_indices=False)


def row(array: jax.Array, j, axis: int = 0) -> jax.Array:
    """array[j], or the same along another axis."""
    return lax.dynamic_index_in_dim(array, j, axis=axis, keepdims=False, allow_negative_indices=False)


def with_row(array: jax.Array, j, new: jax.Array, axis: int = 0) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, new, j, axis=axis, allow_negative_indices=False)


def corner(matrix: jax.Array, at: tuple, shape: tuple[int, int]) -> jax.Array:
    """The part of a matrix that begins at a row and a column."""
    return lax.dynamic_slice(matrix, at, shape, allow_negative_indices=False)


def block(matrix: jax.Array, i, j, size: int) -> jax.Array:
    """Block (i, j) of a matrix of square blocks."""
    return corner(matrix, (i * size, j * size), (size, size))


def with_block(matrix: jax.Array, i, j, new: jax.Array) -> jax.Array:
    size, _ = new.shape
    return lax.dynamic_update_slice(matrix, new, (i * size, j * size), allow_negative_indices=False)
