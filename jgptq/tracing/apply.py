"""quantized(f): the same function over packed parameters, each product served by `matmul`.

f is traced on the shapes of the parameters; its equations then run with each packed leaf standing for itself until
an equation uses it. A product that reads the leaf as it was packed goes to `matmul`; anything else gets the
dequantized array.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jgptq.kernels.grouped import grouped_matmul
from jgptq.kernels.matmul import matmul
from jgptq.kernels.prepack import Prepacked, unprepack
from jgptq.tensor import QuantizedTensor, cut, unpack_columns, with_stack_in_layout
from jgptq.tracing import views
from jgptq.tracing.graph import as_abstract, is_quantized, is_static
from jgptq.tracing.jaxprs import called_jaxpr, close, closed, scan_counts, varying_axes


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A view of a packed leaf, not yet dequantized, times a factor, plus an array.

    weight: its stack in its layout. factor: its axes are those of the view, of size 1 where it does not vary.
    """

    weight: QuantizedTensor | Prepacked
    view: views.View
    factor: Any = None
    addend: Any = None

    @classmethod
    def whole(cls, weight: QuantizedTensor | Prepacked) -> "_Packed":
        return cls(with_stack_in_layout(weight), views.whole(weight.shape))

    def array(self) -> jax.Array:
        if self.is_plain:
            return self.view.of(self.weight.dequantize())
        value = self.view._replace(casts=()).of(self.weight.dequantize())
        if self.factor is not None:
            value = value * self.factor
        if self.addend is not None:
            value = value + self.addend
        return value.astype(self.dtype)

    @property
    def dtype(self) -> Any:
        return self.view.casts[-1] if self.view.casts else self.weight.dtype

    @property
    def is_plain(self) -> bool:
        return self.factor is None and self.addend is None

    @property
    def is_rounded(self) -> bool:
        """Whether it went through a cast that rounded it, which matmul would not."""
        digits = [jnp.finfo(dtype).nmant for dtype in (self.weight.dtype, *self.view.casts)]
        return min(digits) < digits[-1]


def quantized(f: Callable) -> Callable:
    """f(params, *inputs) with some leaves of params packed: same arguments, same outputs, same tree.

    Keyword arguments are passed to f as they are. The result may be jitted, vmapped over inputs, and differentiated
    with respect to inputs and float parameters. Scans over packed stacks stay scans.

    quantized(module), for a Flax NNX module with packed weights, is a module that is called as the module is.
    """

    @functools.wraps(f)
    def apply(params, *inputs, **keywords):
        leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
        if not any(is_quantized(leaf) for leaf in leaves):
            return f(params, *inputs, **keywords)
        arrays = [number for number, leaf in enumerate(leaves) if not is_static(leaf)]

        def on_arrays(values, *inputs):
            full = list(leaves)
            for number, value in zip(arrays, values, strict=True):
                full[number] = value
            return f(jax.tree.unflatten(tree, full), *inputs, **keywords)

        present = [leaves[number] for number in arrays]
        abstract = [as_abstract(leaf) if is_quantized(leaf) else leaf for leaf in present]
        traced, output = jax.make_jaxpr(on_arrays, return_shape=True)(abstract, *inputs)
        arguments = [_Packed.whole(x) if is_quantized(x) else x for x in present] + jax.tree.leaves(inputs)
        results = _evaluate(traced.jaxpr, traced.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(output), _arrays(results))

    return apply


