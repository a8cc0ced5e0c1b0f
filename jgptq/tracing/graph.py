"""A function as a flat list of equations, and the products of a weight with an activation found in it.

The function is traced once to a jaxpr; calls inside it are inlined; every value that is a mere view of a parameter
leaf (transposed, reshaped, cast) is followed back to the leaf.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jgptq.tensor import Layout, QuantizedTensor
from jgptq.tracing import views

Atom = Any  # jex.Var | jex.Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """How a dot_general reads its activation: x (…) becomes (tokens, in) with `tokens` and `contracted` axes moved."""

    tokens: tuple[int, ...]
    contracted: tuple[int, ...]

    def matrix(self, x: jax.Array) -> jax.Array:
        """The activation as (tokens, in) rows; whole numbers become float32."""
        rows, columns = (math.prod(x.shape[axis] for axis in axes) for axes in (self.tokens, self.contracted))
        matrix = x.transpose(*self.tokens, *self.contracted).reshape(rows, columns)
        return matrix if jnp.issubdtype(x.dtype, jnp.floating) else matrix.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One parameter leaf as seen by the function.

    path: the leaf's keys joined by dots. quantizable: it is the weight of exactly one product and used nowhere else;
    reason: what it is used for, and if not quantizable, why not. layout: how the leaf maps to (in, out).
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    quantizable: bool
    reason: str
    layout: Layout | None = None
    leaf: int = dataclasses.field(repr=False)
    activation: Any = dataclasses.field(default=None, repr=False)
    product: Product | None = dataclasses.field(default=None, repr=False)
    position: int = dataclasses.field(default=0, repr=False)

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape)) or "scalar"
        return f"{self.path}  {shape} {np.dtype(self.dtype).name}  {self.reason}"


@dataclasses.dataclass(frozen=True)
class Graph:
    """A traced function: equations in order, over variables used once as outputs and nowhere redefined."""

    equations: list[jex.JaxprEqn]
    leaves: list[jex.Var]
    inputs: list[jex.Var]
    outputs: list[Atom]
    output_tree: Any
    constants: dict[jex.Var, Any]
    leaf_views: dict[jex.Var, tuple[int, int]]  # variable -> (leaf, position of the equation that makes the view)
    sites: list[Site]


def leaf_paths(params: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, keys joined by dots; a QuantizedTensor counts as one leaf."""
    flat, _ = jax.tree.flatten_with_path(params, is_leaf=is_quantized)
    return [(jax.tree_util.keystr(path, simple=True, separator=".") or "params", leaf) for path, leaf in flat]


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def trace(f: Callable, params: Any, *inputs: Any) -> Graph:
    """Traces f(params, *inputs); parameter leaves may be anything with a shape and a dtype."""
    if not callable(f):
        raise TypeError(f"f is a {type(f).__name__}; give a function f(params, *inputs)")
    named = leaf_paths(params)
    for path, leaf in named:
        if is_quantized(leaf):
            raise ValueError(f"{path} is already a QuantizedTensor; give float parameters (dequantize it first)")
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
            raise TypeError(
                f"{path} is a {type(leaf).__name__}; parameters are arrays or numbers: "
                "bind anything else to f with functools.partial"
            )
    abstract = jax.tree.map(as_abstract, params)
    closed, output = jax.make_jaxpr(f, return_shape=True)(abstract, *inputs)
    constants: dict[jex.Var, Any] = {}
    invars = [jex.Var(v.aval) for v in closed.jaxpr.invars]
    equations: list[jex.JaxprEqn] = []
    outputs = _inline(closed.jaxpr, closed.consts, invars, equations, constants)
    equations, outputs = _without_repeats(equations, outputs)
    equations = _without_dead(equations, outputs)
    leaves = invars[: len(named)]
    leaf_views, view_of = _follow_leaves(equations, leaves)
    sites = _find_sites(named, equations, outputs, leaves, leaf_views, view_of)
    return Graph(
        equations,
        leaves,
        invars[len(named) :],
        outputs,
        jax.tree.structure(output),
        constants,
        leaf_views,
        sites,
    )


