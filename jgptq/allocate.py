"""Mixed precision: the bits and the group size of each weight, for a given average of bits.

Every weight is solved with every candidate grid on the float model's activations, and what is wrong with its output
then is its cost. Which candidates cost least together, under a budget of bits, is a multiple-choice knapsack problem,
small enough to be solved exactly.
"""

import fnmatch
import glob
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.executor import Executor, part_key
from jgptq.grid import BITS, Grid
from jgptq.hessian import Hessian
from jgptq.rules import Options, Rule, checked_rules, chosen_sites, settings_of
from jgptq.solvers import AWQ, Method
from jgptq.solves import share
from jgptq.tensor import Index, Layout
from jgptq.tracing.gradients import Loss
from jgptq.tracing.graph import Part, Site, Step

# Group sizes that runtimes have kernels for.
GRIDS = tuple(Grid(bits=bits, group_size=size) for bits in BITS for size in (32, 64, 128))
# For 200 weights, rounding sizes up to one of these takes 0.15 % of the budget at most.
UNITS = 1 << 17


def allocate(
    f: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    average_bits: float | int,
    grids: Sequence[Grid] = GRIDS,
    method: str | Method = "gptq",
    quality: Literal["fast", "balanced", "best"] = "fast",
    rules: Sequence[Rule] | None = None,
    together: bool = True,
    loss: Loss | None = None,
) -> list[Rule]:
    """Rules for `quantize` that give each weight of f(params, *inputs) the one of `grids` with which all cost least.

    A Flax NNX module takes the place of f and params: allocate(module, batches, …).

    average_bits: bits a weight, at most, over all that is quantized, with its scales and zeros as checkpoints store
        them: 3 bits with 16-bit scales and 3-bit zeros for groups of 32 are 3.59 on average.
    grids: what to choose from. Of their group sizes a weight takes only those that divide its inputs, if there is one.
    method, quality: what solves the weights in order to see their errors; `quantize` may use another.
    rules: as `quantize` takes them. A weight whose grid they set keeps it, and counts; one left alone does not count.
    together: one grid for all weights that read the same activations (q, k and v; gate and up), as runtimes that fuse
        them into one product need it. A leaf that holds many weights, such as a stack of layers, has one in any case.
    loss: loss(outputs, inputs) of a batch gives one number, such as jgptq.next_token_loss. An error in a weight's
        output then costs what it adds to the float model's loss, by the squares of the loss's gradient there; without
        it, what it is of the output, which is a poorer guide. See `quantize` for what the gradient takes.

    The rules given come after those made.
    """
    grids = _checked_grids(grids)
    given = checked_rules(rules or ())
    default = settings_of(grids[0], method, quality)[1]
    executor = Executor(f, params, batches, merge=loss is None)
    complete = [(pattern, _with_method(options, default, quality)) for pattern, options in given]
    plan = chosen_sites(executor.sites, None, default, complete)
    sites = {site.leaf: site for site in executor.sites if site.leaf in plan}
    _check_paths(sites)
    executor.check_weights(list(sites.values()))
    steps = executor.choose(plan)
    free = [leaf for leaf, (grid, _) in plan.items() if grid is None]
    if not free:
        return given
    choices = {leaf: candidates(sites[leaf].layout.in_features, grids) for leaf in free}
    # Sizes first: a budget that nothing fits is refused before the work.
    sizes = {leaf: _sizes(sites[leaf].layout, grids, choices[leaf]) for leaf in free}
    fixed = sum(stored_bits(sites[leaf].layout, grid) for leaf, (grid, _) in plan.items() if grid is not None)
    elements = sum(math.prod(site.shape) for site in sites.values())
    budget = _checked_budget(average_bits, elements, float(fixed + sum(table.min() for table in sizes.values())))
    sensitivity = executor.weigh(loss) if loss is not None else {}
    costs = _costs(_all_errors(executor, steps, plan, sites, choices, grids, sensitivity))
    groups = _fused(free, steps) if together else [[leaf] for leaf in free]
    picked = allocation(
        np.array([sum(costs[leaf] for leaf in group) for group in groups]),
        np.array([sum(sizes[leaf] for leaf in group) for group in groups]),
        float(budget - fixed),
    )
    grid_of = {leaf: grids[pick] for group, pick in zip(groups, picked, strict=True) for leaf in group}
    return [_rule(sites[leaf], grid, given) for leaf, grid in sorted(grid_of.items())] + given


