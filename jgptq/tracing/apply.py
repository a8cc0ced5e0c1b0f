"""quantized(f): the same function over packed parameters, each product served by `matmul`.

f is traced on the shapes of the parameters; its equations then run with each packed leaf standing for itself until
an equation uses it. A product that reads the leaf as it was packed goes to `matmul`; anything else gets the
dequantized array.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jgptq.kernels.matmul import matmul
from jgptq.tensor import QuantizedTensor
from jgptq.tracing import views
from jgptq.tracing.graph import as_abstract, called_jaxpr, close, is_quantized


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A view of a packed leaf, not yet dequantized: the equations that make it of the leaf are kept."""

    weight: QuantizedTensor
    view: views.View
    equations: tuple[jex.JaxprEqn, ...] = ()

    def array(self) -> jax.Array:
        value = self.weight.dequantize()
        for equation in self.equations:
            (value,) = _bind(equation, [value])
        return value


def quantized(f: Callable) -> Callable:
    """f(params, *inputs) with some leaves of params packed: same arguments, same outputs, same tree.

    Keyword arguments are passed to f as they are. The result may be jitted, vmapped over inputs, and differentiated
    with respect to inputs and float parameters.
    """

    @functools.wraps(f)
    def apply(params, *inputs, **keywords):
        leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
        if not any(is_quantized(leaf) for leaf in leaves):
            return f(params, *inputs, **keywords)
        abstract = jax.tree.unflatten(tree, [as_abstract(leaf) if is_quantized(leaf) else leaf for leaf in leaves])
        traced, output = jax.make_jaxpr(functools.partial(f, **keywords), return_shape=True)(abstract, *inputs)
        arguments = [_Packed(x, views.whole(x.shape)) if is_quantized(x) else x for x in leaves]
        arguments += jax.tree.leaves(inputs)
        results = _evaluate(traced.jaxpr, traced.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(output), [_array(value) for value in results])

    return apply


def _evaluate(jaxpr: jex.Jaxpr, consts, arguments: list[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        packed = any(isinstance(value, _Packed) for value in operands)
        values.update(zip(equation.outvars, (_serve if packed else _bind)(equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _serve(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of an equation with a packed operand."""
    called = called_jaxpr(equation)
    if called is not None:
        return _call(equation, called, operands)
    if len(operands) == 1:
        view = views.follow(operands[0].view, equation)
        if view is not None:
            packed = operands[0]
            return [_Packed(packed.weight, view, (*packed.equations, equation))]
    if equation.primitive.name == "dot_general":
        product = _product(equation, operands)
        if product is not None:
            return [product]
    return _bind(equation, [_array(value) for value in operands])


def _call(equation: jex.JaxprEqn, called: jex.ClosedJaxpr, operands: list[Any]) -> list[Any]:
    """Runs a called jaxpr in place, its derivative the one its author asked for: recomputed, or by their own rule."""
    name, params = equation.primitive.name, equation.params
    if name.startswith("custom_"):
        return _call_custom(equation, called, operands)
    if "remat" not in name and name != "checkpoint":
        return _evaluate(called.jaxpr, called.consts, operands)

    floats = [not isinstance(value, _Packed) for value in operands]

    def body(*arrays):
        rest = iter(arrays)
        full = [next(rest) if is_float else value for is_float, value in zip(floats, operands, strict=True)]
        return [_array(value) for value in _evaluate(called.jaxpr, called.consts, full)]

    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):  # one for each operand
        prevent_cse = tuple(itertools.compress(prevent_cse, floats))
    return jax.checkpoint(body, prevent_cse=prevent_cse, policy=params["policy"])(*itertools.compress(operands, floats))


def _call_custom(equation: jex.JaxprEqn, called: jex.ClosedJaxpr, operands: list[Any]) -> list[Any]:
    """A custom_jvp or custom_vjp call: its value from the packed weights, its rule on the dequantized ones."""

    def unpacked(arrays):
        pairs = zip(operands, arrays, strict=True)
        return [dataclasses.replace(v, weight=a) if isinstance(v, _Packed) else a for v, a in pairs]

    def served(*arrays):
        return [_array(value) for value in _evaluate(called.jaxpr, called.consts, unpacked(arrays))]

    def dense(*arrays):
        return _bind(equation, [_array(value) for value in unpacked(arrays)])

    if equation.primitive.name == "custom_jvp_call":
        call = jax.custom_jvp(served)
        call.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))
    else:
        call = jax.custom_vjp(served)
        call.defvjp(lambda *arrays: (served(*arrays), arrays), lambda arrays, g: jax.vjp(dense, *arrays)[1](g))
    return call(*(value.weight if isinstance(value, _Packed) else value for value in operands))


def _product(equation: jex.JaxprEqn, operands: list[Any]) -> jax.Array | None:
    """A dot_general of a packed weight through `matmul`; None if it does not read the weight as it was packed."""
    packed = [isinstance(value, _Packed) for value in operands]
    if all(packed):
        return None
    side = packed.index(True)
    weight, view, x = operands[side].weight, operands[side].view, operands[1 - side]
    contracted, batch = equation.params["dimension_numbers"]
    if batch[side] or weight.codes.ndim != 2:
        return None
    free = tuple(axis for axis in range(len(view)) if axis not in contracted[side])
    if views.layout(weight.layout.shape, view, (), tuple(contracted[side]), free) != weight.layout:
        return None
    if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.complexfloating):
        return None

    tokens = tuple(axis for axis in range(x.ndim) if axis not in contracted[1 - side])
    token_shape = tuple(x.shape[axis] for axis in tokens)
    rows = x.transpose(*tokens, *contracted[1 - side]).reshape(*token_shape, weight.in_features)
    # The product's own types decide: a weight cast to bfloat16 before use is served in bfloat16.
    rows = rows.astype(jnp.result_type(rows.dtype, equation.invars[side].aval.dtype))
    result = matmul(rows, weight, preferred_element_type=equation.outvars[0].aval.dtype)
    outputs = tuple(equation.invars[side].aval.shape[axis] for axis in free)
    result = result.reshape(*token_shape, *outputs)
    if side == 0:  # dot_general puts the first operand's axes first
        count = len(token_shape)
        result = result.transpose(*range(count, result.ndim), *range(count))
    return result


def _array(value: Any) -> Any:
    return value.array() if isinstance(value, _Packed) else value


def _bind(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of one equation on arrays."""
    inputs = [jex.Var(atom.aval) for atom in equation.invars]
    outputs = [jex.Var(var.aval) for var in equation.outvars]
    alone = close(inputs, outputs, [equation.replace(invars=inputs, outvars=outputs)])
    return jex.jaxpr_as_fun(alone)(*operands)
