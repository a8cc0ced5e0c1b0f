"""Work on wide matrices a panel at a time, in place: XLA gives what is done all at once a second matrix of that size.

A Hessian of 28,672 inputs has 3.3 GB. In a loop, and on donated memory, the same work takes one of them and a panel.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import slices

# Rows or columns at a time: a product of so many runs at full speed.
PANEL = 1024


def panel_size(n: int) -> int:
    """The largest divisor of n up to PANEL; n itself if that would be a sixteenth of PANEL and less."""
    size = next(size for size in range(min(PANEL, n), 0, -1) if n % size == 0)
    return size if size > PANEL // 16 else n


def over_columns(f: Callable, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """f, which keeps shapes, of some columns after others, in the place of the matrix."""
    size = panel_size(matrix.shape[1])

    def panel(i, matrix):
        columns = slices.rows(matrix, i * size, size, axis=1)
        return slices.with_rows(matrix, i * size, f(columns), axis=1)

    return lax.fori_loop(0, matrix.shape[1] // size, panel, matrix)


def add_product(
    total: Float[Array, "rows columns"], x: Float[Array, "tokens rows"], y: Float[Array, "tokens columns"]
) -> Float[Array, "rows columns"]:
    """total + xᵀ y, some rows after others, in the place of the total; in float32 or what the arrays have.

    Where x is bfloat16 and y float32, y is the sum of two bfloat16 parts but for 2⁻¹⁶ of itself: two products at the
    speed of a GPU's tensor cores, which is an order of magnitude above that of one in float32.
    """
    size, parts = panel_size(total.shape[0]), [y]
    if x.dtype == jnp.bfloat16 and y.dtype == jnp.float32:
        # Not by a conversion to bfloat16 and back, which XLA may take out.
        high = lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)
        low = jnp.where(jnp.isfinite(high), y - high, 0.0)
        parts = [high.astype(x.dtype), low.astype(x.dtype)]

    def panel(i, total):
        rows = slices.rows(x, i * size, size, axis=1).T
        own = slices.rows(total, i * size, size)
        for part in parts:
            own += jnp.dot(rows, part, precision=lax.Precision.HIGHEST, preferred_element_type=total.dtype)
        return slices.with_rows(total, i * size, own)

    return lax.fori_loop(0, total.shape[0] // size, panel, total)
