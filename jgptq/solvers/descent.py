"""The recursion of GPTQ over a block of inputs, in nested blocks.

With H + λI = Lᵀ D L, L unit lower triangular, and e = w - q,

    t_j = w_j + Σ_{k<j} L_jk e_k,    q_j = nearest grid point to t_j,    loss = Σ_j D_j (t_j - q_j)².

The sum over earlier blocks is a matrix product, and only the last few inputs go one by one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jgptq import grid as grids
from jgptq import slices
from jgptq.accelerators import HOPPERS, runs_on
from jgptq.cholesky import inverses
from jgptq.grid import Levels
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
    """The grids of a block of inputs, and which of them each input uses; None where there is but one."""

    scales: Float[Array, "groups out"]
    zeros: Float[Array, "groups out"]
    index: Int[Array, " in"] | None = None

    def of(self, j) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
        """Scale and zero of input j."""
        if self.index is None:
            return self.scales[0], self.zeros[0]
        group = slices.row(self.index, j)
        return slices.row(self.scales, group), slices.row(self.zeros, group)


class Solution(NamedTuple):
    """Of a block of inputs; zeros for those that are not solved yet."""

    codes: Array  # (n, out) uint8
    scales: Array  # (groups, out): of the groups fitted in this block; none where the grids were given
    zeros: Array  # (groups, out)
    errors: Array  # (n, out): w - q
    loss: Array  # (out,)

    def with_inputs(self, start, codes, errors, loss) -> "Solution":
        """With the inputs from `start` on as well."""
        return self._replace(
            codes=slices.with_rows(self.codes, start, codes),
            errors=slices.with_rows(self.errors, start, errors),
            loss=self.loss + loss,
        )


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
        return slices.corner(self.lower, (self.start + row, self.start + column), (rows, columns))

    def own_pivots(self, n: int) -> Float[Array, " n"]:
        return slices.rows(self.pivots, self.start, n)


def descend(w, feedback, block: Block, rows, grid: Levels, fit, group, sizes) -> Solution:
    """Solves a block of n inputs given the feedback Σ L_jk e_k of all inputs before it (None: there are none).

    w, feedback (n, out); rows: the grids, once known; fit: what finds them; sizes: the nested block sizes below n.
    """
    n, out = w.shape
    grids_shape = (n // group if rows is None else 0, out)
    nothing = Solution(
        jnp.zeros(w.shape, jnp.uint8),
        jnp.zeros(grids_shape, w.dtype),
        jnp.zeros(grids_shape, w.dtype),
        jnp.zeros_like(w),
        jnp.zeros(out, w.dtype),
    )
    return _Descent(w, block, grid, fit, group).solved(nothing, 0, n, feedback, rows, sizes)


class _Descent(NamedTuple):
    """What stays the same through all nested blocks. One Solution goes through all of them and is filled in place."""

    w: Float[Array, "in out"]
    block: Block
    grid: Levels
    fit: Callable | None
    group: int | None

    def solved(self, solution: Solution, start, n: int, feedback, rows: Rows | None, sizes) -> Solution:
        """With the n inputs from `start` on. feedback: of all inputs before them, (n, out)."""
        if rows is None and n == self.group:
            scale, zero = self._fitted(start, feedback, sizes)
            number = start // n
            solution = solution._replace(
                scales=slices.with_row(solution.scales, number, scale),
                zeros=slices.with_row(solution.zeros, number, zero),
            )
            rows = Rows(scale[None], zero[None])

        def by_loop(whole, solution, start, feedback, rows):
            if sizes:
                return whole._by_blocks(solution, start, n, feedback, rows, sizes)
            return whole._by_inputs(solution, start, n, feedback, rows)

        if not _has_kernel(n, rows):
            return by_loop(self, solution, start, feedback, rows)
        # What finds grids has done its work, and operands are arrays.
        operands = self._replace(fit=None, group=None), solution, start, feedback, rows
        return lax.platform_dependent(*operands, cuda=functools.partial(_by_kernel, n=n), default=by_loop)

    def _fitted(self, start, feedback, sizes) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
        """Scale and zero of the group that starts there."""
        block, w = self.block.at(start), slices.rows(self.w, start, self.group)

        def losses(scales, zeros):
            return with_grids(w, feedback, block, scales, zeros, self.grid, sizes).loss

        def compensated():
            return w if feedback is None else _compensated(w, feedback, block)

        return self.fit(fits.Group(compensated, block.own_pivots(self.group), losses), self.grid)

    def _by_blocks(self, solution, start, n, feedback, rows, sizes) -> Solution:
        size = sizes[0]

        def solve(i, solution):
            sums = self._earlier(solution.errors, start, n, i, size)
            if feedback is not None:
                sums += slices.rows(feedback, i * size, size)
            return self.solved(solution, start + i * size, size, sums, rows, sizes[1:])

        return lax.fori_loop(0, n // size, solve, solution)

    def _earlier(self, errors, start, n, i, size):
        """Σ_k L_jk errors_k of the `size` inputs j of block i, over the blocks before it; later errors are zero."""
        block = self.block.at(start)
        if n <= SHORT.get(jax.default_backend(), CHUNK):
            return jnp.dot(block.part(i * size, size, 0, n), slices.rows(errors, start, n), precision=HIGHEST)

        def product(k, sums):
            own = slices.rows(errors, start + k * size, size)
            return sums + jnp.dot(block.part(i * size, size, k * size, size), own, precision=HIGHEST)

        return lax.fori_loop(0, i, product, jnp.zeros((size, errors.shape[1]), errors.dtype))

    def _by_inputs(self, solution, start, n, feedback, rows) -> Solution:
        """The recursion itself, one input at a time."""
        block, w = self.block.at(start), slices.rows(self.w, start, n)
        targets = w if feedback is None else w + feedback
        lower, pivots = block.part(0, n, 0, n), block.own_pivots(n)

        def column(j, state):
            errors, codes, loss = state
            t = slices.row(targets, j) + jnp.dot(slices.row(lower, j), errors, precision=HIGHEST)
            scale, zero = rows.of(start + j)
            code = grids.encode(t, scale, zero, self.grid.max_code)
            q = grids.decode(code, scale, zero)
            errors = slices.with_row(errors, j, slices.row(w, j) - q)
            codes = slices.with_row(codes, j, code.astype(jnp.uint8))
            return errors, codes, loss + slices.row(pivots, j) * (t - q) ** 2

        state = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros(w.shape[1], w.dtype))
        errors, codes, loss = lax.fori_loop(0, n, column, state)
        return solution.with_inputs(start, codes, errors, loss)


def _has_kernel(n: int, rows: Rows | None) -> bool:
    one_grid = rows is not None and rows.scales.shape[0] == 1
    return one_grid and STRIP <= n <= KERNEL_INPUTS and n % 8 == 0 and runs_on("cuda", KERNEL_DEVICES)


def _by_kernel(whole: _Descent, solution, start, feedback, rows, n) -> Solution:
    from jgptq.solvers import hopper

    block, w = whole.block.at(start), slices.rows(whole.w, start, n)
    targets = w if feedback is None else w + feedback
    # The kernel has no rule for a batch.
    solve = jax.custom_batching.sequential_vmap(hopper.solve)
    lower, most = block.part(0, n, 0, n), jnp.asarray(whole.grid.max_code, jnp.float32)
    codes, errors, loss = solve(w, targets, lower, block.own_pivots(n), rows.scales[0], rows.zeros[0], most)
    return solution.with_inputs(start, codes.astype(jnp.uint8), errors, loss)


def with_grids(w, feedback, block: Block, scales, zeros, grid: Levels, sizes) -> Solution:
    """Solves a group with each of several given (candidates, out) scales and zeros, side by side: codes and errors
    (n, candidates · out), loss (candidates, out)."""
    count, n = scales.shape[0], w.shape[0]
    wide, feedback = (value if value is None else jnp.tile(value, (1, count)) for value in (w, feedback))
    rows = Rows(scales.reshape(1, -1), zeros.reshape(1, -1))
    solution = descend(wide, feedback, block, rows, grid, None, n, sizes)
    return solution._replace(loss=solution.loss.reshape(scales.shape))


def _compensated(w, feedback, block):
    """The weights of a group as algorithm 1 holds them on reaching it: moved to make up, if left real, for all errors
    so far. Feedback is in the basis of L, so w + L⁻¹ feedback."""
    inverse = slices.row(block.inverses, block.start // w.shape[0])
    return w + jnp.dot(inverse, feedback, precision=HIGHEST)


def group_inverses(lower: Float[Array, "in in"], group: int) -> Float[Array, "groups group group"]:
    """The inverse of each group's own block of L."""
    starts = jnp.arange(0, lower.shape[0], group)
    return inverses(lax.map(lambda start: slices.corner(lower, (start, start), (group, group)), starts))
