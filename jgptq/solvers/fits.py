"""The grid of one group, chosen with the solver in the loop.

A group is reached with its targets already moved by all earlier errors. What a scale and zero cost is then known
exactly: run the group's own recursion with them and sum D_j (t_j - q_j)². Candidates are tried side by side, as so
many more outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq import grid as grids
from jgptq.grid import Grid, Levels

# Factors around the centre tried first, and then around the best of those.
COARSE = tuple(0.7 + 0.075 * k for k in range(9))
FINE = (0.95, 0.975, 1.025, 1.05)


class Group(NamedTuple):
    """The inputs of a group when it is reached.

    compensated: gives the weights as moved to make up for all errors so far, (group, out). pivots: their D.
    losses: of (candidates, out) scales and zeros, (candidates, out).
    """

    compensated: Callable[[], Float[Array, "group out"]]
    pivots: Float[Array, " group"]
    losses: Callable[[Array, Array], Array]


Scales = tuple[Float[Array, " out"], Float[Array, " out"]]


def min_max(group: Group, grid: Grid | Levels) -> Scales:
    """`jgptq.grid.fit`."""
    return grids.fit(group.compensated(), grid)


def lp(group: Group, grid: Grid | Levels) -> Scales:
    """`jgptq.grid.search`: by the rounding errors of the single weights."""
    return grids.search(group.compensated(), grid)


def in_loop(group: Group, grid: Grid | Levels) -> Scales:
    """The best of scales up to 30 % around what `jgptq.grid.search` finds, of either sign where the grid is symmetric,
    then of neighbouring zeros, then of scales close by; each judged by the loss of the group's solve."""
    scale, zero = grids.search(group.compensated(), grid)
    return refined(group, grid, *_best(group, grid, _scaled(scale, zero, _signed(COARSE, grid))))[1:]


def refined(group: Group, grid: Grid | Levels, loss: Array, scale: Array, zero: Array) -> tuple[Array, Array, Array]:
    """Loss, scale and zero after trying neighbours of a scale and zero of known loss."""
    known = loss, scale, zero
    if not grid.symmetric:
        zeros = jnp.stack([jnp.clip(zero - 1, 0, grid.max_code), jnp.clip(zero + 1, 0, grid.max_code)])
        known = _best(group, grid, (jnp.broadcast_to(scale[None], zeros.shape), zeros), known)
    return _best(group, grid, _scaled(*known[1:], _signed(FINE, grid, (-1.0,))), known)


def _signed(factors: tuple[float, ...], grid: Grid | Levels, negative: tuple[float, ...] | None = None) -> tuple:
    """With the grid turned round as well: the level more on the other side lets a range be a sixteenth longer."""
    if not grid.symmetric or grid.positive_scales:
        return factors
    return factors + tuple(-0.9375 * factor for factor in factors) if negative is None else factors + negative


def _scaled(scale: Array, zero: Array, factors: tuple[float, ...]) -> tuple[Array, Array]:
    scales = scale[None] * jnp.array(factors, scale.dtype)[:, None]
    return scales, jnp.broadcast_to(zero[None], scales.shape)


def _best(group: Group, grid: Grid | Levels, candidates: tuple[Array, Array], known: tuple | None = None) -> tuple:
    scales, zeros = grids.round_scales(candidates[0], grid.scale_dtype), candidates[1]
    losses = group.losses(scales, zeros)
    if known is not None:
        losses, scales, zeros = (
            jnp.concatenate([old[None], new]) for old, new in zip(known, (losses, scales, zeros), strict=True)
        )
    best = jnp.argmin(losses, axis=0)[None]
    return tuple(jnp.take_along_axis(values, best, axis=0)[0] for values in (losses, scales, zeros))