def _all_errors(
    executor: Executor,
    steps: Sequence[Step],
    plan: dict[int, tuple[Grid | None, Method]],
    sites: dict[int, Site],
    choices: dict[int, list[int]],
    grids: Sequence[Grid],
    sensitivity: dict[tuple[int, Index], float],
) -> list[tuple[int, float | None, np.ndarray]]:
    """Of each part that may choose: its leaf, what its output's errors cost if that is known, and these by grid."""
    found = []
    for step in steps:
        parts = [part for part in step.parts if part.leaf in choices]
        if not parts:
            continue
        hessian, _ = executor.moments(step)
        if hessian.total.ndim == 3:
            hessian, _ = share(hessian)
        for part in parts:
            site, (_, of) = sites[part.leaf], plan[part.leaf]
            relative, output = _errors(executor, site, part, hessian, grids, choices[part.leaf], of)
            minded = sensitivity.get(part_key(part))
            found.append((part.leaf, None if minded is None else minded * output, relative))
    return found


def stored_bits(layout: Layout, grid: Grid) -> int:
    """Bits that a weight takes in a checkpoint: codes, scales in their dtype, and zeros, if any, as wide as codes."""
    groups = -(-layout.in_features // grid.group_length(layout.in_features))
    each = jnp.finfo(grid.scale_dtype).bits + (0 if grid.symmetric else grid.bits)
    columns = math.prod(layout.shape) // layout.in_features
    return columns * (layout.in_features * grid.bits + groups * each)


def allocation(costs: np.ndarray, sizes: np.ndarray, budget: float | int, *, units: int = UNITS) -> np.ndarray:
    """The choice for each weight with the least sum of costs whose sum of sizes is at most the budget.

    costs: (weights, choices), infinite where there is no such choice. sizes: likewise, in whole bits. units: into how
        many the budget is divided at most.

    Dynamic programming over what the weights so far take beyond their smallest choices, in units of the sizes' greatest
    common divisor. Exact if there are at most `units` of them; otherwise they are made larger and sizes rounded up.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.float64)
    allowed = np.isfinite(costs) & np.isfinite(sizes)
    if costs.shape != sizes.shape or costs.ndim != 2 or not allowed.any(axis=1).all():
        raise ValueError(
            f"costs {costs.shape} and sizes {sizes.shape}; give two (weights, choices) with a finite choice for each"
        )
    smallest = np.where(allowed, sizes, np.inf).min(axis=1)
    if budget < smallest.sum():
        raise ValueError(f"a budget of {budget:g}, but the smallest choices take {smallest.sum():g}; give more")
    extra = np.where(allowed, sizes - smallest[:, None], 0).astype(np.int64)
    left = min(math.floor(budget - smallest.sum()), int(extra.max(axis=1).sum()))
    unit = max(int(np.gcd.reduce(extra, axis=None)), -(-left // units), 1)
    extra, room = -(-extra // unit), left // unit
    # best[s]: the least cost of the weights so far with at most s units.
    best, picks = np.zeros(room + 1), np.zeros((len(costs), room + 1), np.int16)
    for weight in range(len(costs)):
        totals = np.full(room + 1, np.inf)
        for choice in np.flatnonzero(allowed[weight] & (extra[weight] <= room)):
            step = extra[weight, choice]
            total = best[: room + 1 - step] + costs[weight, choice]
            better = total < totals[step:]
            totals[step:][better] = total[better]
            picks[weight, step:][better] = choice
        best = totals
    found, at = np.zeros(len(costs), np.int64), room
    for weight in reversed(range(len(costs))):
        found[weight] = picks[weight, at]
        at -= extra[weight, found[weight]]
    return found


def _checked_grids(grids: Any) -> tuple[Grid, ...]:
    grids = tuple(grids) if isinstance(grids, Iterable) else grids
    if not grids or not isinstance(grids, tuple) or not all(isinstance(grid, Grid) for grid in grids):
        raise TypeError(f"grids={grids!r}; give a sequence of jgptq.Grid to choose from")
    return tuple(dict.fromkeys(grids))


def _sizes(layout: Layout, grids: Sequence[Grid], numbers: Sequence[int]) -> np.ndarray:
    return _table({number: stored_bits(layout, grids[number]) for number in numbers}, len(grids))


def _checked_budget(average_bits: Any, elements: int, least: float) -> float:
    """The budget in bits of weights with so many elements, that take so many bits at least."""
    if isinstance(average_bits, bool) or not isinstance(average_bits, int | float) or not 0 < average_bits < math.inf:
        raise ValueError(f"average_bits={average_bits!r}; give a positive number of bits a weight, such as 3.5")
    if least > average_bits * elements:
        raise ValueError(
            f"average_bits={average_bits}; with scales and zeros the smallest choice takes {least / elements:.3f} bits "
            "a weight: give that or more, or grids of fewer bits or larger groups"
        )
    return float(average_bits * elements)


def _with_method(options: Options | None, default: Method, quality: str) -> Options | None:
    """A rule's options with a Method value; a grid of None is to be chosen."""
    if options is None:
        return None
    method = settings_of(options.grid or Grid(), options.method or default, quality)[1]
    return Options(grid=options.grid, method=method, tied=options.tied)


def _check_paths(sites: dict[int, Site]) -> None:
    paths = [site.path for site in sites.values()]
    doubled = next((path for path in paths if paths.count(path) > 1), None)
    if doubled:
        raise ValueError(f"two weights have the path {doubled}, so no rule could tell them apart; rename one")


def candidates(in_features: int, grids: Sequence[Grid]) -> list[int]:
    """The grids that a weight may take, by number; those that are the same for it only once."""
    lengths = [grid.group_length(in_features) for grid in grids]
    divide = any(in_features % length == 0 for length in lengths)
    distinct: dict[Any, int] = {}
    for number, (grid, length) in enumerate(zip(grids, lengths, strict=True)):
        if not divide or in_features % length == 0:
            distinct.setdefault((length, grid.bits, grid.symmetric, grid.scale_dtype, grid.positive_scales), number)
    return sorted(distinct.values())


def _table(values: dict[int, int] | dict[int, float], size: int) -> np.ndarray:
    """Values by number, infinite elsewhere."""
    table = np.full(size, np.inf)
    table[list(values)] = list(values.values())
    return table


def _costs(errors: Sequence[tuple[int, float | None, np.ndarray]]) -> dict[int, np.ndarray]:
    """Each leaf's cost by choice, from its parts' relative errors, each times what the whole output is worth.

    A part of which that is unknown is worth the mean of the others.
    """
    known = [worth for _, worth, _ in errors if worth is not None]
    typical = sum(known) / len(known) if known else 1.0
    costs: dict[int, Any] = {}
    for leaf, worth, relative in errors:
        costs[leaf] = costs.get(leaf, 0.0) + (typical if worth is None else worth) * relative
    return costs


def _errors(
    executor: Executor,
    site: Site,
    part: Part,
    hessian: Hessian,
    grids: Sequence[Grid],
    numbers: Sequence[int],
    method: Method,
) -> tuple[np.ndarray, float]:
    """The relative output error of a part with each of the grids `numbers`, and its output's energy."""
    w = part.layout.to_matrix(executor.leaf(part.leaf, part.index))
    found: dict[int, float] = {}
    output = 0.0
    for length in dict.fromkeys(grids[number].group_length(hessian.in_features) for number in numbers):
        alike = [number for number in numbers if grids[number].group_length(hessian.in_features) == length]
        prepared = hessian
        # AWQ prepares for scales, which it has yet to find for each weight.
        if w.ndim == 2 and hasattr(method, "prepare") and not isinstance(method, AWQ):
            prepared = method.prepare(hessian, grids[alike[0]])
        for number in alike:
            found[number], output = map(float, _relative_error(w, prepared, grids[number], method))
    bad = [number for number, error in found.items() if not math.isfinite(error)]
    if bad:
        raise ValueError(
            f"{site.name(part)} cannot be solved with {grids[bad[0]]}: its activations are not finite, or their "
            "Hessian cannot be factored; check the calibration inputs, or leave it alone with a rule"
        )
    return _table(found, len(grids)), output


def _relative_error(w: jax.Array, hessian: Any, grid: Grid, method: Method) -> tuple[jax.Array, jax.Array]:
    """Error energy over output energy, NaN where the solve failed; and the latter, a mean over tokens."""
    if w.ndim == 2:
        info = method.solve(w, hessian, grid)[1]
    else:
        matrices = w.reshape(-1, *w.shape[-2:]), hessian
        info = jax.lax.map(lambda each: method.solve(*each, grid)[1], matrices)
    tiny = jnp.finfo(jnp.float32).tiny
    part = info.tokens / jnp.maximum(jnp.sum(info.tokens), 1)
    output = jnp.sum(part * info.output)
    error = jnp.sum(part * info.relative_error * info.output) / jnp.maximum(output, tiny)
    return jnp.where(jnp.any(info.failed) | ~jnp.all(info.finite), jnp.nan, error), output


def _fused(leaves: Sequence[int], steps: Sequence[Step]) -> list[list[int]]:
    """Leaves in groups of those that share a step, directly or through others."""
    group_of = {leaf: [leaf] for leaf in leaves}
    for step in steps:
        merged = list(dict.fromkeys(leaf for part in step.parts for leaf in group_of.get(part.leaf, ())))
        for leaf in merged:
            group_of[leaf] = merged
    return list({id(group): group for group in group_of.values()}.values())


def _rule(site: Site, grid: Grid, given: Sequence[Rule]) -> Rule:
    """A rule for one weight, which keeps what else the given rules set for it."""
    options = next((options for pattern, options in given if _matches(pattern, site)), None) or Options()
    return glob.escape(site.path), Options(grid=grid, method=options.method, tied=options.tied)


def _matches(pattern: str | Callable[[Site], bool], site: Site) -> bool:
    return pattern(site) if callable(pattern) else fnmatch.fnmatchcase(site.path, pattern)
