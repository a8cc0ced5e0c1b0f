"""Where factors on the inputs of a product can go: into parameters that the inputs are computed from.

From the inputs back, equations in which a factor on the result is one on an operand are followed, as far as nothing
else reads what they give: views and casts, factors, sums (both sides), products with a weight or with a value that the
factors do not vary along, the larger of a value and zero (factors are positive), and loops that carry nothing from step
to step. Several may read a value if all they make of it is put together again. They end at parts of leaves: a norm's
scale and bias, or the weight of the product before.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.grid import round_scales
from jgptq.tensor import Index, Layout, QuantizedTensor
from jgptq.tracing.flatten import Flattener
from jgptq.tracing.graph import Graph, Step
from jgptq.tracing.jaxprs import closed, scan_counts
from jgptq.tracing.products import Dot
from jgptq.tracing.residual import PASSING

SAME_SHAPE = ("neg", "stop_gradient", "reduce_precision")


class Fold(NamedTuple):
    """Part of a leaf that factors on inputs can go into.

    places: the number of the factor for each element, -1 for none; of size 1 along axes that it does not vary along.
    offset: added to the part before anything else; the sum takes the factors.
    """

    leaf: int
    index: Index
    places: np.ndarray
    offset: float = 0.0

    def same_as(self, other: "Fold") -> bool:
        return self[:2] == other[:2] and self.offset == other.offset and np.array_equal(self.places, other.places)


class Body(NamedTuple):
    """The equations of one step of a scan, as a graph without parameters."""

    inputs: Sequence[jex.Var]
    equations: Sequence[jex.JaxprEqn]
    outputs: Sequence[Any]
    parts: dict


class Sources:
    """A graph's equations by what they give, and how often each value is read.

    outside: in the body of a scan, what an input's factors can go into.
    """

    def __init__(self, graph: Graph | Body, outside: Callable[[jex.Var, np.ndarray], list[Fold] | None] | None = None):
        self._graph, self._outside = graph, outside
        # In what is put together: the places with which readers of a value came by, if there are others.
        self._visits: dict[jex.Var, tuple[np.ndarray, ...]] | None = None
        self._makers: dict[jex.Var, jex.JaxprEqn] = {}
        self._readers: dict[jex.Var, list[Any]] = defaultdict(list)
        for equation in graph.equations:
            self._makers.update((var, equation) for var in equation.outvars)
            for atom in equation.invars:
                if isinstance(atom, jex.Var):
                    self._readers[atom].append(equation)
        for atom in graph.outputs:
            if isinstance(atom, jex.Var):
                self._readers[atom].append(None)

    def folds(self, step: Step) -> tuple[Fold, ...] | None:
        """What factors on the inputs of a step can go into, so that each takes all of it; None if there is nothing.

        Factors are numbered as inputs are in the weights' (batch…, in).
        """
        reads = [read for part in step.parts for read in part.reads]
        results = {read.result for read in reads}
        product, activation = reads[0].product, reads[0].activations[0]
        if (
            len(step.reads) != 1
            or None in results
            or not isinstance(product, Dot)
            or not isinstance(activation, jex.Var)
        ):
            return None
        if any(equation is None or equation.outvars[0] not in results for equation in self._readers[activation]):
            return None
        axes = product.batch + product.contracted
        shape = activation.aval.shape
        places = np.arange(math.prod(shape[axis] for axis in axes)).reshape([shape[axis] for axis in axes])
        places = places.transpose(np.argsort(axes)).reshape(
            [size if axis in axes else 1 for axis, size in enumerate(shape)]
        )
        found = self._origin(activation, places)
        return None if found is None else tuple(found)

    def _before(self, atom: Any, places: np.ndarray | None) -> list[Fold] | None:
        """As `_origin`, of an operand: None if another equation reads it too.

        In what is put together the last of its readers finds what it can go into, if all have the same factors; before
        that it is nothing yet.
        """
        if places is None or not isinstance(atom, jex.Var):
            return None
        readers = len(self._readers[atom])
        if readers > 1:
            if self._visits is None:
                return None
            visits = self._visits[atom] = (*self._visits.get(atom, ()), places)
            if not all(np.array_equal(places, other) for other in visits):
                return None
            if len(visits) < readers:
                return []
        return self._origin(atom, places)

    def _first(self, operands: Iterable[tuple[Any, np.ndarray | None]]) -> list[Fold] | None:
        """The first operand's that is not None."""
        for operand in operands:
            visits = None if self._visits is None else dict(self._visits)
            found = self._before(*operand)
            if found is not None:
                return found
            self._visits = visits
        return None

    def _origin(self, var: jex.Var, places: np.ndarray) -> list[Fold] | None:
        """What a variable's factors, numbered by `places`, can go into; None if there is nothing."""
        if var in self._graph.parts:
            leaf, index = self._graph.parts[var]
            floats = jnp.issubdtype(var.aval.dtype, jnp.floating)
            return [Fold(leaf, index, places)] if floats and self._times_read(leaf, index) == 1 else None
        equation = self._makers.get(var)
        if equation is None:
            return self._outside(var, places) if self._outside and var in self._graph.inputs else None
        name, operands = equation.primitive.name, equation.invars
        if name in ("mul", "div", "max"):
            sides = (0,) if name == "div" else (0, 1)
            if name == "max":
                sides = tuple(side for side in sides if _number(operands[1 - side]) == 0)
            return self._first((operands[side], _of_repeated(operands[side], places)) for side in sides)
        if name in ("add", "sub"):
            return self._sum(equation, places)
        if name == "dot_general":
            return self._first((operands[side], _of_operand(equation, side, places)) for side in (0, 1))
        if name == "concatenate":
            return self._put_together(equation, places)
        if name == "scan":
            return self._of_scan(equation, var, places)
        if name == "split":
            return self._before(operands[0], _of_whole(equation, var, places))
        return self._before(operands[0], _of_viewed(equation, places)) if len(operands) == 1 else None

    def _sum(self, equation: jex.JaxprEqn, places: np.ndarray) -> list[Fold] | None:
        """Both sides of a sum take the factors; a constant, as in 1 + scale, goes with the part that it is added to."""
        numbers = [_number(atom) for atom in equation.invars]
        if equation.primitive.name == "add" and any(number is not None for number in numbers):
            side = 0 if numbers[0] is None else 1
            found = self._before(equation.invars[side], places)
            if found is None or len(found) != 1 or found[0].offset or not self._is_view(equation.invars[side]):
                return None
            return [found[0]._replace(offset=numbers[1 - side])]
        found = [self._before(atom, _of_repeated(atom, places)) for atom in equation.invars]
        return None if None in found else [fold for folds in found for fold in folds]

    def _put_together(self, equation: jex.JaxprEqn, places: np.ndarray) -> list[Fold] | None:
        """All operands of a concatenation, along an axis that factors do not vary along, take them."""
        if places.shape[equation.params["dimension"]] > 1 or self._visits is not None:
            return None
        self._visits = {}
        found = [self._before(atom, places) for atom in equation.invars]
        visits, self._visits = self._visits, None
        whole = all(len(places) == len(self._readers[var]) for var, places in visits.items())
        return [fold for folds in found for fold in folds] if whole and None not in found else None

    def _of_scan(self, equation: jex.JaxprEqn, var: jex.Var, places: np.ndarray) -> list[Fold] | None:
        """Through one step, with the factors of the first, by which those of all steps are then numbered."""
        consts, carries = scan_counts(equation)
        number = next(number for number, other in enumerate(equation.outvars) if other is var)
        if number < carries:
            return None
        steps = np.concatenate([places.reshape(len(places), -1), np.full((len(places), 1), -1)], axis=1)
        body = _flat(closed(equation.params["jaxpr"]))

        def outside(inner: jex.Var, own: np.ndarray) -> list[Fold] | None:
            place = body.inputs.index(inner)
            if consts <= place < consts + carries or (place < consts and len(steps) > 1):
                return None
            return self._before(equation.invars[place], steps[:, own] if place >= consts else steps[0, own])

        first = np.arange(places[0].size).reshape(places.shape[1:])
        return Sources(body, outside)._before(body.outputs[number], first)

    def _is_view(self, var: jex.Var) -> bool:
        """Whether a variable is a view of part of a leaf."""
        while var not in self._graph.parts:
            equation = self._makers.get(var)
            if equation is None or equation.primitive.name not in (*PASSING, "transpose", "broadcast_in_dim"):
                return False
            var = equation.invars[0]
        return True

    def _times_read(self, leaf: int, index: Index) -> int:
        """How many equations read any of part of a leaf."""
        return sum(
            len(self._readers[var])
            for var, (other, theirs) in self._graph.parts.items()
            if other == leaf and all(a[0] < b[1] and b[0] < a[1] for a, b in zip(index, theirs, strict=True))
        )


