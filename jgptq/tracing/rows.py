"""Whether a function treats the rows of a batch each by itself, so that batches may be cut and joined at will.

The function is traced at two numbers of rows. Where the traces' equations pair up, every value is followed from the
inputs on: it is COMMON to all rows, has rows along one axis, or is MIXED, which is also what is not understood. The
function may then be given any batches if nothing that its products read is MIXED.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from jgptq.tracing.graph import Graph, Read
from jgptq.tracing.jaxprs import called_jaxpr, closed, scan_counts
from jgptq.tracing.products import Convolution, Dot
from jgptq.tracing.row_rules import COMMON, MIXED, RULES, Rows, State
from jgptq.tracing.segments import value_text

# Equations with parameters that hold sizes, which their rules and the shapes of their results speak for.
SIZES = ("shape", "new_sizes", "limit_indices", "slice_sizes", "sizes", "reps")


def treats_rows_apart(small: Graph, large: Graph, rows: tuple[int, int], has_rows: Sequence[bool]) -> bool:
    """Whether two traces of a function show that it treats rows apart, as far as products with parameters go.

    rows: of the batches that each trace is of. has_rows: which leaves of a batch have them, along their first axis.
    """
    equations = small.equations, large.equations
    if len(equations[0]) != len(equations[1]) or any(equation.effects for equation in itertools.chain(*equations)):
        return False
    followed = _Followed(rows, small, large)
    for own, other, split in zip(small.inputs, large.inputs, has_rows, strict=True):
        followed.put(own, other, Rows(0) if split else COMMON)
    followed.run(*equations)
    parts = [[part for site in graph.sites for part in site.parts] for graph in (small, large)]
    if [(part.leaf, part.index) for part in parts[0]] != [(part.leaf, part.index) for part in parts[1]]:
        return False
    return all(followed.part_apart(own.reads, other.reads) for own, other in zip(*parts, strict=True))


class _Followed:
    """States of variables of the small trace, each with the large one's variable in its place."""

    def __init__(self, rows: tuple[int, int], *graphs: Graph):
        self.rows, self.graphs = rows, graphs
        self.states: dict[jex.Var, tuple[jex.Var, State]] = {}

    def put(self, own: jex.Var, other: jex.Var, state: State) -> None:
        self.states[own] = other, state if self.fits(state, own.aval, other.aval) else MIXED

    def fits(self, state: State, own: Any, other: Any) -> bool:
        """Whether two values of one state have shapes that differ as they should."""
        if len(own.shape) != len(other.shape) or own.dtype != other.dtype:
            return False
        differ = {axis for axis, sizes in enumerate(zip(own.shape, other.shape, strict=True)) if len(set(sizes)) > 1}
        if not isinstance(state, Rows):
            return state == COMMON and not differ
        sizes = own.shape[state.axis], other.shape[state.axis]
        each, rest = divmod(sizes[0], state.outer * self.rows[0])
        return differ == {state.axis} and not rest and sizes[1] == each * state.outer * self.rows[1]

    def state(self, own: Any, other: Any) -> State:
        """Of an atom of the small trace, in an equation where the large one has `other`."""
        if isinstance(own, jex.Literal) or isinstance(other, jex.Literal):
            same = (
                type(own) is type(other) and same_value(own.val, other.val) and self.fits(COMMON, own.aval, other.aval)
            )
            return COMMON if same else MIXED
        if own not in self.states:
            self.put(own, other, COMMON if self._is_given(own, other) else MIXED)
        paired, state = self.states[own]
        return state if paired is other else MIXED

    def _is_given(self, own: jex.Var, other: jex.Var) -> bool:
        """Of variables that no equation makes: the same part of a leaf, or equal constants."""
        small, large = self.graphs
        if own in small.parts:
            return small.parts[own] == large.parts.get(other)
        return (
            own in small.constants
            and other in large.constants
            and same_value(small.constants[own], large.constants[other])
        )

    def run(self, own: Sequence[jex.JaxprEqn], other: Sequence[jex.JaxprEqn]) -> None:
        for pair in zip(own, other, strict=True):
            results = self._equation(*pair)
            for *atoms, state in zip(pair[0].outvars, pair[1].outvars, results, strict=False):
                self.put(*atoms, state)

    def _equation(self, own: jex.JaxprEqn, other: jex.JaxprEqn) -> Iterable[State]:
        if own.primitive is not other.primitive or len(own.invars) != len(other.invars):
            return itertools.repeat(MIXED)
        states = [self.state(*atoms) for atoms in zip(own.invars, other.invars, strict=True)]
        name = own.primitive.name
        if called_jaxpr(own) is not None:
            return self.body(called_jaxpr(own), called_jaxpr(other), states)
        if name in NESTED:
            return NESTED[name](self, own, other, states)
        if MIXED in states or not _same_but_for_sizes(own, other):
            return itertools.repeat(MIXED)
        if not any(isinstance(state, Rows) for state in states):
            return [self._of_common(own, *shapes) for shapes in zip(_shapes(own), _shapes(other), strict=True)]
        found = RULES[name](own, states, self.rows) if name in RULES else MIXED
        return found if isinstance(found, list) else itertools.repeat(found)

    def _of_common(self, equation: jex.JaxprEqn, own: tuple[int, ...], other: tuple[int, ...]) -> State:
        """A result of what is common to all rows, which may be spread over them."""
        differ = [axis for axis, sizes in enumerate(zip(own, other, strict=True)) if len(set(sizes)) > 1]
        if not differ:
            return COMMON
        name, (axis, *others) = equation.primitive.name, differ
        constant = (
            name == "broadcast_in_dim"
            or (name == "iota" and equation.params["dimension"] != axis)
            or (name == "tile" and equation.invars[0].aval.shape[axis] == 1)
        )
        return Rows(axis) if constant and not others else MIXED

    def body(self, own: jex.ClosedJaxpr, other: jex.ClosedJaxpr, states: Sequence[State]) -> list[State]:
        """The states of a nested jaxpr's results."""
        jaxprs = own.jaxpr, other.jaxpr
        if len({(len(jaxpr.eqns), len(jaxpr.constvars), len(jaxpr.invars)) for jaxpr in jaxprs}) > 1:
            return [MIXED] * len(own.jaxpr.outvars)
        for *atoms, one, two in zip(*(jaxpr.constvars for jaxpr in jaxprs), own.consts, other.consts, strict=True):
            self.put(*atoms, COMMON if same_value(one, two) else MIXED)
        for *atoms, state in zip(*(jaxpr.invars for jaxpr in jaxprs), states, strict=True):
            self.put(*atoms, state)
        self.run(*(jaxpr.eqns for jaxpr in jaxprs))
        return [self.state(*atoms) for atoms in zip(*(jaxpr.outvars for jaxpr in jaxprs), strict=True)]

    def settled(self, own: Any, other: Any, fixed: list[State], carry: list[State], rest: list[State]) -> tuple:
        """What a loop carries in every turn, and what its body gives besides."""
        while True:
            results = self.body(own, other, [*fixed, *carry, *rest])
            after = list(map(_both, carry, results[: len(carry)]))
            if after == carry:
                return carry, results[len(carry) :]
            carry = after

    def part_apart(self, own: Sequence[Read], other: Sequence[Read]) -> bool:
        """Whether a part's sums over tokens are sums over rows, or all of what is common: it would count once a batch,
        and so weigh less beside rows the more of these there are in one."""
        if len(own) != len(other):
            return False
        states = [self._activation(*reads) for reads in zip(own, other, strict=True)]
        return MIXED not in states and len({state == COMMON for state in states}) <= 1

    def _activation(self, own: Read, other: Read) -> State:
        """Of what a product reads; MIXED if its sums over tokens are none over rows."""
        if own.product != other.product or len(own.added) != len(other.added):
            return MIXED
        atoms = [
            *zip(own.activations, other.activations, strict=True),
            *((one.value, two.value) for one, two in zip(own.added, other.added, strict=True)),
        ]
        states = [self.state(*pair) for pair in atoms]
        first = states[0]
        if isinstance(own.product, Convolution):
            apart = first in (COMMON, MIXED) or first.axis == own.product.lhs_spec[0]
        else:
            apart = isinstance(own.product, Dot) or not any(isinstance(state, Rows) for state in states)
        return first if apart and MIXED not in states else MIXED


