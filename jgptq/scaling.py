"""AWQ's scales of inputs within a whole function: which weights have them, and what takes them in the end."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.executor import Executor, part_key
from jgptq.grid import Grid
from jgptq.hessian import Hessian
from jgptq.solvers import AWQ, RTN, Method
from jgptq.tensor import Index, QuantizedTensor
from jgptq.tracing.folding import Fold, columns, fold_float, fold_packed
from jgptq.tracing.graph import Part, Site, Step

NOT_SCALED = "its inputs come from nothing that could take scales, so they are not scaled"


def folds_of(
    executor: Executor, steps: Sequence[Step], sites: dict[int, Site], plan: dict
) -> dict[int, tuple[Fold, ...]]:
    """What the scales of each step's inputs are to go into, by the step's number; none for a step where they cannot."""
    parts = {part_key(part): part for step in steps for part in step.parts}

    def takes(fold: Fold) -> bool:
        if fold.leaf not in plan:
            return True
        part = parts.get((fold.leaf, fold.index))
        return part is not None and not sites[fold.leaf].tied and columns(fold, part.layout) is not None

    found = {}
    for number, step in enumerate(steps):
        methods = {plan[part.leaf][1] for part in step.parts}
        if len(methods) == 1 and isinstance(*methods, AWQ) and not any(sites[part.leaf].tied for part in step.parts):
            folds = executor.folds(step)
            if folds is not None and all(map(takes, folds)):
                found[number] = folds
    return found


def own_settings(step: Step, plan: dict, several: set[int], folds: bool) -> dict[int, tuple[Grid, Method]]:
    """Grid and method of each leaf of a step: AWQ's solver alone where its scales can neither go elsewhere nor stay.

    They cannot stay with leaves of `several` inputs.
    """
    own = {}
    for part in step.parts:
        grid, method = plan[part.leaf]
        if isinstance(method, AWQ) and not folds and (part.leaf in several or not method.input_scales):
            method = method.solver
        own[part.leaf] = grid, method
    return own


def input_scales(
    executor: Executor, todo: Sequence[Part], targets: dict, hessian: Hessian, own: dict, known: dict[Method, Any]
) -> dict[Method, jax.Array]:
    """The scales of a step's inputs for each method that has such. known: those of finished weights, by method."""
    found = {}
    for method in {own[part.leaf][1] for part in todo if isinstance(own[part.leaf][1], AWQ)}:
        shape = hessian.total.shape[:-1]
        if method in known:
            scales = known[method]
            found[method] = jnp.ones(shape) if scales is None else jnp.asarray(scales[...]).reshape(shape)
            continue
        parts = [part for part in todo if own[part.leaf][1] == method]
        grids = tuple(own[part.leaf][0] for part in parts)
        weights = (_target(executor, part, targets) for part in parts)
        if hessian.total.ndim == 2:
            found[method] = method.scales(weights, hessian, grids)
        else:
            matrices = [w.reshape(-1, *w.shape[-2:]) for w in weights]
            found[method] = _scales_of_batch(matrices, hessian, grids, method)
    return found


def _target(executor: Executor, part: Part, targets: dict) -> jax.Array:
    """What a part is solved towards, as (batch…, in, out)."""
    if part_key(part) in targets:
        return targets[part_key(part)]
    return part.layout.to_matrix(executor.leaf(part.leaf, part.index))


@functools.partial(jax.jit, static_argnames=("grids", "method"))
def _scales_of_batch(weights: list[jax.Array], hessian: Hessian, grids: tuple[Grid, ...], method: AWQ) -> jax.Array:
    return jax.lax.map(lambda operands: method.scales(*operands, grids), (weights, hessian))


def fold_scales(
    leaves: list[Any],
    all_parts: dict[int, dict[Index, QuantizedTensor]],
    steps: Sequence[Step],
    folds: dict[int, tuple[Fold, ...]],
) -> None:
    """Moves the scales of inputs into what the inputs are computed from, in place."""
    for number, targets in folds.items():
        scales = all_parts[steps[number].parts[0].leaf][steps[number].parts[0].index].input_scales
        if scales is None:
            continue
        factors = 1 / np.asarray(scales[...], np.float64)
        for part in steps[number].parts:
            weight = all_parts[part.leaf][part.index]
            all_parts[part.leaf][part.index] = dataclasses.replace(weight, input_scales=None)
        for fold in targets:
            if fold.leaf in all_parts:
                weight = all_parts[fold.leaf][fold.index]
                all_parts[fold.leaf][fold.index] = fold_packed(weight, fold, factors)
            else:
                leaves[fold.leaf] = fold_float(jnp.asarray(leaves[fold.leaf][...]), fold, factors)


def as_asked(row: Any, weight: QuantizedTensor, asked: Method, used: Method, folds: bool) -> Any:
    """The row as it is to be reported: scales that will fold take no bytes, and RTN that stood in for AWQ is noted."""
    if folds:
        return dataclasses.replace(row, nbytes=row.nbytes - weight.input_scales.nbytes)
    if used == asked or not isinstance(used, RTN):
        return row
    note = NOT_SCALED if asked.input_scales else f"{NOT_SCALED}: AWQ(input_scales=True) would keep them"
    return dataclasses.replace(row, method=asked.name, notes=(*row.notes, note))