def _evaluate(jaxpr: jex.Jaxpr, consts: Sequence, arguments: Sequence) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))
    makers = {var: equation for equation in jaxpr.eqns for var in equation.outvars}

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        packed = any(isinstance(value, _Packed) for value in operands)
        results = _serve(equation, operands, makers) if packed else _bind(equation, operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _serve(equation: jex.JaxprEqn, operands: list[Any], makers: dict) -> list[Any]:
    """The results of an equation with a packed operand."""
    name = equation.primitive.name
    called = called_jaxpr(equation)
    if called is not None:
        return _call(equation, called, operands)
    if name == "optimization_barrier":
        return operands
    if name in CONTROL:
        return CONTROL[name](equation, operands)
    results = None
    if name == "split" or len(operands) == 1:
        results = _follow(equation, operands[0])
    elif name in ("mul", "div", "add", "sub"):
        results = _linear(equation, operands, makers)
    elif name == "dot_general":
        results = _product(equation, operands)
    elif name == "ragged_dot_general":
        results = _grouped(equation, operands)
    elif name == "gather":
        results = _rows(equation, operands)
    return _bind(equation, _arrays(operands)) if results is None else results


def _follow(equation: jex.JaxprEqn, packed: _Packed) -> list[_Packed] | None:
    """Views of a packed weight; those of a part are cut out of it, still packed."""
    name = equation.primitive.name
    if name == "neg" and packed.addend is None:
        ones = jnp.ones((1,) * len(packed.view.axes), packed.weight.dtype)
        return [dataclasses.replace(packed, factor=-(ones if packed.factor is None else packed.factor))]
    if name == "split":
        starts = list(itertools.accumulate((int(size) for size in equation.params["sizes"]), initial=0))
        found = [views.cut(packed.view, equation.params["axis"], *ends) for ends in itertools.pairwise(starts)]
        results = [None if view is None else _part(packed, view) for view in found] if packed.is_plain else [None]
        return None if any(result is None for result in results) else results
    view = views.follow(packed.view, equation)
    if view is None:
        return None
    if not packed.is_plain:
        if name not in ("convert_element_type", "slice", "squeeze", "transpose"):
            return None
        packed = dataclasses.replace(
            packed,
            factor=None if packed.factor is None else _factor(packed.factor, equation),
            addend=None if packed.addend is None else _bind(equation, [packed.addend])[0],
        )
    part = _part(packed, view)
    return None if part is None else [part]


def _factor(factor: Any, equation: jex.JaxprEqn) -> Any:
    """The factor on a view, from that on what it is a view of."""
    name, params = equation.primitive.name, equation.params
    if name == "slice":
        ranges = zip(params["start_indices"], params["limit_indices"], factor.shape, strict=True)
        return factor[tuple(slice(start, stop) if size > 1 else slice(None) for start, stop, size in ranges)]
    if name == "squeeze":
        return jnp.squeeze(factor, params["dimensions"])
    return factor.transpose(params["permutation"]) if name == "transpose" else factor


def _part(packed: _Packed, view: views.View) -> _Packed | None:
    """A view of part of a packed weight, as a view of that part."""
    weight = packed.weight
    for axis, ((start, stop), size) in enumerate(zip(view.index, weight.shape, strict=True)):
        if (start, stop) != (0, size):
            weight = cut(unprepack(weight), axis, start, stop)
            if weight is None:
                return None
    view = view._replace(index=tuple((0, size) for size in weight.shape))
    return dataclasses.replace(packed, weight=weight, view=view)


def _linear(equation: jex.JaxprEqn, operands: list[Any], makers: dict) -> list[_Packed] | None:
    """A packed weight times a factor that varies along few of its axes, or plus an array."""
    name = equation.primitive.name
    shape = equation.outvars[0].aval.shape
    side = next(side for side, value in enumerate(operands) if isinstance(value, _Packed))
    packed, other, atom = operands[side], operands[1 - side], equation.invars[1 - side]
    if packed.view.shape != shape:
        return None
    if name in ("add", "sub"):
        other = _array(other)
        if side == 1 and name == "sub":
            return None
        other = jnp.broadcast_to(-other if name == "sub" else other, shape)
        return [dataclasses.replace(packed, addend=other if packed.addend is None else packed.addend + other)]
    if packed.addend is not None or (name == "div" and side == 1):
        return None
    other = _array(other)
    axes = varying_axes(jnp.shape(other), shape, None if isinstance(atom, jex.Literal) else makers.get(atom))
    if axes is None:
        return None
    factor = jnp.asarray(other) if jnp.ndim(other) else jnp.reshape(other, (1,) * len(shape))
    factor = factor[tuple(slice(None) if axis in axes else slice(1) for axis in range(len(shape)))]
    factor = factor.astype(jnp.promote_types(factor.dtype, jnp.float32))
    factor = 1 / factor if name == "div" else factor
    return [dataclasses.replace(packed, factor=factor if packed.factor is None else packed.factor * factor)]


def _product(equation: jex.JaxprEqn, operands: list[Any]) -> list[jax.Array] | None:
    """A dot_general of a packed weight through `matmul`; None if it does not read the weight as it was packed."""
    packed = [isinstance(value, _Packed) for value in operands]
    if all(packed):
        return None
    side = packed.index(True)
    own, x = operands[side], operands[1 - side]
    weight = own.weight
    contracted, batch = (tuple(map(tuple, axes)) for axes in equation.params["dimension_numbers"])
    free = tuple(axis for axis in range(len(own.view.axes)) if axis not in (*contracted[side], *batch[side]))
    if views.layout(own.view, batch[side], contracted[side], free).roles() != weight.layout.roles():
        return None
    result_type = equation.outvars[0].aval.dtype
    if jnp.issubdtype(result_type, jnp.complexfloating):
        return None
    if own.factor is not None and any(own.factor.shape[axis] > 1 for axis in contracted[side]):
        return None
    if own.is_rounded:
        return None

    other = 1 - side
    tokens = tuple(axis for axis in range(x.ndim) if axis not in (*contracted[other], *batch[other]))
    token_shape = tuple(x.shape[axis] for axis in tokens)
    batch_shape = tuple(x.shape[axis] for axis in batch[other])
    outputs = tuple(own.view.shape[axis] for axis in free)
    rows = x.transpose(*batch[other], *tokens, *contracted[other])
    rows = rows.reshape(*batch_shape, *token_shape, weight.in_features)
    # The product's own types decide: a weight cast to bfloat16 before use is served in bfloat16.
    rows = rows.astype(jnp.result_type(rows.dtype, equation.invars[side].aval.dtype))
    wide = jnp.promote_types(result_type, jnp.float32)
    if own.factor is not None and rows.dtype == jnp.float16:  # the weight alone may be beyond its range
        rows = rows.astype(jnp.float32)
    result = _matmul(rows, weight, len(batch_shape), result_type if own.factor is None else wide)
    result = result.reshape(*batch_shape, *token_shape, *outputs)
    # Now in the order batch, tokens, outputs; dot_general puts the first operand's axes before the second's.
    if own.factor is not None:
        factor = own.factor.transpose(*batch[side], *free, *contracted[side])
        ones = (1,) * len(token_shape)
        factor = factor.reshape(
            *factor.shape[: len(batch_shape)], *ones, *factor.shape[len(batch_shape) :][: len(free)]
        )
        result = (result * factor).astype(result_type)
    if side == 0:
        first, middle = len(batch_shape), len(batch_shape) + len(token_shape)
        result = result.transpose(*range(first), *range(middle, result.ndim), *range(first, middle))
    if own.addend is not None:
        arrays = [own.addend.astype(equation.invars[side].aval.dtype)] * 2
        arrays[other] = x
        result = result + _bind(equation, arrays)[0]
    return [result]


def _grouped(equation: jex.JaxprEqn, operands: list[Any]) -> list[jax.Array] | None:
    """A ragged_dot with a stack of packed matrices, one for each group of rows; None if it is another product."""
    x, own, counts = operands
    if not isinstance(own, _Packed) or not own.is_plain or own.is_rounded or isinstance(x, _Packed):
        return None
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, batch), groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    free = tuple(axis for axis in range(len(own.view.axes)) if axis not in (*contracted[1], *groups))
    is_grouped = (
        len(groups) == 1
        and not any(batch)
        and equation.params["group_offset"] is None
        and x.ndim == 1 + len(contracted[0])
        and views.layout(own.view, groups, tuple(contracted[1]), free).roles() == own.weight.layout.roles()
        and own.weight.codes.ndim == 3
    )
    result = equation.outvars[0].aval
    if not is_grouped or jnp.issubdtype(result.dtype, jnp.complexfloating):
        return None
    rows = x.transpose(*numbers.lhs_ragged_dimensions, *contracted[0]).reshape(-1, own.weight.in_features)
    rows = rows.astype(jnp.result_type(rows.dtype, equation.invars[1].aval.dtype))
    return [grouped_matmul(rows, own.weight, counts, preferred_element_type=result.dtype).reshape(result.shape)]


