"""The recursion of GPTQ over a block of inputs, in nested blocks.

With H + λI = M D Mᵀ, M unit upper triangular, and e = w - q,

    t_j = w_j + Σ_{k<j} e_k M_kj,    q_j = nearest grid point to t_j,    loss = Σ_j D_j (t_j - q_j)².

The sum over earlier blocks is a matrix product, and only the last few inputs go one by one.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jgptq import grid as grids
from jgptq.hessian import HIGHEST
from jgptq.solvers import fits

# Inputs that go one by one before a matrix product takes over; 8 to 32 time alike on a CPU.
STRIP = 16
# Earlier inputs in one product of the outermost sum: long enough to run at full speed.
CHUNK = 512


class Rows(NamedTuple):
    """The grids of a block of inputs, and which of them each input uses."""

    scales: Float[Array, "groups out"]
    zeros: Float[Array, "groups out"]
    index: Int[Array, " in"]


class Solution(NamedTuple):
    codes: Array  # (n, out) uint8
    scales: Array  # (groups, out): of the groups fitted in this block; none where the grids were given
    zeros: Array  # (groups, out)
    errors: Array  # (n, out): w - q
    loss: Array  # (out,)


def descend(w, feedback, columns_of, pivots, rows, grid, fit, group, sizes) -> Solution:
    """Solves a block of n inputs given the feedback Σ e_k M_kj of all inputs before it (None: there are none).

    w, feedback (n, out); columns_of(start, size), which gives columns (n, size) of M, and pivots (n,): the block's part
    of the factor; rows: the grids, once known; fit: what finds them; sizes: the nested block sizes below n.
    """
    n = w.shape[0]
    if rows is None and n == group:

        def losses(scales, zeros):
            return with_grids(w, feedback, columns_of, pivots, scales, zeros, grid, sizes).loss

        def compensated():
            return w if feedback is None else _compensated(w, feedback, columns_of(0, n))

        scale, zero = fit(fits.Group(compensated, pivots, losses), grid)
        rows = Rows(scale[None], zero[None], jnp.zeros(n, jnp.int32))
        solution = descend(w, feedback, columns_of, pivots, rows, grid, fit, group, sizes)
        return solution._replace(scales=rows.scales, zeros=rows.zeros)
    if not sizes:
        return _strip(w, feedback, columns_of(0, n), pivots, rows, grid)

    size = sizes[0]
    chunk = min(CHUNK, n)
    padding = -n % chunk

    def block(errors, start):
        columns = columns_of(start, size)
        sums = _earlier(jnp.pad(columns, ((0, padding), (0, 0))), errors, start, chunk)
        if feedback is not None:
            sums += lax.dynamic_slice_in_dim(feedback, start, size)
        part = rows and rows._replace(index=lax.dynamic_slice_in_dim(rows.index, start, size))
        solution = descend(
            lax.dynamic_slice_in_dim(w, start, size),
            sums,
            functools.partial(lax.dynamic_slice_in_dim, lax.dynamic_slice_in_dim(columns, start, size), axis=1),
            lax.dynamic_slice_in_dim(pivots, start, size),
            part,
            grid,
            fit,
            group,
            sizes[1:],
        )
        errors = lax.dynamic_update_slice_in_dim(errors, solution.errors, start, axis=0)
        return errors, solution._replace(errors=None)

    errors = jnp.zeros((n + padding, w.shape[1]), w.dtype)
    errors, parts = lax.scan(block, errors, jnp.arange(0, n, size))
    codes, scales, zeros = (part.reshape(-1, w.shape[1]) for part in (parts.codes, parts.scales, parts.zeros))
    return Solution(codes, scales, zeros, errors[:n], jnp.sum(parts.loss, axis=0))


def with_grids(w, feedback, columns_of, pivots, scales, zeros, grid, sizes) -> Solution:
    """Solves a group with each of several given (candidates, out) scales and zeros, side by side: codes and errors
    (n, candidates · out), loss (candidates, out)."""
    count, n = scales.shape[0], w.shape[0]
    wide, feedback = (value if value is None else jnp.tile(value, (1, count)) for value in (w, feedback))
    rows = Rows(scales.reshape(1, -1), zeros.reshape(1, -1), jnp.zeros(n, jnp.int32))
    solution = descend(wide, feedback, columns_of, pivots, rows, grid, None, n, sizes)
    return solution._replace(loss=solution.loss.reshape(scales.shape))


def _earlier(columns, errors, start, chunk):
    """Σ_{k < start} errors_k · columns_k for each column, as products of `chunk` rows; later errors are still zero."""

    def product(i, sums):
        errors_i = lax.dynamic_slice_in_dim(errors, i * chunk, chunk)
        columns_i = lax.dynamic_slice_in_dim(columns, i * chunk, chunk)
        return sums + jnp.dot(columns_i.T, errors_i, precision=HIGHEST)

    zeros = jnp.zeros((columns.shape[1], errors.shape[1]), errors.dtype)
    if errors.shape[0] == chunk:
        return product(0, zeros)
    return lax.fori_loop(0, (start + chunk - 1) // chunk, product, zeros)


def _compensated(w, feedback, upper):
    """The weights of a block as algorithm 1 holds them on reaching it: moved to make up, if left real, for all errors
    so far. Feedback is in the basis of M, so w + M⁻ᵀ feedback."""
    # A library solve with so few rows spends most of its time starting threads (on a CPU).
    eye = jnp.eye(upper.shape[0], dtype=upper.dtype)

    def substitute(i, inverse):
        j = upper.shape[0] - 1 - i
        return inverse.at[j].set(eye[j] - jnp.dot(upper[j] - eye[j], inverse, precision=HIGHEST))

    inverse = lax.fori_loop(1, upper.shape[0], substitute, eye)
    return w + jnp.dot(inverse.T, feedback, precision=HIGHEST)


def _strip(w, feedback, upper, pivots, rows, grid) -> Solution:
    """The recursion itself, one input at a time."""
    targets = w if feedback is None else w + feedback

    def column(j, state):
        errors, codes, loss = state
        t = targets[j] + jnp.dot(upper[:, j], errors, precision=HIGHEST)
        scale, zero = rows.scales[rows.index[j]], rows.zeros[rows.index[j]]
        code = grids.encode(t, scale, zero, grid.max_code)
        q = grids.decode(code, scale, zero)
        return errors.at[j].set(w[j] - q), codes.at[j].set(code.astype(jnp.uint8)), loss + pivots[j] * (t - q) ** 2

    start = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros(w.shape[1], w.dtype))
    errors, codes, loss = lax.fori_loop(0, w.shape[0], column, start)
    return Solution(codes, rows.scales[:0], rows.zeros[:0], errors, loss)
