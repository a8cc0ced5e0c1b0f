"""Products of a weight with an activation: how each reads its operands, and what it adds to a Hessian.

A product maps the activation to rows (tokens, in), or to a batch of such matrices with a Hessian for each (experts,
groups of channels). Products are values: two that read the same activation in the same way are equal.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jgptq.hessian import HIGHEST, Hessian, add_below, init_hessian
from jgptq.panels import add_product
from jgptq.tensor import Layout
from jgptq.tracing import views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dot:
    """dot_general: the activation's axes in their roles. `batch` lists them in the order of the weight's."""

    batch: tuple[int, ...]
    tokens: tuple[int, ...]
    contracted: tuple[int, ...]

    def over_steps(self) -> "Dot":
        """The same product where the activations of all steps of a scan are stacked along a new leading axis."""
        batch, tokens, contracted = (
            tuple(axis + 1 for axis in axes) for axes in (self.batch, self.tokens, self.contracted)
        )
        return Dot(batch=batch, tokens=(0, *tokens), contracted=contracted)

    def add(self, hessian: Hessian, x: jax.Array, weights: jax.Array | None = None) -> Hessian:
        """weights: of the tokens, (tokens,); None: all 1. A token counts as one whatever its weight."""
        rows = self.rows(x)
        return _add(hessian, rows if weights is None else rows.astype(jnp.float32) * jnp.sqrt(weights)[:, None])

    def rows(self, x: jax.Array) -> jax.Array:
        """x as (tokens, in), or a batch of such matrices."""
        batch, rows, columns = (
            math.prod(x.shape[axis] for axis in axes) for axes in (self.batch, self.tokens, self.contracted)
        )
        matrix = x.transpose(*self.batch, *self.tokens, *self.contracted)
        return _floating(matrix.reshape((batch, rows, columns) if self.batch else (rows, columns)))

    def add_cross(
        self, total: jax.Array, x: jax.Array, other: jax.Array, weights: jax.Array | None = None
    ) -> jax.Array:
        return _add_cross(total, self.rows(x), self.rows(other), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """conv_general_dilated as a product with patches of its input (im2col); a batch of `groups` feature groups."""

    lhs_spec: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int

    def over_steps(self) -> None:
        """A scan of convolutions is not taken apart."""

    def add(self, hessian: Hessian, x: jax.Array) -> Hessian:
        return _add(hessian, self.rows(x))

    def add_cross(self, total: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
        return _add_cross(total, self.rows(x), self.rows(other))

    def rows(self, x: jax.Array) -> jax.Array:
        """The patches of x as (tokens, in), or a matrix of them for each group of channels."""
        x = _floating(x).transpose(self.lhs_spec)
        patches = lax.conv_general_dilated_patches(
            x,
            self.window,
            self.strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            precision=HIGHEST,
        )  # (examples, channels * window, positions…), channels outermost
        grouped = patches.reshape(x.shape[0], self.groups, patches.shape[1] // self.groups, -1)
        rows = grouped.transpose(1, 0, 3, 2).reshape(self.groups, -1, grouped.shape[2])
        return rows if self.groups > 1 else rows[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """ragged_dot: x (rows, in) sorted by group, and the number of rows of each."""

    rows: int
    contracted: tuple[int, ...]

    def over_steps(self) -> None:
        """A scan of ragged products is not taken apart."""

    def add(self, hessian: Hessian, x: jax.Array, group_sizes: jax.Array) -> Hessian:
        x = self._rows(x)

        def gram(total, rows):
            return add_below(Hessian(total, jnp.int32(0)), rows[0]).total

        return Hessian(self._fold(gram, hessian.total, group_sizes, x), hessian.tokens + group_sizes.astype(jnp.int32))

    def add_cross(
        self, total: jax.Array, x: jax.Array, group_sizes: jax.Array, other: jax.Array, _: jax.Array
    ) -> jax.Array:
        x, other = self._rows(x), self._rows(other)
        return self._fold(lambda total, rows: _add_cross(total, *rows), total, group_sizes, x, other)

    def _rows(self, x: jax.Array) -> jax.Array:
        return _floating(x).transpose(self.rows, *self.contracted).reshape(x.shape[self.rows], -1)

    def _fold(self, add: Callable, totals: jax.Array, group_sizes: jax.Array, *rows: jax.Array) -> jax.Array:
        """Each group's total after adding its rows, some at a time; what else is in the last of them is zero."""
        count = rows[0].shape[0]
        if not count:
            return totals
        chunk = min(count, 512)
        padded = [jnp.pad(x, ((0, chunk), (0, 0))) for x in rows]
        sizes = group_sizes.astype(jnp.int32)
        ends = jnp.cumsum(sizes)

        def group(operands):
            total, start, end = operands

            def add_chunk(state):
                total, start = state
                inside = (start + jnp.arange(chunk) < end)[:, None]
                parts = [jnp.where(inside, lax.dynamic_slice_in_dim(x, start, chunk), 0) for x in padded]
                return add(total, parts), start + chunk

            return lax.while_loop(lambda state: state[1] < end, add_chunk, (total, start))[0]

        return lax.map(group, (totals, ends - sizes, ends))