def same_value(one: Any, two: Any) -> bool:
    """Whether two constants are equal to the bit."""
    if one is two or any(isinstance(x, jax.ShapeDtypeStruct) for x in (one, two)):
        return one is two or one == two
    if any(isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) for x in (one, two)):
        return False
    one, two = np.asarray(one), np.asarray(two)
    return (one.shape, one.dtype) == (two.shape, two.dtype) and one.tobytes() == two.tobytes()


def _same_but_for_sizes(own: jex.JaxprEqn, other: jex.JaxprEqn) -> bool:
    """Whether the parameters of two equations are equal, those but for sizes that differ with the results'."""
    if own.params.keys() != other.params.keys():
        return False
    sized = SIZES if own.primitive.name in RULES or own.primitive.name == "iota" else ()
    return all(value_text(own.params[key]) == value_text(other.params[key]) for key in own.params if key not in sized)


def _shapes(equation: jex.JaxprEqn) -> list[tuple[int, ...]]:
    return [var.aval.shape for var in equation.outvars]


def _both(one: State, two: State) -> State:
    return one if one == two else MIXED


def _called_scan(followed: _Followed, own, other, states: list[State]) -> Sequence[State]:
    first, count = scan_counts(own)
    bodies = [closed(equation.params["jaxpr"]) for equation in (own, other)]
    mixed = [MIXED] * len(own.outvars)
    if scan_counts(other) != (first, count) or own.params["reverse"] != other.params["reverse"]:
        return mixed
    fixed, carry, xs = states[:first], states[first : first + count], states[first + count :]
    if own.params["length"] != other.params["length"]:
        # One row after another, if each step has one, and nothing goes from one to the next.
        lengths = own.params["length"], other.params["length"]
        if lengths != followed.rows or count or any(x != Rows(0) for x in xs) or set(fixed) - {COMMON}:
            return mixed
        return [
            Rows(0) if state == COMMON else MIXED for state in followed.body(*bodies, [*fixed, *[COMMON] * len(xs)])
        ]
    xs = [state if not isinstance(state, Rows) else state.at(state.axis - 1) if state.axis else MIXED for state in xs]
    carry, ys = followed.settled(*bodies, fixed, carry, xs)
    return [*carry, *(state.at(state.axis + 1) if isinstance(state, Rows) else state for state in ys)]


