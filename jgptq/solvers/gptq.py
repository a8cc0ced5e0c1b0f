"""GPTQ: quantize one input after another, letting later inputs make up for the error so far.

[Frantar et al. 2023, algorithm 1], in the form of a nearest-plane recursion that needs one Cholesky factor and no
inverse [Chee et al. 2023, LDLQ; Chen et al. 2025]: with H + λI = Lᵀ D L, L unit lower triangular, and e = w - q,

    t_j = w_j + Σ_{k<j} L_jk e_k,    q_j = nearest grid point to t_j,    loss = Σ_j D_j (t_j - q_j)².

The codes are those of algorithm 1; its lazy batches are the nested sums below. Inputs are solved in nested blocks:
the sum over earlier blocks is a matrix product, and only the last few inputs go one by one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jgptq import grid as grids
from jgptq import tensor
from jgptq.grid import Grid, scales_at_limit
from jgptq.hessian import HIGHEST, Factor, Hessian, factor
from jgptq.solvers import fits
from jgptq.solvers.descent import CHUNK, STRIP, Block, Rows, descend, group_inverses
from jgptq.solvers.method import (
    TILE,
    TILE_WITHOUT_SEARCH,
    Info,
    check_damp,
    check_hessian,
    check_weight,
    energy,
    over_outputs,
    pack,
    relative,
)
from jgptq.solvers.sweeps import group_factors, sweep
from jgptq.solvers.targets import Targets

ActOrder = Literal[False, True, "static", "group"]
ACT_ORDERS = (False, True, "static", "group")
ScaleSearch = Literal[None, "lp", "in_loop"]
FITS = {None: fits.min_max, "lp": fits.lp, "in_loop": fits.in_loop}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """The method value; see `gptq` for the options, whose defaults here are the more accurate ones.

    targets: what weights are solved towards within a model, where their inputs are not the float model's; None: the
    weights themselves. A solve alone knows of no other model.
    bias_correction: let the bias that is added to a weight's output, if there is one, make the mean output over
    calibration that of the float model.
    orders: how many group-aware orders of the inputs are tried, each a solve of its own: the one by diagonal and others
    near it. An output, which no other output matters to, keeps the solution with the lowest loss.
    """

    act_order: ActOrder = "group"
    damp: float = 0.01
    block_size: int = 128
    scale_search: ScaleSearch | str = "in_loop"
    sweeps: int = 2
    targets: Targets | None = dataclasses.field(default_factory=Targets)
    bias_correction: bool = False
    orders: int = 1
    name: str = dataclasses.field(default="gptq", init=False)
    separable = True

    def __post_init__(self):
        _check_options(self.act_order, self.damp, self.block_size, self.scale_search, self.sweeps)
        if not isinstance(self.targets, Targets | None):
            raise TypeError(f"targets={self.targets!r}; give a Targets value, or None")
        if not isinstance(self.orders, int) or isinstance(self.orders, bool) or self.orders < 1:
            raise ValueError(f"orders={self.orders!r}; give a positive integer")
        if self.orders > 1 and self.act_order != "group":
            raise ValueError(f'orders={self.orders} are of act_order="group", not {self.act_order!r}; leave one out')

    def prepare(self, hessian: Hessian, grid: Grid) -> "Factors":
        """What `solve` takes in the Hessian's place to solve several weights with one factorization an order."""
        group_length = grid.group_length(hessian.in_features)
        return Factors(
            tuple(
                _prepare(hessian, group_length, self.damp, self.act_order, self.block_size, weights)
                for weights in _order_weights(hessian.in_features, self.orders)
            )
        )

    def solve(self, w: Array, hessian: "Hessian | Factors", grid: Grid) -> tuple[tensor.QuantizedTensor, Info]:
        (solved,) = self.solve_all([w], hessian, grid)
        return solved

    def solve_all(
        self, weights: Sequence[Array], hessian: "Hessian | Factors", grid: Grid
    ) -> list[tuple[tensor.QuantizedTensor, Info]]:
        """Solves weights that see the same inputs as one, their outputs side by side."""
        for w in weights:
            check_weight(w, grid)
        if not isinstance(hessian, Factors):
            check_hessian(weights[0], hessian)
            hessian = self.prepare(hessian, grid)
        return _packed(weights, hessian, grid, self.act_order, self.block_size, self.scale_search, self.sweeps)


