"""Runs of equations as compiled programs; runs of equal text share one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.tracing.graph import Graph
from jgptq.tracing.jaxprs import called_jaxpr, close


class Program:
    """A closed run of equations. Programs that read alike are equal, whatever their variables, and compile once."""

    def __init__(self, inputs: list[jex.Var], outputs: list[jex.Var], equations: list[jex.JaxprEqn]):
        self.jaxpr = close(inputs, outputs, equations)
        # Objects the text knows only by identity live as long as the jaxpr, so no other can take their place.
        self.text = _jaxpr_text(self.jaxpr.jaxpr)
        self._hash = hash(self.text)
        # Whether it chooses by comparing values: the experts of a token, say.
        self.chooses = any(equation.primitive.name in CHOICES for equation in equations)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.text == other.text


@functools.partial(jax.jit, static_argnums=0)
def run(program: Program, arguments: list[Any]) -> list[Any]:
    """The program's outputs. Arguments are not donated: some are the caller's own arrays."""
    return jex.jaxpr_as_fun(program.jaxpr)(*arguments)


# Equations whose results are places: in both models, those that the quantized one chooses.
CHOICES = ("top_k", "sort", "argmax", "argmin")


@functools.partial(jax.jit, static_argnums=0)
def run_both(program: Program, arguments: list[Any], float_arguments: list[Any]) -> tuple[list[Any], list[Any]]:
    """The program's outputs on the values of two models, where the second follows the first one's choices.

    Otherwise a token that the models send to different experts would be compared with another token.
    """
    jaxpr = program.jaxpr.jaxpr
    values = {var: (const, const) for var, const in zip(jaxpr.constvars, program.jaxpr.consts, strict=True)}
    values.update(zip(jaxpr.invars, zip(arguments, float_arguments, strict=True), strict=True))

    def read(atom, model):
        return atom.val if isinstance(atom, jex.Literal) else values[atom][model]

    for equation in jaxpr.eqns:
        operands = [[read(atom, model) for atom in equation.invars] for model in (0, 1)]
        results = _evaluate(equation, operands[0])
        chosen = equation.primitive.name in CHOICES
        results_float = _chosen(equation, operands, results) if chosen else _evaluate(equation, operands[1])
        values.update(zip(equation.outvars, zip(results, results_float, strict=True), strict=True))
    return tuple([read(atom, model) for atom in jaxpr.outvars] for model in (0, 1))


def _evaluate(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    inputs = [jex.Var(atom.aval) for atom in equation.invars]
    outputs = [jex.Var(var.aval) for var in equation.outvars]
    alone = close(inputs, outputs, [equation.replace(invars=inputs, outvars=outputs)])
    return jex.jaxpr_as_fun(alone)(*operands)


def _chosen(equation: jex.JaxprEqn, operands: list[list[Any]], results: list[Any]) -> list[Any]:
    """The float model's results at the places that the quantized one chose."""
    name, params = equation.primitive.name, equation.params
    if name == "top_k":
        axis = params.get("axis", -1) % results[1].ndim
        return [jnp.take_along_axis(operands[1][0], results[1], axis=axis), results[1]]
    if name != "sort":
        return results
    axis = params["dimension"]
    places = jax.lax.broadcasted_iota(jnp.int32, results[0].shape, axis)
    *_, order = jax.lax.sort((*operands[0], places), dimension=axis, is_stable=True, num_keys=params["num_keys"])
    return [jnp.take_along_axis(operand, order, axis=axis) for operand in operands[1]]


class Segment(NamedTuple):
    """A program with the graph's variables that go in and come out."""

    program: Program
    inputs: list[jex.Var]
    outputs: list[jex.Var]


def segment(graph: Graph, start: int, stop: int, live: set[jex.Var]) -> Segment:
    """Equations start .. stop of a graph, giving those of their results that are in `live`."""
    equations = graph.equations[start:stop]
    defined: set[jex.Var] = set()
    inputs: dict[jex.Var, None] = {}
    for equation in equations:
        for atom in equation.invars:
            if isinstance(atom, jex.Var) and atom not in defined:
                inputs[atom] = None
        defined.update(equation.outvars)
    outputs = [var for equation in equations for var in equation.outvars if var in live]
    _check_no_references(outputs)
    return Segment(Program(list(inputs), outputs, equations), list(inputs), outputs)


def _check_no_references(outputs: list[jex.Var]) -> None:
    if any("Ref" in type(var.aval).__name__ for var in outputs):
        raise ValueError(
            "the function changes an array in place (jax.new_ref) across a product with a weight, which no segment "
            "can pass on; return the new value instead, or make and use the reference between two products"
        )


def _jaxpr_text(jaxpr: jex.Jaxpr, consts: tuple = ()) -> tuple:
    """A hashable transcript of a jaxpr in which variables are numbered in order of appearance."""
    numbers: dict[jex.Var, int] = {}

    def name(atom):
        if isinstance(atom, jex.Literal):
            return ("literal", value_text(atom.val), atom.aval)
        return numbers.setdefault(atom, len(numbers))

    inputs = tuple((name(var), var.aval) for var in (*jaxpr.constvars, *jaxpr.invars))
    lines = tuple(
        (
            equation.primitive,
            (equation.ctx.threefry_partitionable, equation.ctx.compute_type),
            _params_text(equation),
            tuple(name(atom) for atom in equation.invars),
            tuple((name(var), var.aval) for var in equation.outvars),
        )
        for equation in jaxpr.eqns
    )
    return (inputs, tuple(value_text(c) for c in consts), lines, tuple(name(atom) for atom in jaxpr.outvars))


def _params_text(equation: jex.JaxprEqn) -> Any:
    called = called_jaxpr(equation)
    if called is not None:  # its derivative rules, fresh objects in every trace, do not matter here
        return value_text(called)
    return tuple((key, value_text(equation.params[key])) for key in sorted(equation.params))


def value_text(value: Any) -> Any:
    """A hashable transcript of an equation's parameter, of a jaxpr in one or of a constant."""
    if isinstance(value, jex.ClosedJaxpr):
        return _jaxpr_text(value.jaxpr, tuple(value.consts))
    if isinstance(value, jex.Jaxpr):
        return _jaxpr_text(value)
    if isinstance(value, tuple | list):
        return tuple(value_text(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, value_text(value[key])) for key in sorted(value))
    if isinstance(value, np.ndarray | np.generic):
        return (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, jax.Array):
        return ("array", id(value))
    if isinstance(value, bool | int | float | complex):
        return (type(value), repr(value))  # repr tells 0.0 from -0.0 and gives nan an equal
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value
