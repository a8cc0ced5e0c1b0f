"""The recursion of GPTQ over a block of inputs, in nested blocks.

With H + λI = Lᵀ D L, L unit lower triangular, and e = w - q,

    t_j = w_j + Σ_{k<j} L_jk e_k,    q_j = nearest grid point to t_j,    loss = Σ_j D_j (t_j - q_j)².

The sum over earlier blocks is a matrix product, and only the last few inputs go one by one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jgptq import grid as grids
from jgptq.accelerators import HOPPERS, runs_on
from jgptq.cholesky import inverses
from jgptq.hessian import HIGHEST
from jgptq.solvers import fits

# Inputs that go one by one before a matrix product takes over; 8 to 32 time alike on a CPU.
STRIP = 16
# Inputs in a block of the outermost sum: its products are large enough to run at full speed.
CHUNK = 512
# Up to this many inputs earlier and later ones are summed in one product, which costs less than several small ones; on
# a GPU the longer loops also wait for the host.
SHORT = {"cpu": 128}
# Devices that solve a block of up to 128 inputs in one kernel; more errors do not fit its registers. With no device
# here the loop runs everywhere. The kernel has not run on a GPU yet: benchmarks/gpu.py compares the two.
KERNEL_DEVICES, KERNEL_INPUTS = HOPPERS, 128


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


class Block(NamedTuple):
    """Inputs `start` and on of a factor Lᵀ D L. inverses: of L's own block of each group, if grids are to be fitted."""

    lower: Float[Array, "in in"]
    pivots: Float[Array, " in"]
    inverses: Float[Array, "groups group group"] | None = None
    start: Int[Array, ""] | int = 0

    def at(self, start) -> "Block":
        return self._replace(start=self.start + start)

    def part(self, row, rows, column, columns) -> Float[Array, "rows columns"]:
        """`rows` rows of L from `row` on, `columns` columns from `column` on."""
        return lax.dynamic_slice(self.lower, (self.start + row, self.start + column), (rows, columns))

    def own_pivots(self, n: int) -> Float[Array, " n"]:
        return lax.dynamic_slice_in_dim(self.pivots, self.start, n)


def descend(w, feedback, block: Block, rows, grid, fit, group, sizes) -> Solution:
    """Solves a block of n inputs given the feedback Σ L_jk e_k of all inputs before it (None: there are none).

    w, feedback (n, out); rows: the grids, once known; fit: what finds them; sizes: the nested block sizes below n.
    """
    n = w.shape[0]
    if rows is None and n == group:

        def losses(scales, zeros):
            return with_grids(w, feedback, block, scales, zeros, grid, sizes).loss

        def compensated():
            return w if feedback is None else _compensated(w, feedback, block)

        scale, zero = fit(fits.Group(compensated, block.own_pivots(n), losses), grid)
        rows = Rows(scale[None], zero[None], jnp.zeros(n, jnp.int32))
        solution = descend(w, feedback, block, rows, grid, fit, group, sizes)
        return solution._replace(scales=rows.scales, zeros=rows.zeros)
    by_loop = functools.partial(_in_blocks, grid=grid, fit=fit, group=group, sizes=sizes)
    if _has_kernel(n, rows):
        by_kernel = functools.partial(_by_kernel, max_code=grid.max_code)
        return lax.platform_dependent(w, feedback, block, rows, cuda=by_kernel, default=by_loop)
    return by_loop(w, feedback, block, rows)


def _has_kernel(n: int, rows: Rows | None) -> bool:
    one_grid = rows is not None and rows.scales.shape[0] == 1
    return one_grid and STRIP <= n <= KERNEL_INPUTS and n % 8 == 0 and runs_on("cuda", KERNEL_DEVICES)


def _by_kernel(w, feedback, block, rows, max_code) -> Solution:
    from jgptq.solvers import hopper

    n = w.shape[0]
    targets = w if feedback is None else w + feedback
    # The kernel has no rule for a batch.
    solve = jax.custom_batching.sequential_vmap(hopper.solve)
    lower, most = block.part(0, n, 0, n), jnp.asarray(max_code, jnp.float32)
    codes, errors, loss = solve(w, targets, lower, block.own_pivots(n), rows.scales[0], rows.zeros[0], most)
    return Solution(codes.astype(jnp.uint8), rows.scales[:0], rows.zeros[:0], errors, loss)


