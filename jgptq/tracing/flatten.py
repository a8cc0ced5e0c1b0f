"""A jaxpr as one flat list of equations, with every use of a parameter in it.

The jaxpr is run on symbols. A value computed from a parameter alone by views, casts, scaling and sums is carried as a
`Weight`, and written out as equations only before an equation that uses it, again for each use: no value derived from
a weight is alive between two products, so a weight may be replaced there. Calls are inlined, and scans over stacked
weights unrolled, each step reading its own part of the stack. A scan that uses the same weights at every step stays a
scan, which then also gives out the activations that its products read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jgptq.tensor import Index, Layout
from jgptq.tracing import views
from jgptq.tracing.jaxprs import Atom, called_jaxpr, close, closed, scan_counts, varying_axes
from jgptq.tracing.products import Product, read_product

# A scan over weights is unrolled up to this many equations.
MAX_UNROLLED = 50_000
# Cheap one-operand equations that layers repeat on a shared input (each casts or reshapes x for itself).
SHARED = ("convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "stop_gradient", "copy")
ELEMENTWISE = ("mul", "div", "add", "sub", "neg", "convert_element_type")
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Term:
    """A view of a leaf as it goes into a Weight. scaled: the leaf's axes along which a factor on it varies."""

    leaf: int
    view: views.View
    scaled: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A value that is linear in parameters: its terms, and how it is computed.

    equation and operands: None for a plain view of one leaf.
    """

    aval: Any
    terms: tuple[Term, ...]
    equation: jex.JaxprEqn | None = None
    operands: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Use:
    """A leaf in one equation. first: the first result of the equations that compute the weight and use it; None: the
    leaf itself is handed on, and `place` is the number of equations before that.

    kind: what the equation does. For a product that reads the leaf as a weight: layout, product and activations, and,
    where the weight is the leaf as it is, the product's result with the side the weight is on.
    """

    leaf: int
    index: Index
    kind: str
    first: jex.Var | None
    layout: Layout | None = None
    product: Product | None = None
    activations: tuple[Atom, ...] = ()
    place: int | None = None
    result: jex.Var | None = None
    side: int = 1


class Flattener:
    """Collects equations, the constants and parts of leaves they read, and the uses of leaves."""

    def __init__(self):
        self.equations: list[jex.JaxprEqn] = []
        self.constants: dict[jex.Var, Any] = {}
        self.parts: dict[jex.Var, tuple[int, Index]] = {}
        self.uses: list[Use] = []
        self._part_vars: dict[tuple[int, Index], jex.Var] = {}
        self._from_inputs: set[jex.Var] = set()
        self._shared: dict[Any, jex.Var] = {}
        self._steps: dict[int, jex.Var] = {}

    def leaf(self, number: int, aval: Any) -> Any:
        """The symbol of a parameter: a Weight, or for what cannot be one (whole numbers, no elements) a variable."""
        index = tuple((0, size) for size in aval.shape)
        var = jex.Var(aval)
        self._part_vars[number, index] = var
        self.parts[var] = (number, index)
        if not jnp.issubdtype(aval.dtype, jnp.floating) or 0 in aval.shape:
            return var
        return Weight(aval, (Term(number, views.whole(aval.shape)),))

    def input(self, aval: Any) -> jex.Var:
        var = jex.Var(aval)
        self._from_inputs.add(var)
        return var

    def output(self, value: Any) -> Atom:
        """A value as the function gives it out."""
        return self._written(value, "an output of the function")

    def run(self, jaxpr: jex.Jaxpr, consts: Sequence, operands: Sequence) -> list[Any]:
        """Appends the jaxpr's equations with fresh variables; its results, symbols like the operands."""
        values: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            values[var] = jex.Var(var.aval)
            self.constants[values[var]] = value
        makers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}

        def read(atom):
            return atom if isinstance(atom, jex.Literal) else values[atom]

        for equation in jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            called = called_jaxpr(equation)
            if called is not None:
                results = self.run(called.jaxpr, called.consts, arguments)
            elif not any(isinstance(argument, Weight) for argument in arguments):
                results = self._emit(equation, arguments)
            else:
                results = self._follow(equation, arguments, makers) or self._use(equation, arguments)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _call(self, f: Callable, arguments: Sequence[Atom]) -> Atom:
        """The result of f, traced on these arguments."""
        traced = jax.make_jaxpr(f)(*map(_abstract, arguments))
        return self.run(traced.jaxpr, traced.consts, arguments)[0]

    def _emit(self, equation: jex.JaxprEqn, arguments: Sequence[Atom]) -> list[jex.Var]:
        """Appends an equation on variables; equal cheap ones become one, so layers that share an input are seen to."""
        operand = arguments[0] if len(arguments) == 1 else None
        key = None
        if equation.primitive.name in SHARED and isinstance(operand, jex.Var):
            key = (equation.primitive.name, operand, str(sorted(equation.params.items(), key=lambda item: item[0])))
            if key in self._shared:
                return [self._shared[key]]
        results = self._append(equation, arguments)
        if key is not None:
            self._shared[key] = results[0]
        if any(isinstance(atom, jex.Var) and atom in self._from_inputs for atom in arguments):
            self._from_inputs.update(results)
        return results

    def _append(self, equation: jex.JaxprEqn, arguments: Sequence[Atom]) -> list[jex.Var]:
        results = [jex.Var(var.aval) for var in equation.outvars]
        self.equations.append(equation.replace(invars=list(arguments), outvars=results))
        return results

    def _follow(self, equation: jex.JaxprEqn, arguments: list[Any], makers: dict) -> list[Any] | None:
        """The results of an equation that keeps a weight linear; None for all others."""
        name = equation.primitive.name
        if name == "optimization_barrier":
            return list(arguments)
        if name == "scan":
            return self._scan(equation, arguments)
        if name == "split":
            return self._split(equation, arguments[0])
        if len(arguments) == 1:
            (weight,) = arguments
            if name == "neg":
                return [self._combined(equation, arguments, weight.terms)]
            spread = self._spread(weight, equation.outvars[0].aval, functools.partial(self._viewed, equation))
            if spread is not None and name != "convert_element_type":
                return [spread]
            terms = [(term, views.follow(term.view, equation)) for term in weight.terms]
            if any(view is None for _, view in terms):
                return None
            terms = tuple(dataclasses.replace(term, view=view) for term, view in terms)
            if weight.equation is None:
                return [Weight(equation.outvars[0].aval, terms)]
            return [self._combined(equation, arguments, terms)]
        if len(arguments) == 2 and name in ("mul", "div", "add", "sub"):
            return self._linear(equation, arguments, makers)
        return None

    def _spread(self, weight: Weight, aval: Any, view: Callable) -> Weight | None:
        """A view of a weight computed elementwise, as the same computation on views of its operands: what is cut out
        of a scaled stack then reads its own part of the stack. None if `view` cannot be taken of an operand."""
        if weight.equation is None or weight.equation.primitive.name not in ELEMENTWISE:
            return None
        operands = []
        for operand in weight.operands:
            viewed = operand if operand.aval.shape == () != weight.aval.shape else view(operand)
            if viewed is None:
                return None
            operands.append(viewed)
        terms = tuple(
            dataclasses.replace(new, scaled=old.scaled)
            for operand in operands
            if isinstance(operand, Weight)
            for new, old in zip(operand.terms, weight.terms, strict=False)
        )
        if len(terms) != len(weight.terms):
            return None
        return Weight(aval, terms, weight.equation.replace(outvars=[jex.Var(aval)]), tuple(operands))

    def _viewed(self, equation: jex.JaxprEqn, operand: Any) -> Any:
        """A one-operand equation's result for another operand of the same shape; None if it has another."""
        if operand.aval.shape != equation.invars[0].aval.shape:
            return None
        if isinstance(operand, Weight):
            aval = jax.core.ShapedArray(equation.outvars[0].aval.shape, operand.aval.dtype)
            found = self._follow(equation.replace(outvars=[jex.Var(aval)]), [operand], {})
            return found[0] if found else None
        aval = jax.core.ShapedArray(equation.outvars[0].aval.shape, operand.aval.dtype)
        return self._emit(equation.replace(outvars=[jex.Var(aval)]), [operand])[0]

    def _linear(self, equation: jex.JaxprEqn, arguments: list[Any], makers: dict) -> list[Any] | None:
        """A weight scaled by, or added to, what does not depend on the function's inputs."""
        shape = equation.outvars[0].aval.shape
        name = equation.primitive.name
        if any(isinstance(argument, jex.Var) and argument in self._from_inputs for argument in arguments):
            return None
        # What is smaller than the result is repeated along it: no weight, whatever it is a view of.
        arguments = [a if a.aval.shape == shape else self._written(a, name) for a in arguments]
        weights = [argument for argument in arguments if isinstance(argument, Weight)]
        others = [argument for argument in arguments if not isinstance(argument, Weight)]
        if not weights:
            return None
        if name in ("add", "sub"):
            terms = tuple(term for weight in weights for term in weight.terms)
            return [self._combined(equation, arguments, terms)]
        if len(weights) == 2 or (name == "div" and weights[0] is not arguments[0]):
            return None
        (weight,), (other,) = weights, others
        maker = makers.get(equation.invars[arguments.index(other)]) if isinstance(other, jex.Var) else None
        axes = varying_axes(other.aval.shape, shape, maker)
        if axes is None:
            return None
        terms = tuple(
            dataclasses.replace(
                term, scaled=term.scaled.union(factor.axis for axis in axes for factor in term.view.axes[axis])
            )
            for term in weight.terms
        )
        return [self._combined(equation, arguments, terms)]

    def _combined(self, equation, arguments, terms) -> Weight:
        return Weight(equation.outvars[0].aval, terms, equation, tuple(arguments))

    def _split(self, equation: jex.JaxprEqn, weight: Weight) -> list[Weight] | None:
        if weight.equation is not None:
            return None
        results, start = [], 0
        for size, var in zip(equation.params["sizes"], equation.outvars, strict=True):
            view = views.cut(weight.terms[0].view, equation.params["axis"], start, start + int(size))
            if view is None:
                return None
            results.append(Weight(var.aval, (dataclasses.replace(weight.terms[0], view=view),)))
            start += int(size)
        return results

    def _use(self, equation: jex.JaxprEqn, arguments: list[Any]) -> list[jex.Var]:
        """Appends an equation that uses weights, and what they are computed by, and notes the use."""
        name = equation.primitive.name
        sides = [side for side, argument in enumerate(arguments) if isinstance(argument, Weight)]
        start = len(self.equations)
        written = [self._write(argument) for argument in arguments]
        results = self._append(equation, written)
        if any(isinstance(atom, jex.Var) and atom in self._from_inputs for atom in written):
            self._from_inputs.update(results)
        first = self.equations[start].outvars[0] if self.equations[start].outvars else None
        for side in sides:
            for term in arguments[side].terms:
                found: Any = _opaque(equation)
                if name in PRODUCTS:
                    found = "a product of two weights"
                    if len(sides) == 1:
                        found = read_product(self.equations[-1], side, term.view)
                if not isinstance(found, str) and _is_scaled_along_inputs(term, found[0]):
                    found = "a product after scaling along its inputs"
                kind, details = (found, ()) if isinstance(found, str) else (name, found)
                use = Use(term.leaf, term.view.index, kind, first, *details)
                if details and arguments[side].equation is None:
                    use = dataclasses.replace(use, result=results[0], side=side)
                self.uses.append(use)
        return results

    def _written(self, value: Any, kind: str) -> Atom:
        if not isinstance(value, Weight):
            return value
        start = len(self.equations)
        var = self._write(value)
        first = self.equations[start].outvars[0] if start < len(self.equations) else None
        self.uses += [Use(term.leaf, term.view.index, kind, first, place=start) for term in value.terms]
        return var

    def _write(self, value: Any) -> Atom:
        """Appends the equations that compute a weight from parts of leaves."""
        if not isinstance(value, Weight):
            return value
        if value.equation is not None:
            return self._append(value.equation, [self._write(operand) for operand in value.operands])[0]
        (term,) = value.terms
        part = self._part(term)
        if value.aval == part.aval and term.view == views.whole(part.aval.shape)._replace(index=term.view.index):
            return part
        traced = _view_jaxpr(term.view, part.aval.dtype)
        values = {traced.jaxpr.invars[0]: part}
        for equation in traced.jaxpr.eqns:
            results = self._append(equation, [values.get(atom, atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return values[traced.jaxpr.outvars[0]]

    def _part(self, term: Term) -> jex.Var:
        key = (term.leaf, term.view.index)
        if key not in self._part_vars:
            whole = next(var for (leaf, _), var in self._part_vars.items() if leaf == term.leaf)
            aval = jax.core.ShapedArray(term.view.part_shape, whole.aval.dtype, weak_type=whole.aval.weak_type)
            self._part_vars[key] = jex.Var(aval)
            self.parts[self._part_vars[key]] = key
        return self._part_vars[key]

    def _scan(self, equation: jex.JaxprEqn, arguments: list[Any]) -> list[Any] | None:
        """A scan over stacked weights, step by step; None if that is too long."""
        params = equation.params
        body, length = closed(params["jaxpr"]), params["length"]
        first, count = scan_counts(equation)
        consts, carry, xs = arguments[:first], arguments[first : first + count], arguments[first + count :]
        if not any(isinstance(x, Weight) and len(x.aval.shape) > 1 for x in xs):
            return self._scan_on_constants(equation, consts, carry, xs)
        if length * len(body.jaxpr.eqns) > MAX_UNROLLED:
            return None
        carry = [self._written(value, "the start of a scan") for value in carry]
        steps = range(length)[::-1] if params["reverse"] else range(length)
        columns: list[list[Atom]] = []
        for step in steps:
            results = self.run(body.jaxpr, body.consts, [*consts, *carry, *(self._element(x, step) for x in xs)])
            carry = [self._written(value, "a scan's carry") for value in results[:count]]
            columns.append([self._written(value, "a scan's result") for value in results[count:]])
        if params["reverse"]:
            columns.reverse()
        if not columns:
            return None
        return carry + [self._stack(column) for column in zip(*columns, strict=True)]

    def _scan_on_constants(self, equation: jex.JaxprEqn, consts, carry, xs) -> list[jex.Var]:
        """A scan that uses the same weights at every step, with the activations they meet as further results."""
        params = equation.params
        body = closed(params["jaxpr"])
        inner = Flattener()
        inner.constants, inner.parts, inner._part_vars = self.constants, self.parts, self._part_vars
        inner._from_inputs = self._from_inputs
        variables = [inner.input(var.aval) for var in body.jaxpr.invars[len(consts) :]]
        results = inner.run(body.jaxpr, body.consts, [*consts, *variables])
        results = [inner._written(value, "a scan's carry or result") for value in results]

        # What the body reads from outside, parts of leaves among it, are its constants.
        defined = {*variables, *(var for e in inner.equations for var in e.outvars)}
        read = (*(atom for e in inner.equations for atom in e.invars), *results)
        free = list(dict.fromkeys(var for var in read if isinstance(var, jex.Var) and var not in defined))
        seen = [use.activations if defined.intersection(use.activations) else () for use in inner.uses]
        extra = list(dict.fromkeys(atom for atoms in seen for atom in atoms))
        step = close([*free, *variables], [*results, *extra], inner.equations)

        def scan(consts, carry, xs):
            def body(carry, x):
                results = jex.jaxpr_as_fun(step)(*consts, *carry, *x)
                return results[: len(carry)], results[len(carry) :]

            carry, ys = lax.scan(body, carry, xs, params["length"], params["reverse"], params["unroll"])
            return [*carry, *ys]

        carry, xs = ([self._written(value, "a scan") for value in values] for values in (carry, xs))
        traced = jax.make_jaxpr(scan)(*([_abstract(atom) for atom in atoms] for atoms in (free, carry, xs)))
        start = len(self.equations)
        outputs = self.run(traced.jaxpr, traced.consts, [*free, *carry, *xs])
        first = self.equations[start].outvars[0]
        stacks = dict(zip(extra, outputs[len(results) :], strict=True))
        for use, atoms in zip(inner.uses, seen, strict=True):
            use = dataclasses.replace(use, first=first, place=None, result=None)
            product = use.product.over_steps() if atoms else None
            if product is not None:
                use = dataclasses.replace(use, product=product, activations=tuple(stacks[atom] for atom in atoms))
            elif atoms:
                use = Use(use.leaf, use.index, f"{use.kind} in a scan", first)
            self.uses.append(use)
        return outputs[: len(results)]

    def _element(self, x: Any, step: int) -> Any:
        """x[step] along the leading axis; the step is a value, so that the equations of all steps read alike."""
        if isinstance(x, Weight):
            found = self._layer(x, step)
            if found is not None:
                return found
        if step not in self._steps:
            self._steps[step] = jex.Var(jax.core.ShapedArray((), jnp.int32))
            self.constants[self._steps[step]] = np.int32(step)
        array = self._written(x, "a scan")
        return self._call(lambda x, i: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), [array, self._steps[step]])

    def _layer(self, x: Any, step: int) -> Any:
        """x[step] of a stacked weight, or of what a stacked weight is computed with."""
        if not isinstance(x, Weight):
            return self._element(x, step if x.aval.shape[0] > 1 else 0)
        aval = jax.core.ShapedArray(x.aval.shape[1:], x.aval.dtype, weak_type=x.aval.weak_type)
        if x.equation is not None:
            return self._spread(x, aval, lambda operand: self._layer(operand, step))
        (term,) = x.terms
        view = views.cut(term.view, 0, step, step + 1)
        if view is None:
            return None
        return Weight(aval, (dataclasses.replace(term, view=view._replace(axes=view.axes[1:])),))

    def _stack(self, values: Sequence[Atom]) -> Atom:
        return self._call(lambda *values: jnp.stack(values), values)


def _abstract(atom: Atom) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype, weak_type=getattr(atom.aval, "weak_type", False))


@functools.lru_cache(maxsize=4096)
def _view_jaxpr(view: views.View, dtype: Any) -> jex.ClosedJaxpr:
    return jax.make_jaxpr(view.of)(jax.ShapeDtypeStruct(view.part_shape, dtype))


def _is_scaled_along_inputs(term: Term, layout: Layout) -> bool:
    axes = layout.axes
    return any(axes[factor] in term.scaled for factor in layout.in_axes)


def _opaque(equation: jex.JaxprEqn) -> str:
    name = equation.primitive.name
    return f"a {name} of {equation.params['length']} steps" if name == "scan" else name
