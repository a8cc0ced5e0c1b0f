"""The bias of a product: a parameter that a function adds to the product's result, one number for each output."""

from collections import defaultdict
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.tensor import Index
from jgptq.tracing.graph import Graph, Read
from jgptq.tracing.jaxprs import close
from jgptq.tracing.residual import PASSING, Outputs

# Equations that lay a leaf out along the result it is added to.
LAYING_OUT = (*PASSING, "broadcast_in_dim", "transpose")


class Bias(NamedTuple):
    """Part of a leaf with one element for each output. elements: the number of an output's element, (out,)."""

    leaf: int
    index: Index
    elements: np.ndarray


def find_bias(graph: Graph, read: Read, position: int) -> Bias | None:
    """The bias of a product: added to its result, after `position`, and used for nothing else.

    From the result on, sums, views and casts are followed for as long as one equation alone reads the value.
    """
    if read.result is None or read.outputs is None:
        return None
    readers: dict[jex.Var, list[jex.JaxprEqn]] = defaultdict(list)
    makers: dict[jex.Var, int] = {}
    for number, equation in enumerate(graph.equations):
        makers.update(dict.fromkeys(equation.outvars, number))
        for atom in equation.invars:
            if isinstance(atom, jex.Var):
                readers[atom].append(equation)
    value, steps, outputs = read.result, (), read.outputs
    given_out = {atom for atom in graph.outputs if isinstance(atom, jex.Var)}
    while len(readers[value]) == 1 and value not in given_out:
        ((equation,), before) = readers[value], value.aval.shape
        name = equation.primitive.name
        if equation.outvars[0].aval.size != value.aval.size:  # repeated along another
            return None
        if name == "add" and equation.invars[0] is not equation.invars[1]:
            (other,) = (atom for atom in equation.invars if atom is not value)
            laid = _laid_out(graph, other, readers, makers, position)
            if laid is not None and laid[0] not in given_out:
                part, equations = laid
                elements = _elements(part, equations, before, Outputs(steps, outputs.first, outputs.out_features))
                return None if elements is None else Bias(*graph.parts[part], elements)
        elif name == "transpose":
            steps = (("transpose", tuple(int(axis) for axis in np.argsort(equation.params["permutation"]))), *steps)
        elif name in PASSING:
            steps = (("reshape", before), *steps)
        else:
            return None
        (value,) = equation.outvars
    return None


def _laid_out(
    graph: Graph, value: jex.Var, readers: dict, makers: dict[jex.Var, int], position: int
) -> tuple[jex.Var, list[jex.JaxprEqn]] | None:
    """The part of a leaf that a value is, and the equations between; None if anything else reads any of them."""
    equations: list[jex.JaxprEqn] = []
    while isinstance(value, jex.Var) and len(readers[value]) == 1 and value not in graph.parts:
        number = makers.get(value, -1)
        if number < position or graph.equations[number].primitive.name not in LAYING_OUT:
            return None
        equations.insert(0, graph.equations[number])
        value = equations[0].invars[0]
    if not (isinstance(value, jex.Var) and len(readers[value]) == 1 and value in graph.parts):
        return None
    leaf, index = graph.parts[value]
    for other, (theirs, region) in graph.parts.items():
        overlap = all(a[0] < b[1] and b[0] < a[1] for a, b in zip(index, region, strict=theirs == leaf))
        if other is not value and theirs == leaf and overlap and readers[other]:
            return None
    return (value, equations) if jnp.issubdtype(value.aval.dtype, jnp.floating) else None


def _elements(
    part: jex.Var, equations: list[jex.JaxprEqn], shape: tuple[int, ...], outputs: Outputs
) -> np.ndarray | None:
    """The element of the part that each output gets; None if not each has its own, the same for all tokens.

    shape: of what it is added to.
    """
    number = jnp.arange(part.aval.size, dtype=jnp.int32).reshape(part.aval.shape)
    for equation in equations:
        if equation.primitive.name != "convert_element_type":
            number = _as_integers(equation, number)
    rows = np.asarray(outputs.rows(jnp.broadcast_to(number, shape)))
    each = np.array_equal(np.sort(rows[0]), np.arange(part.aval.size)) and (rows == rows[:1]).all()
    return rows[0] if each else None


def _as_integers(equation: jex.JaxprEqn, value: jax.Array) -> jax.Array:
    """What an equation that moves numbers without changing them makes of these."""
    before, after = (jex.Var(jax.core.ShapedArray(var.aval.shape, value.dtype)) for var in _ends(equation))
    program = close([before], [after], [equation.replace(invars=[before], outvars=[after])])
    return jex.jaxpr_as_fun(program)(value)[0]


def _ends(equation: jex.JaxprEqn) -> tuple[jex.Var, jex.Var]:
    return equation.invars[0], equation.outvars[0]