def _called_while(followed: _Followed, own, other, states: list[State]) -> Sequence[State]:
    counts = [[equation.params[key] for key in ("cond_nconsts", "body_nconsts")] for equation in (own, other)]
    conditions, bodies = ([equation.params[key] for equation in (own, other)] for key in ("cond_jaxpr", "body_jaxpr"))
    (of_condition, of_body) = counts[0]
    fixed, carry = states[of_condition : of_condition + of_body], states[of_condition + of_body :]
    if counts[0] == counts[1]:
        carry, _ = followed.settled(*map(closed, bodies), fixed, carry, [])
        if followed.body(*map(closed, conditions), [*states[:of_condition], *carry]) == [COMMON]:
            return carry
    return [MIXED] * len(carry)


def _called_cond(followed: _Followed, own, other, states: list[State]) -> Sequence[State]:
    branches = own.params["branches"], other.params["branches"]
    if states[0] != COMMON or len(branches[0]) != len(branches[1]):
        return [MIXED] * len(own.outvars)
    results = [followed.body(*map(closed, pair), states[1:]) for pair in zip(*branches, strict=True)]
    return [states[0] if len(set(states)) == 1 else MIXED for states in zip(*results, strict=True)]


NESTED = {
    "scan": _called_scan,
    "while": _called_while,
    "cond": _called_cond,
    "optimization_barrier": lambda followed, own, other, states: states,
}
