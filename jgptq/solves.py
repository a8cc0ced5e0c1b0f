"""The solves of a step: what its weights are solved towards, what they share, and which of them are solved as one."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.executor import Executor, part_key
from jgptq.grid import Grid, Levels, levels
from jgptq.hessian import Hessian
from jgptq.sharding import solve_by_outputs
from jgptq.solvers import RTN, Info, Method, nearest
from jgptq.solvers.awq import Scaled, scale_hessian
from jgptq.solvers.method import energy, relative, solve_all
from jgptq.solvers.targets import Drift, Targets, corrections, moved
from jgptq.tensor import Index, QuantizedTensor
from jgptq.tracing.graph import Part, Step

# Weights of few outputs are solved side by side, up to so many in all, which keep every processor of a GPU busy while
# inputs go one by one. A CPU is busy with few.
FILLING, OUTPUTS = 16384, {"cpu": 0}
# Where the matrices of a batch are solved one after another.
ONE_BY_ONE = ("cpu",)


def all_prepared(
    hessian: Hessian, settings: Iterable[tuple[Grid, Method]], scales: dict[Method, jax.Array]
) -> dict[tuple[Grid, Method], Any]:
    """What solves with these settings take: the Hessian, or what the method prepares in its place.

    scales: of the inputs, for methods that have such.
    """
    prepared: dict[Any, Any] = {}

    def of(grid: Grid, method: Method) -> Any:
        if hessian.total.ndim != 2 or not hasattr(method, "prepare"):
            return hessian
        key = grid.group_length(hessian.in_features), method
        if key not in prepared:
            own = (scales[method],) if method in scales else ()
            prepared[key] = method.prepare(hessian, grid, *own)
        return prepared[key]

    return {each: of(*each) for each in settings}


def all_targets(
    executor: Executor, step: Step, hessian: Hessian, drift: Drift | None, plan: dict[int, tuple[Grid, Method]]
) -> dict[tuple[int, Index], jax.Array]:
    """What the parts of a step are to be solved towards, where that is not the parts themselves."""
    found: dict[tuple[int, Index], jax.Array] = {}
    if drift is None:
        return found
    wanted: list[Targets | None] = [getattr(plan[part.leaf][1], "targets", None) for part in step.parts]
    ridges = {targets.ridge for targets in wanted if targets}
    # `corrections` takes the drift's memory; rarely do rules ask for several, each of which then gets its own.
    drifts = [drift] + [jax.tree.map(jnp.copy, drift) for _ in range(len(ridges) - 1)]
    by_ridge = {ridge: corrections(hessian, own, ridge) for ridge, own in zip(ridges, drifts, strict=False)}
    for number, (part, targets) in enumerate(zip(step.parts, wanted, strict=True)):
        if targets:
            correction = by_ridge[targets.ridge]
            w = _matrices(executor, part)
            batch = w.reshape(-1, *w.shape[-2:]) if w.ndim > 2 else w
            strengths = jnp.array([targets.inputs, targets.residual], jnp.float32)
            target = moved(batch, correction.inputs, correction.residuals.get(number), strengths)
            found[part_key(part)] = target.reshape(w.shape)
    return found


def stacks(executor: Executor, parts: Sequence[Part], plan: dict[int, tuple[Grid, Method]]) -> list[list[Part]]:
    """The parts of a step by what is solved as one."""
    return stacked(parts, plan, on_mesh=executor.mesh is not None)


def stacked(parts: Sequence[Part], plan: dict[int, tuple[Grid, Method]], *, on_mesh: bool) -> list[list[Part]]:
    """The parts of a step by what is solved as one: those of one grid and method, up to `OUTPUTS` outputs.

    plan: grid and method by leaf. on_mesh: whether outputs are divided among devices, which have one part at a time.
    """
    most = OUTPUTS.get(jax.default_backend(), FILLING)
    found: list[list[Part]] = []
    for part in parts:
        method = plan[part.leaf][1]
        alone = on_mesh or part.layout.batch_axes or not getattr(method, "separable", False)
        room = most - part.layout.out_features
        fits = (
            stack
            for stack in found
            if not alone
            and plan[stack[0].leaf] == plan[part.leaf]
            and sum(other.layout.out_features for other in stack) <= room
        )
        stack = next(fits, None)
        if stack is None:
            found.append([part])
        else:
            stack.append(part)
    return found


def solve_stack(
    executor: Executor, stack: Sequence[Part], targets: dict, prepared: dict, scales: dict, grid: Grid, method: Method
) -> list[tuple[QuantizedTensor, Info, jax.Array]]:
    """For each part the weight, what its solve says of itself, and the error of rounding to nearest.

    targets: what to solve towards, by `part_key`, taken out of it; without one, the weight itself. prepared: of
    `all_prepared`. scales: of the inputs, by method.
    """
    weights = [_matrices(executor, part) for part in stack]
    goals = [targets.pop(part_key(part), w) for part, w in zip(stack, weights, strict=True)]
    shared = prepared[grid, method]
    batch = weights[0].ndim > 2
    by_outputs = executor.mesh is not None and getattr(method, "separable", False)
    if not batch and not by_outputs:
        solved = _solve_matrices(weights, goals, shared, grid, method)
    else:
        solve, operands = solve_matrix, (*weights, *goals, shared)
        if batch:
            batches = (matrix.reshape(-1, *matrix.shape[-2:]) for matrix in operands[:2])
            solve, operands = _solve_batch, (*batches, shared, scales.get(method))
        if by_outputs:
            solved = [solve_by_outputs(*operands, solve=solve, grid=grid, method=method, mesh=executor.mesh)]
        else:
            solved = [solve(*operands, grid, method)]
    return [
        (_placed(weight, part, w), info, error)
        for part, w, (weight, info, error) in zip(stack, weights, solved, strict=True)
    ]


def _matrices(executor: Executor, part: Part) -> jax.Array:
    return part.layout.to_matrix(executor.leaf(part.leaf, part.index))


def _placed(weight: QuantizedTensor, part: Part, w: jax.Array) -> QuantizedTensor:
    """With the batch axes of a part, and its layout and dtype."""
    weight = jax.tree.map(lambda array: array.reshape(*w.shape[:-2], *array.shape[w.ndim > 2 :]), weight)
    return dataclasses.replace(weight, layout=part.layout, dtype=w.dtype)


class Outcome(NamedTuple):
    """What a solve says of itself; for a batch of matrices with a leading axis."""

    info: Info
    rtn_error: Any
    tokens: Any


def solve_matrix(w: jax.Array, target: jax.Array, shared: Any, grid: Grid, method: Method) -> Any:
    """One (in, out) weight: the packed one, its Info and the error of rounding to nearest."""
    (solved,) = _solve_matrices([w], [target], shared, grid, method)
    return solved


def _solve_matrices(
    weights: Sequence[jax.Array], goals: Sequence[jax.Array], shared: Any, grid: Grid, method: Method
) -> list:
    def rounding_error(w, target, info):
        if method == RTN() and target is w:
            return info.relative_error
        return _rtn_error(w, target, shared, info, grid)

    return [
        (weight, info, rounding_error(w, target, info))
        for w, target, (weight, info) in zip(weights, goals, solve_all(method, goals, shared, grid), strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("grid", "method"))
def _solve_batch(
    w: jax.Array, target: jax.Array, hessian: Hessian, scales: jax.Array | None, grid: Grid, method: Method
) -> Any:
    """Matrices with a Hessian each, so many `at_once`."""

    def solve(operands):
        w, target, hessian, scales = operands
        scaled = hessian if scales is None else Scaled(scales, scale_hessian(hessian, scales))
        weight, info = method.solve(target, scaled, grid)
        return weight, info, _rtn_error(w, target, hessian, info, grid)

    count = at_once(len(w))
    return jax.lax.map(solve, (w, target, hessian, scales), batch_size=count if count > 1 else None)


def at_once(matrices: int) -> int:
    """How many matrices of a batch are solved at a time: on a CPU one; elsewhere as many as have an eighth of the
    Hessians, so that their factors take no more memory than that."""
    most = 1 if jax.default_backend() in ONE_BY_ONE else max(1, matrices // 8)
    return next(count for count in range(most, 0, -1) if matrices % count == 0)


def share(hessian: Hessian, drift: Drift | None = None) -> tuple[Hessian, Drift | None]:
    """A matrix that saw fewer tokens than it has inputs gets the sums of all, in the place of those given."""
    sums = (hessian.total, None if drift is None else drift.inputs)
    tokens, (total, inputs) = _share(hessian.tokens, sums)
    return Hessian(total, tokens), drift and drift._replace(inputs=inputs)


@functools.partial(jax.jit, donate_argnums=1)
def _share(tokens: jax.Array, sums: Any) -> tuple[jax.Array, Any]:
    starved = tokens < jax.tree.leaves(sums)[0].shape[-1]
    sums = jax.tree.map(lambda each: jnp.where(starved[:, None, None], jnp.sum(each, axis=0), each), sums)
    return jnp.where(starved, jnp.sum(tokens), tokens), sums


def _rtn_error(w: jax.Array, target: jax.Array, shared: Any, info: Info, grid: Grid) -> jax.Array:
    """The relative output error of rounding to nearest."""
    return relative(energy(shared, (w, target), _rounding_errors, levels(grid)), info.output)


def _rounding_errors(w: jax.Array, target: jax.Array, grid: Levels) -> jax.Array:
    return target.astype(jnp.float32) - nearest(w.astype(jnp.float32), grid)[-1]