def _matmul(x: jax.Array, weight: QuantizedTensor | Prepacked, batch_axes: int, dtype: Any) -> jax.Array:
    """x (batch…, tokens…, in) @ weight, whose arrays have the axes of the layout's batch in front."""
    batch = math.prod(x.shape[:batch_axes])
    plain = dataclasses.replace(weight, layout=_dense(weight))
    if not weight.layout.batch_axes:
        return matmul(x, plain, preferred_element_type=dtype)
    n = len(weight.layout.batch_axes)
    plain = jax.tree.map(lambda array: array.reshape(batch, *array.shape[n:]), plain)
    product = jax.vmap(functools.partial(matmul, preferred_element_type=dtype))
    return product(x.reshape(batch, -1, x.shape[-1]), plain)


def _dense(weight: QuantizedTensor | Prepacked) -> Any:
    return type(weight.layout).dense(weight.in_features, weight.out_features)


def _rows(equation: jex.JaxprEqn, operands: list[Any]) -> list[jax.Array] | None:
    """A gather of whole output columns of a weight (an embedding's rows): only these are dequantized."""
    table, indices = operands
    numbers = equation.params["dimension_numbers"]
    if not isinstance(table, _Packed) or not table.is_plain or len(table.view.axes) != 2:
        return None
    layout, view = table.weight.layout, table.view
    if table.weight.codes.ndim != 2:
        return None
    rows, features = view.shape
    is_rows = (
        views.layout(view, (), (1,), (0,)).roles() == layout.roles()
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(equation.params["slice_sizes"]) == (1, features)
    )
    if not is_rows:
        return None
    # The same gather over the numbers of the rows says which are taken, and which are out of range.
    taken = indices[..., 0]
    values = unpack_columns(unprepack(table.weight), jnp.clip(taken, 0, rows - 1))
    for dtype in table.view.casts:
        values = values.astype(dtype)
    mode = str(equation.params["mode"])
    if "FILL" in mode.upper():
        fill = equation.params["fill_value"]
        outside = (taken < 0) | (taken >= rows)
        values = jnp.where(outside[..., None], jnp.asarray(jnp.nan if fill is None else fill, values.dtype), values)
    axis = numbers.offset_dims[0]
    return [jnp.moveaxis(values, -1, axis)]