def _in_blocks(w, feedback, block, rows, grid, fit, group, sizes) -> Solution:
    """By smaller blocks, and at last one input at a time."""
    n = w.shape[0]
    if not sizes:
        return _strip(w, feedback, block, rows, grid)

    size = sizes[0]

    def solve(errors, start):
        sums = _earlier(block, errors, start, size)
        if feedback is not None:
            sums += lax.dynamic_slice_in_dim(feedback, start, size)
        part = rows and rows._replace(index=lax.dynamic_slice_in_dim(rows.index, start, size))
        own = lax.dynamic_slice_in_dim(w, start, size)
        solution = descend(own, sums, block.at(start), part, grid, fit, group, sizes[1:])
        errors = lax.dynamic_update_slice_in_dim(errors, solution.errors, start, axis=0)
        return errors, solution._replace(errors=None)

    errors, parts = lax.scan(solve, jnp.zeros_like(w), jnp.arange(0, n, size))
    codes, scales, zeros = (part.reshape(-1, w.shape[1]) for part in (parts.codes, parts.scales, parts.zeros))
    return Solution(codes, scales, zeros, errors, jnp.sum(parts.loss, axis=0))


def with_grids(w, feedback, block: Block, scales, zeros, grid, sizes) -> Solution:
    """Solves a group with each of several given (candidates, out) scales and zeros, side by side: codes and errors
    (n, candidates · out), loss (candidates, out)."""
    count, n = scales.shape[0], w.shape[0]
    wide, feedback = (value if value is None else jnp.tile(value, (1, count)) for value in (w, feedback))
    rows = Rows(scales.reshape(1, -1), zeros.reshape(1, -1), jnp.zeros(n, jnp.int32))
    solution = descend(wide, feedback, block, rows, grid, None, n, sizes)
    return solution._replace(loss=solution.loss.reshape(scales.shape))


def _earlier(block, errors, start, size):
    """Σ_{k < start} L_jk errors_k for `size` inputs from `start` on; later errors are still zero."""
    n, out = errors.shape
    if n <= SHORT.get(jax.default_backend(), CHUNK):
        return jnp.dot(block.part(start, size, 0, n), errors, precision=HIGHEST)

    def product(i, sums):
        columns = block.part(start, size, i * size, size)
        return sums + jnp.dot(columns, lax.dynamic_slice_in_dim(errors, i * size, size), precision=HIGHEST)

    return lax.fori_loop(0, start // size, product, jnp.zeros((size, out), errors.dtype))


def _compensated(w, feedback, block):
    """The weights of a group as algorithm 1 holds them on reaching it: moved to make up, if left real, for all errors
    so far. Feedback is in the basis of L, so w + L⁻¹ feedback."""
    inverse = block.inverses[block.start // w.shape[0]]
    return w + jnp.dot(inverse, feedback, precision=HIGHEST)


def _strip(w, feedback, block, rows, grid) -> Solution:
    """The recursion itself, one input at a time."""
    n = w.shape[0]
    targets = w if feedback is None else w + feedback
    lower, pivots = block.part(0, n, 0, n), block.own_pivots(n)

    def column(j, state):
        errors, codes, loss = state
        t = _row(targets, j) + jnp.dot(_row(lower, j), errors, precision=HIGHEST)
        index = _row(rows.index, j)
        scale, zero = _row(rows.scales, index), _row(rows.zeros, index)
        code = grids.encode(t, scale, zero, grid.max_code)
        q = grids.decode(code, scale, zero)
        errors, codes = _with_row(errors, j, _row(w, j) - q), _with_row(codes, j, code.astype(jnp.uint8))
        return errors, codes, loss + _row(pivots, j) * (t - q) ** 2

    start = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros(w.shape[1], w.dtype))
    errors, codes, loss = lax.fori_loop(0, n, column, start)
    return Solution(codes, rows.scales[:0], rows.zeros[:0], errors, loss)


def _row(array, j):
    """array[j] for a j that is a row's number: indexing would ask, in a handful of operations, whether it is."""
    return lax.dynamic_index_in_dim(array, j, keepdims=False, allow_negative_indices=False)


def _with_row(array, j, row):
    return lax.dynamic_update_index_in_dim(array, row, j, axis=0, allow_negative_indices=False)


def group_inverses(lower: Float[Array, "in in"], group: int) -> Float[Array, "groups group group"]:
    """The inverse of each group's own block of L."""
    starts = jnp.arange(0, lower.shape[0], group)
    return inverses(lax.map(lambda start: lax.dynamic_slice(lower, (start, start), (group, group)), starts))
