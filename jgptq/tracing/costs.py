"""What running a graph takes, from its shapes: floating-point operations, and bytes that are alive at once."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp

from jgptq.tracing.graph import Graph
from jgptq.tracing.jaxprs import closed

# Results that XLA makes no array for: it reads what they are views of, or makes them where they are read.
VIEWS = ("broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "stop_gradient", "split", "slice")


def nbytes(atom: Any) -> int:
    """Of a variable's value; keys of random numbers count as nothing."""
    dtype = getattr(atom.aval, "dtype", None)
    return math.prod(atom.aval.shape) * jnp.dtype(dtype).itemsize if isinstance(dtype, jnp.dtype) else 0


def flops(equations: Sequence[jex.JaxprEqn]) -> int:
    """Two for each multiplication of a product; whatever goes element by element counts as nothing."""
    return sum(map(_flops, equations))


def _flops(equation: jex.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "ragged_dot_general":
        return 2 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        weight, (out, *_) = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(weight) // weight[out]
    inner = [closed(value).jaxpr for value in params.values() if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]
    return params.get("length", 1) * sum(flops(jaxpr.eqns) for jaxpr in inner)


def elements(equations: Sequence[jex.JaxprEqn]) -> int:
    """Of all results that are no views; products count once, scans not at all."""
    made = [equation for equation in equations if equation.primitive.name not in (*VIEWS, "scan", "while")]
    return sum(math.prod(var.aval.shape) for equation in made for var in equation.outvars)


def waiting_bytes(graph: Graph, position: int) -> int:
    """What one batch leaves for the equations from `position` on."""
    made = [*graph.inputs, *(var for equation in graph.equations[:position] for var in equation.outvars)]
    return sum(nbytes(var) for var in made if graph.last_use.get(var, -1) >= position)


def working_bytes(graph: Graph, start: int, stop: int) -> int:
    """What one batch takes at most, besides what it had before, while equations start .. stop run.

    As if every result that is no view were an array from its equation to its last use. XLA fuses some of them, and
    orders equations as it likes.
    """
    return max(_alive(graph, start, stop), default=0)


def _alive(graph: Graph, start: int, stop: int) -> Iterator[int]:
    """Bytes of results before and after each of equations start .. stop."""
    used = {}
    for position, equation in enumerate(graph.equations[start:stop], start):
        used.update((atom, position) for atom in equation.invars if isinstance(atom, jex.Var))
    alive: dict[Any, int] = {}
    for position, equation in enumerate(graph.equations[start:stop], start):
        # What is read here for the last time makes room for the result, as in a fused run of elementwise equations.
        yield sum(alive.values())
        alive = {var: size for var, size in alive.items() if max(used.get(var, -1), _last(graph, var, stop)) > position}
        size_of = (lambda var: 0) if equation.primitive.name in VIEWS else nbytes
        alive.update((var, size_of(var)) for var in equation.outvars)
        yield sum(alive.values())


class Costs(NamedTuple):
    """Bytes of one batch on its way to the last product with a weight.

    working: its inputs, and what is alive before and after each equation. waiting: between segments, where each weight
    is first needed.
    hessian: of the largest one.
    """

    working: list[int]
    waiting: list[int]
    hessian: int

    @property
    def most(self) -> int:
        """Bytes that are alive at once."""
        return max(self.working)


def costs(graph: Graph) -> Costs:
    parts = [part for site in graph.sites for part in site.parts]
    stop = max((part.start for part in parts), default=0)
    made = {var: place for place, equation in enumerate(graph.equations) for var in equation.outvars}
    changes = [0] * (len(graph.equations) + 2)
    for var in (*graph.inputs, *made):
        if (last := graph.last_use.get(var, -1)) > made.get(var, -1):
            changes[made.get(var, -1) + 1] += nbytes(var)
            changes[last + 1] -= nbytes(var)
    hessians = [math.prod(part.layout.sizes(part.layout.batch_axes)) * part.layout.in_features**2 for part in parts]
    waiting = list(itertools.accumulate(changes))
    return Costs(
        working=[sum(map(nbytes, graph.inputs)) + alive for alive in (0, *_alive(graph, 0, stop))],
        waiting=[waiting[start] for start in sorted({part.start for part in parts})],
        hessian=4 * max(hessians, default=0),
    )


def between(small: Costs, large: Costs, rows: tuple[int, int], wanted: int) -> Costs:
    """The costs of a batch of so many rows, from those of two that differ in nothing else; bytes are linear in rows."""

    def line(one: int, two: int) -> int:
        return one + (two - one) * (wanted - rows[0]) // (rows[1] - rows[0])

    return Costs(
        list(map(line, small.working, large.working)), list(map(line, small.waiting, large.waiting)), small.hessian
    )


def _last(graph: Graph, var: Any, stop: int) -> int:
    """Results that wait for later segments are never dropped in this one."""
    return stop if graph.last_use.get(var, -1) >= stop else -1


def parts_read(graph: Graph, start: int, stop: int) -> set[tuple[int, tuple]]:
    """The parts of leaves that equations start .. stop read."""
    return {
        graph.parts[atom]
        for equation in graph.equations[start:stop]
        for atom in equation.invars
        if isinstance(atom, jex.Var) and atom in graph.parts
    }


def last_reads(graph: Graph) -> dict[tuple[int, tuple], int]:
    """The last equation that reads each part of a leaf."""
    last: dict[tuple[int, tuple], int] = {}
    for var, key in graph.parts.items():
        last[key] = max(last.get(key, -1), graph.last_use.get(var, -1))
    return last
