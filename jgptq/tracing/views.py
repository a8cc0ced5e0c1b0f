"""Views of a leaf: which part of a parameter each axis of a derived value stands for."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from jgptq.tensor import Layout


class Factor(NamedTuple):
    """Part of a leaf's axis: `size` steps of `inner` elements along it. A whole axis has inner 1."""

    axis: int
    size: int
    inner: int


# A view: for each axis of the value the factors merged into it, outermost first; size-1 axes have none.
View = tuple[tuple[Factor, ...], ...]


def whole(shape: tuple[int, ...]) -> View:
    """The view that is the leaf itself."""
    return tuple((Factor(axis, size, 1),) if size > 1 else () for axis, size in enumerate(shape))


def follow(view: View, equation) -> View | None:
    """The view that a one-operand equation makes of its operand; None if it is no view (it computes or selects)."""
    name, params = equation.primitive.name, equation.params
    if name == "transpose":
        return tuple(view[axis] for axis in params["permutation"])
    if name == "reshape" and params.get("dimensions") is None:
        return _reshape(view, params["new_sizes"])
    if name == "squeeze":
        return tuple(axis for position, axis in enumerate(view) if position not in params["dimensions"])
    if name == "broadcast_in_dim":
        return _broadcast(view, equation.invars[0].aval.shape, params["shape"], params["broadcast_dimensions"])
    if name == "convert_element_type":
        dtypes = (equation.invars[0].aval.dtype, params["new_dtype"])
        return view if all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes) else None
    return view if name in ("copy", "copy_p", "name", "sharding_constraint") else None


def layout(shape: tuple[int, ...], view: View, batch: tuple, contracted: tuple, free: tuple) -> Layout:
    """The layout of a leaf of `shape` whose view has its axes in these roles in a product."""
    roles = [[factor for axis in axes for factor in view[axis]] for axes in (batch, contracted, free)]
    used = {factor for role in roles for factor in role}
    # Size-1 axes belong to no role; with the outputs they change nothing.
    roles[2] += [Factor(axis, 1, 1) for axis, size in enumerate(shape) if size == 1]
    factors = sorted(used.union(roles[2]), key=lambda factor: (factor.axis, -factor.inner))
    batch_axes, in_axes, out_axes = (tuple(factors.index(factor) for factor in role) for role in roles)
    return Layout(
        shape=shape,
        factors=tuple(factor.size for factor in factors),
        batch_axes=batch_axes,
        in_axes=in_axes,
        out_axes=out_axes,
    )


def _reshape(view: View, sizes: tuple[int, ...]) -> View | None:
    """Regroups factors into axes of the new sizes, splitting a factor where an axis ends inside it."""
    left = [factor for axis in view for factor in axis]
    axes = []
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
        axes.append(tuple(axis))
    return tuple(axes)


def _broadcast(view: View, shape: tuple, new_shape: tuple, dimensions: tuple) -> View | None:
    """New axes of size 1 are views; anything repeated is not."""
    if math.prod(shape) != math.prod(new_shape):
        return None
    axes: list[tuple[Factor, ...]] = [() for _ in new_shape]
    for axis, position in zip(view, dimensions, strict=True):
        axes[position] = axis
    return tuple(axes)