class Prepared(NamedTuple):
    """A Hessian's factor for one order of its inputs: all that weights which see these inputs need of it."""

    inputs: Int[Array, " slots"]  # the input in each slot, in_features where the slot is empty
    groups: Int[Array, " slots"]  # the group whose grid the slot uses
    factor: Factor
    inverses: Float[Array, "groups group group"] | None  # of the factor's own block of each group; None: one group
    diagonal: Float[Array, " in"]  # the Hessian's
    tokens: Int[Array, ""]
    dead_inputs: Int[Array, ""]
    finite: Bool[Array, ""]  # whether the Hessian was

    def energy(self, d: Float[Array, "in out"]) -> Float[Array, ""]:
        """tr(dᵀ H d), as `Hessian.energy` gives it."""
        return self.factor.energy(_in_slots(d, self.inputs))


class Factors(NamedTuple):
    """A Hessian's factors, for each order that is tried."""

    orders: tuple[Prepared, ...]

    @property
    def tokens(self) -> Int[Array, ""]:
        return self.orders[0].tokens

    @property
    def diagonal(self) -> Float[Array, " in"]:
        return self.orders[0].diagonal

    def energy(self, d: Float[Array, "in out"]) -> Float[Array, ""]:
        return self.orders[0].energy(d)


# Standard deviation of the logarithm of what multiplies the diagonal by which inputs are ordered, in all orders but the
# first. With 1.5 held-out layer errors were 0.4 % larger (four orders, a small model).
SPREAD = 0.5


def _order_weights(in_features: int, orders: int) -> Float[np.ndarray, "orders in"]:
    """What multiplies the diagonal by which inputs are ordered; alike in every call and every version of NumPy."""
    draws = np.random.RandomState(0).standard_normal((orders - 1, in_features))
    return np.concatenate([np.ones((1, in_features)), np.exp(SPREAD * draws)]).astype(np.float32)


def gptq(
    w: Float[Array, "in out"],
    hessian: Hessian,
    grid: Grid,
    *,
    act_order: ActOrder = False,
    damp: float = 0.01,
    block_size: int = 128,
    scale_search: ScaleSearch | str = None,
    sweeps: int = 0,
) -> tuple[tensor.QuantizedTensor, Info]:
    """Quantizes one weight to minimize the output error on the inputs that `hessian` has seen.

    act_order: the order in which inputs are quantized. False: as they come. True: by falling diagonal of the
        Hessian, groups formed in that order, the permutation kept in the tensor (one group alone needs none).
        "static": the same order, but each input uses its natural group's grid, fitted to the original weight
        beforehand: no permutation at inference. "group": group-aware reordering: groups by their largest diagonal,
        inputs by diagonal within a group; no permutation either.
    damp: added to the diagonal, in units of its mean; grows tenfold while the factorization fails (info.damp).
    block_size: inputs in a lazy batch; changes speed, not the codes (but for rounding in float32).
    scale_search: how a group's scale and zero are chosen. None: by its smallest and largest weight. "lp": by the
        rounding errors of its weights (see jgptq.grid.search). "in_loop": by the loss of the group's own solve with
        each of some fifteen candidates (see jgptq.solvers.fits), of either sign where the grid is symmetric.
    sweeps: how often each group is then solved again with all others fixed (see jgptq.solvers.sweeps).

    Dead inputs (always zero in calibration) are rounded to nearest. Each group's grid is fitted to the weights as
    compensated when the group is reached.
    """
    check_weight(w, grid)
    check_hessian(w, hessian)
    _check_options(act_order, damp, block_size, scale_search, sweeps)
    (weights,) = _order_weights(w.shape[0], 1)
    prepared = _prepare(hessian, grid.group_length(w.shape[0]), damp, act_order, block_size, weights)
    (solved,) = _packed([w], Factors((prepared,)), grid, act_order, block_size, scale_search, sweeps)
    return solved


def _check_options(act_order: Any, damp: Any, block_size: Any, scale_search: Any, sweeps: Any) -> None:
    # 0 and 1 equal False and True, but are not them.
    if not isinstance(act_order, bool | str) or act_order not in ACT_ORDERS:
        raise ValueError(f"act_order={act_order!r}; choose one of {ACT_ORDERS}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size={block_size!r}; give a positive integer")
    if scale_search not in FITS:
        raise ValueError(f"scale_search={scale_search!r}; choose one of {tuple(FITS)}")
    if not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps={sweeps!r}; give 0 or a positive integer")
    if sweeps and act_order == "static":
        raise ValueError('sweeps go over whole groups, which act_order="static" takes apart; use "group", or sweeps=0')
    check_damp(damp)


