"""Views of a leaf: which part of a parameter each axis of a derived value stands for."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jgptq.tensor import Index, Layout


class Factor(NamedTuple):
    """Part of a leaf's axis: `size` steps of `inner` elements along it. A whole axis has inner 1."""

    axis: int
    size: int
    inner: int


class View(NamedTuple):
    """A value that holds each element of part of a leaf once.

    index: the part, start and stop along each axis of the leaf. axes: for each axis of the value the factors of the
    part merged into it, outermost first; axes of size 1 have none. casts: the dtypes it went through.
    """

    index: Index
    axes: tuple[tuple[Factor, ...], ...]
    casts: tuple[Any, ...] = ()

    @property
    def part_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(factor.size for factor in axis) for axis in self.axes)

    def of(self, part: jax.Array) -> jax.Array:
        """The value, from the part of the leaf that `index` names."""
        merged = [factor for axis in self.axes for factor in axis]
        digits = sorted(merged, key=lambda factor: (factor.axis, -factor.inner))
        x = part.reshape([factor.size for factor in digits])
        x = x.transpose([digits.index(factor) for factor in merged]).reshape(self.shape)
        for dtype in self.casts:
            x = x.astype(dtype)
        return x


def whole(shape: tuple[int, ...]) -> View:
    """The view that is the leaf itself."""
    axes = tuple((Factor(axis, size, 1),) if size > 1 else () for axis, size in enumerate(shape))
    return View(tuple((0, size) for size in shape), axes)


SAME = ("copy", "copy_p", "name", "sharding_constraint", "reshard", "stop_gradient")


def follow(view: View, equation) -> View | None:
    """The view that a one-operand equation makes of its operand; None if it is no view (it computes or repeats)."""
    name, params = equation.primitive.name, equation.params
    axes = None
    if name == "transpose":
        axes = tuple(view.axes[axis] for axis in params["permutation"])
    elif name == "reshape":
        axes = view.axes if params.get("dimensions") is None else [view.axes[axis] for axis in params["dimensions"]]
        axes = _reshape(axes, params["new_sizes"])
    elif name == "squeeze":
        axes = tuple(axis for position, axis in enumerate(view.axes) if position not in params["dimensions"])
    elif name == "broadcast_in_dim":
        axes = _broadcast(view.axes, equation.invars[0].aval.shape, params["shape"], params["broadcast_dimensions"])
    elif name == "slice" and all(step == 1 for step in params["strides"] or ()):
        for axis, (start, stop) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
            if view is not None:
                view = cut(view, axis, start, stop)
        return view
    elif name == "convert_element_type":
        dtypes = (equation.invars[0].aval.dtype, params["new_dtype"])
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
        return view._replace(casts=(*view.casts, dtypes[1])) if floats else None
    elif name in SAME:
        return view
    return None if axes is None else view._replace(axes=axes)


def cut(view: View, axis: int, start: int, stop: int) -> View | None:
    """The view of value[..., start:stop, ...] along an axis of the value; None if that is no range along a leaf's."""
    size = view.shape[axis]
    if (start, stop) == (0, size):
        return view
    if not start < stop <= size:
        return None
    (outer, *rest) = view.axes[axis]
    step = math.prod(factor.size for factor in rest)
    if start % step or stop % step:
        return None
    start, stop = start // step, stop // step
    if outer.size * outer.inner != view.part_shape[outer.axis]:  # not the outermost factor of its axis
        return None
    first = view.index[outer.axis][0]
    ranges = list(view.index)
    ranges[outer.axis] = (first + start * outer.inner, first + stop * outer.inner)
    kept = (Factor(outer.axis, stop - start, outer.inner),) if stop - start > 1 else ()
    axes = list(view.axes)
    axes[axis] = kept + tuple(rest)
    return view._replace(index=tuple(ranges), axes=tuple(axes))


def split(view: View, axis: int, count: int) -> View | None:
    """The view with one of its axes split into (count, rest)."""
    shape = view.shape
    axes = _reshape(view.axes, (*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :]))
    return None if axes is None else view._replace(axes=axes)


def layout(view: View, batch: tuple[int, ...], contracted: tuple[int, ...], free: tuple[int, ...]) -> Layout:
    """The layout of the part of a leaf whose view has its axes in these roles in a product."""
    roles = [_merged([f for axis in axes for f in view.axes[axis]]) for axes in (batch, contracted, free)]
    used = {factor for role in roles for factor in role}
    # Size-1 axes belong to no role; with the outputs they change nothing.
    roles[2] += [Factor(axis, 1, 1) for axis, size in enumerate(view.part_shape) if size == 1]
    factors = sorted(used.union(roles[2]), key=lambda factor: (factor.axis, -factor.inner))
    batch_axes, in_axes, out_axes = (tuple(factors.index(factor) for factor in role) for role in roles)
    return Layout(
        shape=view.part_shape,
        factors=tuple(factor.size for factor in factors),
        batch_axes=batch_axes,
        in_axes=in_axes,
        out_axes=out_axes,
    )


def _merged(factors: list[Factor]) -> list[Factor]:
    """Neighbours that make up a longer run of one axis as that run: a role does not tell them apart."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if last and last.axis == factor.axis and last.inner == factor.inner * factor.size:
            merged[-1] = Factor(factor.axis, last.size * factor.size, factor.inner)
        else:
            merged.append(factor)
    return merged


def _reshape(axes: tuple, sizes: tuple[int, ...]) -> tuple | None:
    """Regroups factors into axes of the new sizes, splitting a factor where an axis ends inside it."""
    left = [factor for axis in axes for factor in axis]
    result = []
    for size in sizes:
        axis: list[Factor] = []
        while (missing := size // math.prod(f.size for f in axis)) > 1:
            factor = left.pop(0)
            if factor.size > missing:
                if factor.size % missing:
                    return None
                inner = factor.size // missing
                left.insert(0, Factor(factor.axis, inner, factor.inner))
                factor = Factor(factor.axis, missing, factor.inner * inner)
            elif missing % factor.size:
                return None
            axis.append(factor)
        result.append(tuple(axis))
    return tuple(result)


def _broadcast(axes: tuple, shape: tuple, new_shape: tuple, dimensions: tuple) -> tuple | None:
    """New axes of size 1 are views; anything repeated is not."""
    if math.prod(shape) != math.prod(new_shape):
        return None
    result: list[tuple[Factor, ...]] = [() for _ in new_shape]
    for axis, position in zip(axes, dimensions, strict=True):
        result[position] = axis
    return tuple(result)
