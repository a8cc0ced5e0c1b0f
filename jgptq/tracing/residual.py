"""What a function adds to a product's result: the residual stream that a projection writes to.

From the result on, sums, views and casts are followed for as long as one equation alone reads the value. The other
side of each sum counts if it is known before the product is computed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from jgptq.tracing.products import Dot, Product

# Equations that hand their operand on as it is, but for its shape and dtype.
PASSING = ("convert_element_type", "reshape", "squeeze", "expand_dims", "copy", "name", "sharding_constraint")


class Outputs(NamedTuple):
    """How to see a value added to a product's result as (tokens, out).

    steps: from the value to the result: permutations of its axes, and shapes. first: whether the outputs come
    before the tokens in the result.
    """

    steps: tuple[tuple[str, tuple[int, ...]], ...]
    first: bool
    out_features: int

    def rows(self, value: jax.Array) -> jax.Array:
        for kind, argument in self.steps:
            value = value.transpose(argument) if kind == "transpose" else value.reshape(argument)
        return value.reshape(self.out_features, -1).T if self.first else value.reshape(-1, self.out_features)


def outputs_of(result: jex.Var, product: Product, side: int, out_features: int) -> Outputs | None:
    """How to see the result of a product with a weight on `side` as (tokens, out); None if it cannot be."""
    if not isinstance(product, Dot) or product.batch:
        return None
    # The axes of the left operand come first.
    shape, tokens = result.aval.shape, len(product.tokens)
    if math.prod(shape[: len(shape) - tokens] if side == 0 else shape[tokens:]) != out_features:
        return None
    return Outputs((), side == 0, out_features)


class Added(NamedTuple):
    """A value that a function adds to a product's result."""

    value: jex.Var
    outputs: Outputs


class Sums:
    """The equations of a graph with who reads what. fixed: variables that depend on no input."""

    def __init__(self, equations: Sequence[jex.JaxprEqn], made: dict[jex.Var, int], fixed: set[jex.Var]):
        self.equations = equations
        self._made = made
        self._fixed = fixed
        self._readers: dict[jex.Var, list[jex.JaxprEqn]] = defaultdict(list)
        for equation in equations:
            for atom in equation.invars:
                if isinstance(atom, jex.Var):
                    self._readers[atom].append(equation)

    def added(
        self, result: jex.Var, product: Product, side: int, out_features: int, position: int
    ) -> tuple[Added, ...]:
        """What is added to `result`, which has the weight on `side`, and known at `position`."""
        outputs = outputs_of(result, product, side, out_features)
        return tuple(self._walk(result, outputs.first, out_features, position)) if outputs else ()

    def _walk(self, result: jex.Var, first: bool, out_features: int, position: int) -> Iterator[Added]:
        steps: tuple = ()
        value = result
        while len(readers := self._readers[value]) == 1:
            (equation,) = readers
            name, before = equation.primitive.name, value.aval.shape
            if name == "add" and equation.invars[0] is not equation.invars[1]:
                (other,) = (atom for atom in equation.invars if atom is not value)
                other, views = self._seen_through(other, position)
                if other is not None:
                    yield Added(other, Outputs((*views, *steps), first, out_features))
            elif name == "transpose":
                permutation = equation.params["permutation"]
                inverse = tuple(permutation.index(axis) for axis in range(len(permutation)))
                steps = (("transpose", inverse), *steps)
            elif name in PASSING:
                steps = (("reshape", before), *steps)
            else:
                return
            (value,) = equation.outvars

    def _seen_through(self, value: Any, position: int) -> tuple[jex.Var | None, tuple]:
        """The value known at `position` of which this one is a view, and the view; None if it depends on more."""
        views: tuple = ()
        while isinstance(value, jex.Var) and value not in self._fixed:
            made = self._made.get(value, -1)
            if made < position:
                return value, views
            equation = self.equations[made]
            name = equation.primitive.name
            if name == "transpose":
                views = (("transpose", tuple(equation.params["permutation"])), *views)
            elif name in PASSING:
                views = (("reshape", value.aval.shape), *views)
            else:
                break
            value = equation.invars[0]
        return None, ()