def _flat(jaxpr: jex.ClosedJaxpr) -> Body:
    """With what it calls in its place."""
    flattener = Flattener()
    inputs = [flattener.input(var.aval) for var in jaxpr.jaxpr.invars]
    outputs = [flattener.output(value) for value in flattener.run(jaxpr.jaxpr, jaxpr.consts, inputs)]
    return Body(inputs, flattener.equations, outputs, {})


def _number(atom: Any) -> float | None:
    """A literal's value."""
    return float(atom.val) if isinstance(atom, jex.Literal) and np.ndim(atom.val) == 0 else None


def _of_repeated(atom: Any, places: np.ndarray) -> np.ndarray | None:
    """The places of an operand that is repeated along axes of size 1; None if they vary there."""
    shape = atom.aval.shape
    fits = len(shape) == places.ndim and all(own in (1, size) for own, size in zip(places.shape, shape, strict=True))
    return places if fits else None


def _of_operand(equation: jex.JaxprEqn, side: int, places: np.ndarray) -> np.ndarray | None:
    """The places of an operand of a dot_general; None if they vary along axes that only the other one has."""
    contracted, batch = equation.params["dimension_numbers"]
    ndims = [len(atom.aval.shape) for atom in equation.invars]
    free = [[a for a in range(n) if a not in (*contracted[k], *batch[k])] for k, n in enumerate(ndims)]
    first = len(batch[0]) + (len(free[0]) if side else 0)
    axes = {axis: number for number, axis in enumerate(batch[side])}
    axes |= {axis: first + number for number, axis in enumerate(free[side])}
    if any(size > 1 for axis, size in enumerate(places.shape) if axis not in axes.values()):
        return None
    own = places.transpose([*axes.values(), *(a for a in range(places.ndim) if a not in axes.values())])
    order = list(axes)
    own = own.reshape(own.shape[: len(order)]).transpose(np.argsort(order))
    return np.expand_dims(own, tuple(contracted[side]))


