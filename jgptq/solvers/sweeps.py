"""Group-wise coordinate descent: what is left to gain once every group has been solved.

With e = w - q and the groups other than g fixed, the loss eᵀ H e is quadratic in the group's own errors:
(e_g + m)ᵀ H_gg (e_g + m) and what does not depend on them, with m = H_gg⁻¹ Σ_{h≠g} H_gh e_h. So the group is solved
again towards w_g + m, scale and zero as well. [Behdin et al. 2023, QuantEase, with a group in a coordinate's place]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import grid as grids
from jgptq import slices
from jgptq.cholesky import factorize
from jgptq.grid import Levels
from jgptq.hessian import HIGHEST, Factor
from jgptq.solvers import fits
from jgptq.solvers.descent import Block, Solution, with_grids


class GroupFactors(NamedTuple):
    """For each group its own block of the damped Hessian, the inverse of that, and its factor Lᵀ D L."""

    matrix: Float[Array, "groups group group"]
    inverse: Float[Array, "groups group group"]
    lower: Float[Array, "groups group group"]
    pivots: Float[Array, "groups group"]


def group_factors(factored: Factor, group: int) -> GroupFactors:
    def one(start):
        columns = slices.rows(factored.lower, start, group, axis=1)
        matrix = jnp.dot(columns.T, factored.pivots[:, None] * columns, precision=HIGHEST)
        lower, pivots, half = factorize(jnp.tril(matrix), inverse=True)
        inverse = jnp.dot(half / pivots[None], half.T, precision=HIGHEST)
        return GroupFactors(matrix, inverse, lower, pivots)

    return lax.map(one, jnp.arange(0, factored.pivots.shape[0], group))


def sweep(
    w: Float[Array, "slots out"],
    solution: Solution,
    factored: Factor,
    factors: GroupFactors,
    grid: Levels,
    sizes: tuple[int, ...],
    sweeps: int,
) -> Solution:
    """Solves each group again, `sweeps` times; an output takes what lowers its loss and nothing else.

    solution: of all inputs in slots, from `descend`. sizes: the nested block sizes.
    """
    slots = w.shape[0]
    size = factors.matrix.shape[1]
    inner_sizes = tuple(inner for inner in sizes if inner < size)
    rows = next(chunk for chunk in (4 * size, 3 * size, 2 * size, size) if slots % chunk == 0)

    def below(g, add, state):
        """`add` over the rows of L's columns of group g, but for those that are zero; some rows at a time."""

        def step(i, state):
            return add(state, i * rows, slices.corner(factored.lower, (i * rows, g * size), (rows, size)))

        return lax.fori_loop(g * size // rows, slots // rows, step, state)

    def visit(number, state):
        codes, scales, zeros, errors, products = state
        g = number % scales.shape[0]
        own = jax.tree.map(lambda array: slices.row(array, g), factors)
        w_g, e_g, codes_g = (slices.rows(array, g * size, size) for array in (w, errors, codes))
        scale_g, zero_g = slices.row(scales, g), slices.row(zeros, g)

        def pulled(pull, start, columns):
            pivots, sums = (slices.rows(array, start, rows) for array in (factored.pivots, products))
            return pull + jnp.dot((pivots[:, None] * columns).T, sums, precision=HIGHEST)

        pull = below(g, pulled, jnp.zeros_like(w_g))
        move = jnp.dot(own.inverse, pull, precision=HIGHEST) - e_g
        new = _again(w_g + move, codes_g, scale_g, zero_g, own, grid, inner_sizes)
        e_new = w_g - grids.decode(new.codes.astype(w.dtype), new.scales[None], new.zeros[None])
        better = (_loss(e_new + move, own) < _loss(e_g + move, own))[None]
        e_new = jnp.where(better, e_new, e_g)

        def moved(products, start, columns):
            sums = slices.rows(products, start, rows) + jnp.dot(columns, e_new - e_g, precision=HIGHEST)
            return slices.with_rows(products, start, sums)

        products = below(g, moved, products)  # L e, kept up to date rather than computed again
        codes_g = jnp.where(better, new.codes, codes_g)
        codes, errors = slices.with_rows(codes, g * size, codes_g), slices.with_rows(errors, g * size, e_new)
        scales = slices.with_row(scales, g, jnp.where(better[0], new.scales, scale_g))
        zeros = slices.with_row(zeros, g, jnp.where(better[0], new.zeros, zero_g))
        return codes, scales, zeros, errors, products

    state = (solution.codes, solution.scales, solution.zeros, solution.errors, factored.times(solution.errors))
    codes, scales, zeros, errors, products = lax.fori_loop(0, sweeps * (slots // size), visit, state)
    return Solution(codes, scales, zeros, errors, jnp.sum(factored.pivots[:, None] * products**2, axis=0))


class _Choice(NamedTuple):
    codes: Array  # (group, out) uint8
    scales: Array  # (out,)
    zeros: Array  # (out,)


def _again(target, codes, scale, zero, own: GroupFactors, grid, sizes) -> _Choice:
    """The group solved towards `target`, from its present grid on."""
    block = Block(own.lower, own.pivots)

    def losses(scales, zeros):
        return with_grids(target, None, block, scales, zeros, grid, sizes).loss

    candidates = fits.Group(lambda: target, own.pivots, losses)
    known = losses(scale[None], zero[None])[0], scale, zero
    _, scale, zero = fits.refined(candidates, grid, *known)
    codes = with_grids(target, None, block, scale[None], zero[None], grid, sizes).codes
    codes = one_by_one(target, codes, scale, zero, own.matrix, grid, sizes)
    fitted = grids.round_scales(refit(target, codes, scale, zero, own.matrix), grid.scale_dtype)

    def loss(scale):
        return _loss(target - grids.decode(codes.astype(target.dtype), scale[None], zero[None]), own)

    better = (loss(fitted) < loss(scale)) & ((fitted > 0) == (scale > 0))  # some grids have positive scales alone
    return _Choice(codes, jnp.where(better, fitted, scale), zero)


def one_by_one(
    target: Float[Array, "group out"],
    codes: Array,
    scale: Array,
    zero: Array,
    matrix: Array,
    grid: Levels,
    sizes: tuple[int, ...] = (),
) -> Array:
    """Each code in turn set to the best one with all others fixed: the minimum of (t - q)ᵀ H (t - q) along q_j is at
    q_j + (H (t - q))_j / H_jj. [Behdin et al. 2023, QuantEase, algorithm 1]

    What earlier codes moved by, e = q - q', takes H_jk e_k / H_jj from that: the recursion of `descend` from q on.
    """
    q = grids.decode(codes.astype(target.dtype), scale[None], zero[None])
    diagonal = jnp.diagonal(matrix)
    block = Block(matrix / diagonal[:, None], diagonal)
    pulls = jnp.dot(block.lower, target - q, precision=HIGHEST)
    return with_grids(q, pulls, block, scale[None], zero[None], grid, sizes).codes


def refit(
    target: Float[Array, "group out"], codes: Array, scale: Array, zero: Array, matrix: Float[Array, "group group"]
) -> Float[Array, " out"]:
    """The scale that is best for given codes: with c = codes - zero, sᵒ = cᵀ H t / cᵀ H c."""
    steps = codes.astype(target.dtype) - zero[None]
    pulled = jnp.dot(matrix, steps, precision=HIGHEST)
    square = jnp.sum(steps * pulled, axis=0)
    best = jnp.sum(pulled * target, axis=0) / jnp.where(square > 0, square, 1.0)
    return jnp.where((square > 0) & (best != 0), best, scale)


def _loss(errors: Float[Array, "group out"], own: GroupFactors) -> Float[Array, " out"]:
    return jnp.sum(own.pivots[:, None] * jnp.dot(own.lower, errors, precision=HIGHEST) ** 2, axis=0)