def _call(equation: jex.JaxprEqn, called: jex.ClosedJaxpr, operands: list[Any]) -> list[Any]:
    """Runs a called jaxpr in place, its derivative the one its author asked for: recomputed, or by their own rule."""
    name, params = equation.primitive.name, equation.params
    if name.startswith("custom_"):
        return _call_custom(equation, called, operands)
    if "remat" not in name and name != "checkpoint":
        return _evaluate(called.jaxpr, called.consts, operands)

    floats = [not isinstance(value, _Packed) for value in operands]
    handed_on: dict[int, _Packed] = {}

    def body(*arrays):
        rest = iter(arrays)
        full = [next(rest) if is_float else value for is_float, value in zip(floats, operands, strict=True)]
        results = _evaluate(called.jaxpr, called.consts, full)
        handed_on.update((n, value) for n, value in enumerate(results) if any(value is own for own in operands))
        return [None if n in handed_on else _array(value) for n, value in enumerate(results)]

    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):  # one for each operand; those of the packed weights in `body` are unknown
        prevent_cse = any(itertools.compress(prevent_cse, floats))
    run = jax.checkpoint(body, prevent_cse=prevent_cse, policy=params["policy"])
    results = run(*itertools.compress(operands, floats))
    return [handed_on.get(number, value) for number, value in enumerate(results)]


def _call_custom(equation: jex.JaxprEqn, called: jex.ClosedJaxpr, operands: list[Any]) -> list[Any]:
    """A custom_jvp or custom_vjp call: its value from the packed weights, its rule on the dequantized ones."""
    operands = [value if isinstance(value, _Packed) and value.is_plain else _array(value) for value in operands]
    if not any(isinstance(value, _Packed) for value in operands):
        return _bind(equation, operands)

    def unpacked(arrays):
        pairs = zip(operands, arrays, strict=True)
        return [dataclasses.replace(v, weight=a) if isinstance(v, _Packed) else a for v, a in pairs]

    def served(*arrays):
        return _arrays(_evaluate(called.jaxpr, called.consts, unpacked(arrays)))

    def dense(*arrays):
        return _bind(equation, _arrays(unpacked(arrays)))

    if equation.primitive.name == "custom_jvp_call":
        call = jax.custom_jvp(served)
        call.defjvp(lambda primals, tangents: jax.jvp(dense, primals, tangents))
    else:
        call = jax.custom_vjp(served)
        call.defvjp(lambda *arrays: (served(*arrays), arrays), lambda arrays, g: jax.vjp(dense, *arrays)[1](g))
    return call(*(value.weight if isinstance(value, _Packed) else value for value in operands))