def _of_whole(equation: jex.JaxprEqn, part: jex.Var, places: np.ndarray) -> np.ndarray:
    """The places of what a split takes apart, from those of one of its results."""
    axis, sizes = equation.params["axis"], [int(size) for size in equation.params["sizes"]]
    number = next(number for number, var in enumerate(equation.outvars) if var is part)
    own = np.broadcast_to(places, (*places.shape[:axis], sizes[number], *places.shape[axis + 1 :]))
    widths = [(0, 0)] * places.ndim
    widths[axis] = (sum(sizes[:number]), sum(sizes[number + 1 :]))
    return np.pad(own, widths, constant_values=-1)


def _of_viewed(equation: jex.JaxprEqn, places: np.ndarray) -> np.ndarray | None:
    """The places of the operand of a view or cast; None for other equations and for what is repeated."""
    name, params = equation.primitive.name, equation.params
    before = equation.invars[0].aval
    if not jnp.issubdtype(before.dtype, jnp.floating):
        return None
    if name == "transpose":
        return places.transpose(np.argsort(params["permutation"]))
    if name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        repeated = [axis for axis in range(places.ndim) if axis not in axes]
        repeated += [axis for axis, size in zip(axes, before.shape, strict=True) if size == 1]
        if any(places.shape[axis] > 1 for axis in repeated):
            return None
        return places.reshape([places.shape[axis] for axis in axes])
    if name == "slice":
        pairs = zip(places.shape, before.shape, equation.outvars[0].aval.shape, strict=True)
        return places if all(size == 1 or old == new for size, old, new in pairs) else None
    if name in PASSING:
        return reshaped(places, equation.outvars[0].aval.shape, before.shape)
    return places if name in SAME_SHAPE else None


def reshaped(places: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray | None:
    """`places` of a value of shape `old` for the same value of shape `new`; None if they then vary in part of an axis.

    Axes that merge into others, or are split, vary all or none.
    """
    if 0 in old:
        return None
    shape: list[int] = []
    left, wanted, place = list(old), list(new), 0
    while left or wanted:
        taken, given = [left.pop(0)] if left else [], [wanted.pop(0)] if wanted else []
        while math.prod(taken) != math.prod(given):
            if math.prod(taken) < math.prod(given):
                taken.append(left.pop(0))
            else:
                given.append(wanted.pop(0))
        own = places.shape[place : place + len(taken)]
        if all(size == 1 for size in own):
            shape += [1] * len(given)
        elif own == tuple(taken):
            shape += given
        else:
            return None
        place += len(taken)
    return places.reshape(shape)


def columns(fold: Fold, layout: Layout) -> np.ndarray | None:
    """The number of the factor for each column (batch…, out) of a quantized part; None if rows would differ."""
    places = reshaped(fold.places, layout.shape, layout.factors)
    if fold.offset or places is None or any(places.shape[axis] > 1 for axis in layout.in_axes):
        return None
    places = places.transpose(layout.order)
    batch, outputs = layout.sizes(layout.batch_axes), layout.sizes(layout.out_axes)
    ones = (1,) * len(layout.in_axes)
    full = np.broadcast_to(places, (*batch, *ones, *outputs))
    return full.reshape(*batch, layout.out_features)


def fold_packed(weight: QuantizedTensor, fold: Fold, factors: np.ndarray) -> QuantizedTensor:
    """A quantized part with factors on its outputs: on its scales, which are rounded once more."""
    by_column = np.append(factors.ravel(), 1.0)[columns(fold, weight.layout)].astype(np.float32)
    dtype = jnp.dtype(weight.scales.dtype)
    scales = jnp.asarray(weight.scales[...]).astype(jnp.float32) * by_column[..., None, :]
    return dataclasses.replace(weight, scales=round_scales(scales, dtype.name).astype(dtype))


def fold_float(leaf: jax.Array, fold: Fold, factors: np.ndarray) -> jax.Array:
    """A leaf with factors on part of it; arithmetic in float32 at least."""
    here = tuple(slice(*bounds) for bounds in fold.index)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    by_element = jnp.asarray(np.append(factors.ravel(), 1.0)[fold.places], wide)
    part = (leaf[here].astype(wide) + fold.offset) * by_element - fold.offset
    return leaf.at[here].set(part.astype(leaf.dtype))