def _packed(weights, factors, grid, *options):
    first, *others = factors.orders
    outputs = tuple(energy(factors, (w,)) for w in weights)

    def solve(prepared):
        return _solve(tuple(weights), outputs, prepared, grids.levels(grid), *options)

    solved = solve(first)
    for prepared in others:
        solved = [_better(*pair, grid.scale_dtype) for pair in zip(solved, solve(prepared), strict=True)]
    return [
        (pack(own.codes, own.scales, own.zeros, grid=grid, permutation=own.permutation, dtype=w.dtype), own.info)
        for w, own in zip(weights, solved, strict=True)
    ]


def tile_of(scale_search: Any, sweeps: int) -> int:
    """Outputs solved at once on a CPU."""
    return TILE if scale_search or sweeps else TILE_WITHOUT_SEARCH


class Solved(NamedTuple):
    """A weight's codes, rows as they are stored, and its groups' grids; the loss that `Info` has the sum of."""

    codes: Integer[Array, "in out"]
    scales: Float[Array, "groups out"]
    zeros: Float[Array, "groups out"]
    permutation: Int[Array, " in"] | None
    loss: Float[Array, " out"]
    added: Float[Array, " out"]  # of the loss, what damping added
    info: Info


@functools.partial(jax.jit, static_argnames="scale_dtype", donate_argnums=0)
def _better(one, other, scale_dtype):
    """For each output the solution with the lower error, damping left out: factors of two orders may differ in it."""
    better = other.loss - other.added < one.loss - one.added
    better |= one.info.failed & ~other.info.failed
    codes, scales, zeros = (
        jnp.where(better[None], getattr(other, name), getattr(one, name)) for name in ("codes", "scales", "zeros")
    )
    loss, added = (jnp.where(better, getattr(other, name), getattr(one, name)) for name in ("loss", "added"))
    info = dataclasses.replace(
        one.info,
        loss=jnp.sum(loss),
        relative_error=relative(jnp.sum(loss) - jnp.sum(added), one.info.output),
        damp=jnp.maximum(one.info.damp, other.info.damp),
        failed=one.info.failed & other.info.failed,
        scales_at_limit=scales_at_limit(scales.astype(scale_dtype)),
    )
    return Solved(codes, scales, zeros, one.permutation, loss, added, info)


@functools.partial(jax.jit, static_argnames=("group_length", "act_order", "block_size"))
def _prepare(hessian, group_length, damp, act_order, block_size, order_weights):
    plan = _plan(hessian.in_features, group_length, block_size)
    diagonal = jnp.diagonal(hessian.total)
    inputs, groups = _order(diagonal * order_weights, plan, act_order)
    # A sum does not lose NaN or infinity, and small numbers do not sum to infinity. The Booleans of isfinite would take
    # a quarter of a Hessian; a product with zeros, all of one, since XLA shares the zeros that the factor starts from.
    dead, finite = jnp.sum(diagonal <= 0), jnp.isfinite(jnp.sum(hessian.total * 1e-30))
    factored = factor(hessian, damp, inputs)
    inverses = group_inverses(factored.lower, plan.group) if plan.group < inputs.shape[0] else None
    return Prepared(inputs, groups, factored, inverses, hessian.diagonal, hessian.tokens, dead, finite)