def _scan(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    """A scan stays a scan: packed constants go in by closure, packed stacks are taken apart step by step."""
    params = equation.params
    body = closed(params["jaxpr"])
    first, count = scan_counts(equation)
    consts, carry, xs = operands[:first], _arrays(operands[first : first + count]), operands[first + count :]
    stacks = [_stack(x) if isinstance(x, _Packed) else None for x in xs]
    arrays = [_array(x) if stack is None else stack.arrays for x, stack in zip(xs, stacks, strict=True)]

    handed_on: dict[int, Any] = {}  # a weight that each step gives out as it came in: the stack itself

    def step(carry, slices):
        elements = [x if stack is None else stack.element(x) for x, stack in zip(slices, stacks, strict=True)]
        results = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *elements])
        for number, value in enumerate(results[count:]):
            same = [x for x, element in zip(xs, elements, strict=True) if value is element]
            handed_on.update((number, x) for x in same if isinstance(value, _Packed))
        ys = [None if number in handed_on else _array(y) for number, y in enumerate(results[count:])]
        return _arrays(results[:count]), ys

    carry, ys = lax.scan(
        step, carry, arrays, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *(handed_on.get(number, y) for number, y in enumerate(ys))]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Packed weights one after another. arrays: with the stack's axis leading, and a factor where each has its own;
    one: an element with the first one's arrays, which stand for nothing, and the factor they share."""

    arrays: tuple[QuantizedTensor | Prepacked, Any]
    one: _Packed

    def element(self, arrays: tuple[QuantizedTensor | Prepacked, Any]) -> _Packed:
        weight, factor = arrays
        weight = dataclasses.replace(weight, layout=self.one.weight.layout)
        return dataclasses.replace(self.one, weight=weight, factor=self.one.factor if factor is None else factor)


def _stack(packed: _Packed) -> _Stack | None:
    """A packed weight as a stack along the leading axis of its view; None if that is no axis of its batch."""
    if packed.addend is not None or not packed.view.axes or packed.view.shape[0] == 1:
        return None
    layout = packed.weight.layout
    view = views.cut(packed.view, 0, 0, 1)
    if view is None:
        return None
    outermost = layout.axes.index(packed.view.axes[0][0].axis)
    if outermost not in layout.batch_axes:
        return None
    position, steps = layout.batch_axes.index(outermost), packed.view.shape[0]
    one = jax.eval_shape(lambda weight: _part(dataclasses.replace(packed, weight=weight), view).weight, packed.weight)
    whole = len(one.layout.batch_axes) < len(layout.batch_axes)  # an element takes no more than one of the batch

    def leading(array):
        apart = array.reshape(*array.shape[:position], steps, -1, *array.shape[position + 1 :])
        apart = apart.squeeze(position + 1) if whole else apart
        return jnp.moveaxis(apart, position, 0)

    index = tuple((0, size) for size in one.layout.shape)
    view = view._replace(index=index, axes=view.axes[1:])
    own, shared = None, None
    if packed.factor is not None:
        own, shared = (packed.factor, None) if packed.factor.shape[0] > 1 else (None, packed.factor[0])
    return _Stack((jax.tree.map(leading, packed.weight), own), _Packed(one, view, shared))


def _while(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    params = equation.params
    test, body = closed(params["cond_jaxpr"]), closed(params["body_jaxpr"])
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    return lax.while_loop(
        lambda carry: _arrays(_evaluate(test.jaxpr, test.consts, [*operands[:first], *carry]))[0],
        lambda carry: _arrays(_evaluate(body.jaxpr, body.consts, [*operands[first:second], *carry])),
        _arrays(operands[second:]),
    )


def _cond(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    index, *rest = operands
    if equation.params.get("branches_platforms"):  # one for each platform, not a choice made when it runs
        return _bind(equation, _arrays(operands))

    def run(branch: jex.ClosedJaxpr) -> list[Any]:
        return _arrays(_evaluate(branch.jaxpr, branch.consts, rest))

    return lax.switch(index, [functools.partial(run, closed(branch)) for branch in equation.params["branches"]])


CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


def _array(value: Any) -> Any:
    return value.array() if isinstance(value, _Packed) else value


def _arrays(values: Sequence) -> list[Any]:
    return [_array(value) for value in values]


def _bind(equation: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of one equation on arrays."""
    inputs = [jex.Var(atom.aval) for atom in equation.invars]
    outputs = [jex.Var(var.aval) for var in equation.outvars]
    alone = close(inputs, outputs, [equation.replace(invars=inputs, outvars=outputs)])
    return jex.jaxpr_as_fun(alone)(*operands)