Product = Dot | Convolution | Ragged


def empty_hessian(layout: Layout) -> Hessian:
    """A Hessian for each matrix of a layout's batch."""
    hessian = init_hessian(layout.in_features)
    if not layout.batch_axes:
        return hessian
    batch = math.prod(layout.sizes(layout.batch_axes))
    return jax.tree.map(lambda array: jnp.zeros((batch, *array.shape), array.dtype), hessian)


def read_product(equation: Any, side: int, view: views.View) -> tuple[Layout, Product, tuple] | str:
    """The weight's layout, the product, and the atoms it reads besides the weight; or why it cannot be quantized."""
    name = equation.primitive.name
    activation = equation.invars[1 - side] if side < 2 else None
    if activation is None:
        return f"the sizes of a {name}"
    if jnp.issubdtype(activation.aval.dtype, jnp.complexfloating):
        return "a complex product"
    reader = {"dot_general": _dot, "conv_general_dilated": _convolution, "ragged_dot_general": _ragged}[name]
    found = reader(equation, side, view)
    if isinstance(found, str):
        return found
    layout, product = found
    if not layout.in_axes:
        return "an outer product"
    return layout, product, (activation, *equation.invars[2:])


def _dot(equation, side: int, view: views.View) -> tuple[Layout, Dot] | str:
    contracted, batch = equation.params["dimension_numbers"]
    other = 1 - side
    free = tuple(axis for axis in range(len(view.axes)) if axis not in (*contracted[side], *batch[side]))
    ndim = len(equation.invars[other].aval.shape)
    tokens = tuple(axis for axis in range(ndim) if axis not in (*contracted[other], *batch[other]))
    layout = views.layout(view, tuple(batch[side]), tuple(contracted[side]), free)
    # A batch of one is none.
    axes = tuple(axis for axis in batch[other] if equation.invars[other].aval.shape[axis] > 1)
    ones = tuple(axis for axis in batch[other] if axis not in axes)
    return layout, Dot(batch=axes, tokens=ones + tokens, contracted=tuple(contracted[other]))


def _convolution(equation, side: int, view: views.View) -> tuple[Layout, Convolution] | str:
    params = equation.params
    if side != 1:
        return "the input of a convolution"
    if params["batch_group_count"] != 1:
        return "a convolution with batch groups"
    lhs_spec, (out, inner, *spatial), _ = params["dimension_numbers"]
    groups = params["feature_group_count"]
    shape = view.shape
    view = views.split(view, out, groups)
    if view is None:
        return "a convolution whose groups are no part of the weight"
    # The split put a new axis in front of `out`.
    inner, *spatial = (axis + (axis > out) for axis in (inner, *spatial))
    layout = views.layout(view, (out,), (inner, *spatial), (out + 1,))
    product = Convolution(
        lhs_spec=tuple(lhs_spec),
        window=tuple(shape[axis] for axis in params["dimension_numbers"][1][2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
        groups=groups,
    )
    return layout, product


def _ragged(equation, side: int, view: views.View) -> tuple[Layout, Ragged] | str:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, batch), ragged, group = (
        numbers.dot_dimension_numbers,
        numbers.lhs_ragged_dimensions,
        numbers.rhs_group_dimensions,
    )
    ndim = len(equation.invars[0].aval.shape)
    if side != 1:
        return "the rows of a ragged product"
    if len(group) != 1 or any(batch) or equation.params["group_offset"] is not None:
        return "a ragged product of an unusual form"
    if ndim != 1 + len(contracted[0]):
        return "a ragged product of rows with more than one axis"
    free = tuple(axis for axis in range(len(view.axes)) if axis not in (*contracted[1], *group))
    layout = views.layout(view, tuple(group), tuple(contracted[1]), free)
    if not layout.batch_axes:
        return "a ragged product of one group"
    return layout, Ragged(rows=int(ragged[0]), contracted=tuple(contracted[0]))


def _add(hessian: Hessian, rows: jax.Array) -> Hessian:
    """Adds rows (tokens, in), or a batch of them, in which rows of zeros (places that no token took) do not count.

    Of sums only the lower triangles, as `add_below` does.
    """
    if not rows.shape[-2]:
        return hessian
    if rows.ndim == 2:
        return add_below(hessian, rows)
    total = jax.vmap(add_below)(hessian, rows).total
    live = jnp.sum(jnp.any(rows != 0, axis=-1), axis=-1, dtype=jnp.int32)
    return Hessian(total, hessian.tokens + live)


def _add_cross(total: jax.Array, x: jax.Array, other: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Adds Σ x (other - x)ᵀ over tokens, of (tokens, in) or of each matrix of a batch; tokens by their weights."""
    drift = other.astype(jnp.float32) - x.astype(jnp.float32)
    drift = drift if weights is None else drift * weights[:, None]
    add = add_product if x.ndim == 2 else jax.vmap(add_product)
    return add(total, x, drift)


def _floating(x: jax.Array) -> jax.Array:
    """Whole numbers become float32."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