def find_weights(f: Callable, params: Any, *inputs: Any) -> list[Site]:
    """Every floating-point leaf of the parameters of f(params, *inputs): what would be quantized, what not, and why.

    Nothing is computed: params and inputs may be jax.ShapeDtypeStruct. Print the items for a readable line each.
    """
    return trace(f, params, *inputs).sites


def as_abstract(leaf: Any) -> Any:
    """A leaf's shape and dtype, without its bytes."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        # A weakly typed leaf takes the dtype of what it meets: it must do so here as well.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
    return leaf


def called_jaxpr(equation: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
    """The jaxpr of an equation that only calls it (jit, remat, custom_jvp, custom_vjp …); None for all others."""
    if equation.primitive.name not in CALLS:
        return None
    params = equation.params
    called = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return called if isinstance(called, jex.ClosedJaxpr) else jex.ClosedJaxpr(called, ())


def close(inputs: list[jex.Var], outputs: list[Atom], equations: list[jex.JaxprEqn]) -> jex.ClosedJaxpr:
    """A jaxpr of these equations, with no constants."""
    names = jex.DebugInfo("jgptq", "segment", None, None)
    return jex.ClosedJaxpr(jex.Jaxpr((), inputs, outputs, equations, debug_info=names), ())


# Equations that stand for the value of their jaxpr. Derivative rules are lost: a forward pass needs none.
CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)


def _inline(jaxpr, consts, invars, equations, constants) -> list[Atom]:
    """Appends the equations of a jaxpr with calls inlined and fresh variables; returns its outputs."""
    values: dict[Any, Atom] = dict(zip(jaxpr.invars, invars, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        values[var] = jex.Var(var.aval)
        constants[values[var]] = value

    def read(atom):
        return atom if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        called = called_jaxpr(equation)
        if called is not None:
            results = _inline(called.jaxpr, called.consts, arguments, equations, constants)
        else:
            results = [jex.Var(var.aval) for var in equation.outvars]
            equations.append(equation.replace(invars=arguments, outvars=results))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# Cheap one-operand equations that layers repeat on a shared input (each casts or reshapes x for itself).
SHARED = ("convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "stop_gradient", "copy")


def _without_repeats(equations, outputs):
    """Makes equal cheap equations on one operand one, so that layers that share an input are seen to."""
    first: dict[Any, jex.Var] = {}
    same: dict[jex.Var, jex.Var] = {}

    def read(atom):
        return atom if isinstance(atom, jex.Literal) else same.get(atom, atom)

    kept = []
    for equation in equations:
        equation = equation.replace(invars=[read(atom) for atom in equation.invars])
        operand = equation.invars[0] if equation.invars else None
        if equation.primitive.name in SHARED and len(equation.invars) == 1 and isinstance(operand, jex.Var):
            key = (equation.primitive.name, operand, str(sorted(equation.params.items(), key=lambda item: item[0])))
            if key in first:
                same[equation.outvars[0]] = first[key]
                continue
            first[key] = equation.outvars[0]
        kept.append(equation)
    return kept, [read(atom) for atom in outputs]


def _without_dead(equations, outputs):
    """Drops equations that no output needs; those with effects stay."""
    needed = {atom for atom in outputs if isinstance(atom, jex.Var)}
    kept = []
    for equation in reversed(equations):
        if equation.effects or any(var in needed for var in equation.outvars):
            kept.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, jex.Var))
    return kept[::-1]


def _follow_leaves(equations, leaves):
    """Every variable that is a view of a leaf: where it is made, and the view itself."""
    leaf_views: dict[jex.Var, tuple[int, int]] = {}
    view_of = {var: views.whole(var.aval.shape) for var in leaves if hasattr(var.aval, "shape")}
    leaf_of = {var: leaf for leaf, var in enumerate(leaves)}
    for position, equation in enumerate(equations):
        operand = equation.invars[0] if len(equation.invars) == 1 else None
        if isinstance(operand, jex.Var) and operand in view_of:
            view = views.follow(view_of[operand], equation)
            if view is not None:
                result = equation.outvars[0]
                view_of[result], leaf_of[result] = view, leaf_of[operand]
                leaf_views[result] = (leaf_of[operand], position)
    return leaf_views, view_of


def _find_sites(named, equations, outputs, leaves, leaf_views, view_of) -> list[Site]:
    leaf_of = {var: leaf for leaf, var in enumerate(leaves)} | {var: leaf for var, (leaf, _) in leaf_views.items()}
    products: dict[int, list[dict]] = defaultdict(list)
    others: dict[int, list[str]] = defaultdict(list)
    for position, equation in enumerate(equations):
        if any(var in leaf_views for var in equation.outvars):
            continue
        operands = [atom if isinstance(atom, jex.Var) and atom in leaf_of else None for atom in equation.invars]
        weights = [operand for operand in operands if operand is not None]
        if equation.primitive.name == "dot_general" and len(weights) == 1:
            side = operands.index(weights[0])
            found = _product(equation, side, view_of[weights[0]], leaves[leaf_of[weights[0]]].aval.shape)
            if isinstance(found, str):
                others[leaf_of[weights[0]]].append(found)
            else:
                layout, product = found
                products[leaf_of[weights[0]]].append(
                    {
                        "layout": layout,
                        "product": product,
                        "activation": equation.invars[1 - side],
                        "position": position,
                    }
                )
            continue
        for operand in weights:
            name = equation.primitive.name
            others[leaf_of[operand]].append("a product of two weights" if name == "dot_general" else name)
    for atom in outputs:
        if isinstance(atom, jex.Var) and atom in leaf_of:
            others[leaf_of[atom]].append("an output of the function")

    sites = []
    for leaf, (path, _) in enumerate(named):
        aval = leaves[leaf].aval
        shape, dtype = tuple(aval.shape), aval.dtype
        quantizable, reason = _verdict(products[leaf], others[leaf])
        if not jnp.issubdtype(dtype, jnp.floating):
            continue
        details = products[leaf][0] if quantizable else {}
        sites.append(
            Site(path=path, shape=shape, dtype=dtype, quantizable=quantizable, reason=reason, leaf=leaf, **details)
        )
    return sites


def _verdict(products: list[dict], others: list[str]) -> tuple[bool, str]:
    uses = ", ".join(dict.fromkeys(others))
    if not products:
        return False, f"no product that could be quantized (used in {uses})" if uses else "not used"
    if len(products) > 1:
        return False, f"used in {len(products)} products" + (f" and in {uses}" if uses else "")
    if others:
        return False, f"also used in {uses}"
    layout = products[0]["layout"]
    return True, f"product of {layout.in_features} inputs and {layout.out_features} outputs"


def _product(equation, side: int, view: views.View, shape: tuple[int, ...]) -> tuple[Layout, Product] | str:
    """The roles of weight and activation in a dot_general; or why it cannot be quantized."""
    contracted, batch = equation.params["dimension_numbers"]
    activation = equation.invars[1 - side].aval
    if batch[side]:
        return "a batched product"
    if 0 in shape:
        return "a product of no elements"
    if jnp.issubdtype(activation.dtype, jnp.complexfloating):
        return "a complex product"
    free = tuple(axis for axis in range(len(view)) if axis not in contracted[side])
    tokens = tuple(axis for axis in range(len(activation.shape)) if axis not in contracted[1 - side])
    layout = views.layout(shape, view, (), tuple(contracted[side]), free)
    if not layout.in_axes:
        return "an outer product"
    return layout, Product(tokens=tokens, contracted=tuple(contracted[1 - side]))