@functools.partial(jax.jit, static_argnames=("act_order", "block_size", "scale_search", "sweeps"))
def _solve(weights, outputs, prepared, grid, act_order, block_size, scale_search, sweeps):
    """What is `Solved` of each weight. outputs: their energies."""
    inputs, slot_groups, factored, inverses, *_ = prepared
    block = Block(factored.lower, factored.pivots, inverses)
    weights = [w.astype(jnp.float32) for w in weights]
    together = jnp.concatenate(weights, axis=1)
    in_features, out_features = together.shape
    group_length = grid.group_length(in_features)
    plan = _plan(in_features, group_length, block_size)

    factors = group_factors(factored, plan.group) if sweeps else None

    def of_tile(tile):
        rows = None
        if act_order == "static":
            rows = Rows(*grids.fit_groups(tile, grid, grids.search if scale_search else grids.fit), slot_groups)
        tile = _in_slots(tile, inputs)
        fit = FITS[scale_search]
        solution = descend(tile, None, block, rows, grid, fit, plan.group, plan.sizes)
        if factors is not None:
            solution = sweep(tile, solution, factored, factors, grid, plan.sizes, sweeps)
        # The loss is that of the damped Hessian; what was added to its diagonal comes off again.
        added = jnp.dot(factored.added, solution.errors**2, precision=HIGHEST)
        grids_used = rows or solution
        return solution.codes, grids_used.scales, grids_used.zeros, solution.loss[None], added[None]

    parts = over_outputs(of_tile, together, tile_of(scale_search, sweeps))
    codes, scales, zeros, loss, added = (jnp.moveaxis(part, 0, 1).reshape(-1, out_features) for part in parts)

    codes = jnp.zeros((in_features, out_features), jnp.uint8).at[inputs].set(codes, mode="drop")
    permutation = None
    if act_order == "group":
        reached = slot_groups[:: plan.group]
        scales, zeros = jnp.zeros_like(scales).at[reached].set(scales), jnp.zeros_like(zeros).at[reached].set(zeros)
    if act_order is True and group_length < in_features:
        groups = jnp.zeros(in_features, jnp.int32).at[inputs].set(slot_groups, mode="drop")
        permutation = jnp.argsort(groups, stable=True).astype(jnp.int32)
        codes = codes[permutation]
    groups = -(-in_features // group_length)
    scales, zeros = scales[:groups], zeros[:groups]

    def own(w, output, codes, scales, zeros, loss, added):
        loss, added = jnp.sum(loss, axis=0), jnp.sum(added, axis=0)
        info = Info(
            loss=jnp.sum(loss),
            relative_error=relative(jnp.sum(loss) - jnp.sum(added), output),
            output=output,
            damp=factored.damp,
            tokens=prepared.tokens,
            dead_inputs=prepared.dead_inputs,
            failed=factored.failed,
            scales_at_limit=scales_at_limit(scales.astype(grid.scale_dtype)),
            finite=jnp.all(jnp.isfinite(w)) & prepared.finite,
        )
        return Solved(codes, scales, zeros, permutation, loss, added, info)

    ends = np.cumsum([w.shape[1] for w in weights])[:-1]
    split = (jnp.split(values, ends, axis=1) for values in (codes, scales, zeros, loss, added))
    return [own(*each) for each in zip(weights, outputs, *split, strict=True)]


def _in_slots(d: Float[Array, "in out"], inputs: Int[Array, " slots"]) -> Float[Array, "slots out"]:
    return jnp.take(d, inputs, axis=0, mode="fill", fill_value=0)


class _Plan(NamedTuple):
    """How inputs are laid out in slots: groups padded to `group` slots, solved in nested blocks of `sizes` slots."""

    inputs: np.ndarray  # (slots,) the input in each slot in natural order; in_features where the slot is empty
    group: int
    sizes: tuple[int, ...]


def _plan(in_features: int, group_size: int, block_size: int) -> _Plan:
    def round_up(n: int) -> int:
        return n if n < STRIP else -(-n // STRIP) * STRIP

    groups = -(-in_features // group_size)
    if group_size <= block_size:
        group = round_up(group_size)
        blocks = -(-groups // max(1, block_size // group))
        block = group * -(-groups // blocks)
    else:
        blocks_in_group = -(-group_size // block_size)
        block = round_up(-(-group_size // blocks_in_group))
        group = block * blocks_in_group
        blocks = blocks_in_group * groups
    slots = np.arange(block * blocks)
    within = slots % group
    inputs = (slots // group) * group_size + within
    inputs = np.where((within < group_size) & (inputs < in_features), inputs, in_features)
    # Several blocks at a time make the longest sums larger products.
    together = next(n for n in range(max(1, CHUNK // block), 0, -1) if blocks % n == 0)
    if group > block:
        together = next(n for n in range(together, 0, -1) if (group // block) % n == 0)
    sizes = sorted({group, block, block * together, min(STRIP, group, block)}, reverse=True)
    return _Plan(inputs, group, tuple(size for size in sizes if size < len(slots)))


def _order(
    diagonal: Float[Array, " in"], plan: _Plan, act_order: ActOrder
) -> tuple[Int[Array, " slots"], Int[Array, " slots"]]:
    """The input in each slot, and the group whose grid the slot uses."""
    natural, (in_features,) = jnp.asarray(plan.inputs), diagonal.shape
    group_of_slot = jnp.arange(natural.shape[0]) // plan.group
    if act_order is False:
        return natural, group_of_slot
    if act_order == "group":
        # Empty slots go last in their group, empty groups last of all.
        blocks = jnp.append(diagonal, -1.0)[natural].reshape(-1, plan.group)
        within = jnp.argsort(-blocks, axis=1, stable=True)
        groups = jnp.argsort(-jnp.max(blocks, axis=1), stable=True)
        inputs = jnp.take_along_axis(natural.reshape(-1, plan.group), within, axis=1)[groups]
        return inputs.reshape(-1), jnp.repeat(groups, plan.group)
    falling = jnp.append(jnp.argsort(-diagonal, stable=True), in_features)
    inputs = falling[natural]
    if act_order == "static":
        slot_of_input = np.flatnonzero(plan.inputs < in_features)
        return inputs, jnp.append(group_of_slot[slot_of_input], 0)[inputs]
    return inputs, group_of_slot
