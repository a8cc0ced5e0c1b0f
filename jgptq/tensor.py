"""QuantizedTensor: a weight as packed codes, scales and zeros, in place of an array in a parameter pytree."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jgptq import grid as grids
from jgptq import packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a leaf maps to a (batch…, in, out) matrix: reshape to `factors`, move axes to batch, in, out order, merge.

    `factors` is the leaf's shape with any axis split that plays two roles; mostly it is the shape itself. A dense
    (in, out) kernel has in_axes=(0,), out_axes=(1,); an attention output projection (heads, head_dim, embed) has
    in_axes=(0, 1), out_axes=(2,); a transposed (out, in) leaf has in_axes=(1,), out_axes=(0,).
    """

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = (0,)
    out_axes: tuple[int, ...] = (1,)

    @classmethod
    def dense(cls, in_features: int, out_features: int) -> "Layout":
        return cls(shape=(in_features, out_features), factors=(in_features, out_features))

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch_axes + self.in_axes + self.out_axes

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.factors[a] for a in axes)

    @property
    def in_features(self) -> int:
        return math.prod(self.sizes(self.in_axes))

    @property
    def out_features(self) -> int:
        return math.prod(self.sizes(self.out_axes))

    def to_matrix(self, leaf: Array) -> Array:
        """The leaf (stack…, *shape) as (stack…, batch…, in, out)."""
        stack = leaf.shape[: leaf.ndim - len(self.shape)]
        moved = leaf.reshape(*stack, *self.factors).transpose(
            *range(len(stack)), *(len(stack) + axis for axis in self.order)
        )
        return moved.reshape(*stack, *self.sizes(self.batch_axes), self.in_features, self.out_features)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`."""
        stack = matrix.shape[: matrix.ndim - 2 - len(self.batch_axes)]
        moved = matrix.reshape(*stack, *self.sizes(self.order))
        inverse = [int(axis) for axis in np.argsort(self.order)]
        moved = moved.transpose(*range(len(stack)), *(len(stack) + axis for axis in inverse))
        return moved.reshape(*stack, *self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A packed weight: a pytree that stands where the array stood.

    codes: uint32 words (batch…, words, out), `bits` a code along the input axis (see jgptq.packing).
    scales: (batch…, groups, out) float16 unless the grid asked otherwise.
    zeros: (batch…, groups, out) uint8; None: the symmetric grid's constant 2**(bits - 1).
    permutation: (batch…, in) int32; stored row k is input permutation[k]. None: natural order.
    group_size: stored rows that share a scale; the last group may be short.
    dtype: of the logical array; layout: how that array maps to (batch…, in, out).

    Leading axes common to all arrays and beyond `layout` are a stack: `scan` and `vmap` may add and remove them.
    """

    codes: Any
    scales: Any
    zeros: Any
    permutation: Any
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def in_features(self) -> int:
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        return self.layout.out_features

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logical array."""
        return self.codes.shape[: self.codes.ndim - 2 - len(self.layout.batch_axes)] + self.layout.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def dequantize(self) -> Array:
        """The logical array again, in its own shape and dtype."""
        return self.layout.from_matrix(matrix(self)).astype(self.dtype)

    def __repr__(self) -> str:
        parts = [f"{self.bits} bits", f"group {self.group_size}", "symmetric" if self.symmetric else "asymmetric"]
        if self.permutation is not None:
            parts.append("permuted")
        shape = self.shape if hasattr(self.codes, "shape") else self.layout.shape
        return f"QuantizedTensor({jnp.dtype(self.dtype).name}{list(shape)}, {', '.join(parts)})"


def from_codes(
    codes: Integer[Array, "*batch in out"],
    scales: Float[Array, "*batch groups out"],
    zeros: Array | None,
    *,
    grid: grids.Grid,
    permutation: Integer[Array, "*batch in"] | None = None,
    layout: Layout | None = None,
    dtype: Any = jnp.float32,
) -> QuantizedTensor:
    """Packs codes (rows in stored order) into a QuantizedTensor; `zeros` are dropped where the grid is symmetric."""
    *_, in_features, out_features = codes.shape
    return QuantizedTensor(
        codes=packing.pack(codes, grid.bits),
        scales=scales.astype(grid.scale_dtype),
        zeros=None if grid.symmetric else zeros.astype(jnp.uint8),
        permutation=permutation,
        bits=grid.bits,
        group_size=grid.group_length(in_features),
        dtype=jnp.dtype(dtype),
        layout=layout or Layout.dense(in_features, out_features),
    )


def unpack_codes(weight: QuantizedTensor) -> Integer[Array, "*batch in out"]:
    """Codes in stored row order, uint8."""
    return packing.unpack(weight.codes, weight.bits, weight.in_features).astype(jnp.uint8)


def stored_matrix(weight: QuantizedTensor, dtype: Any = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (in, out) matrix in stored row order; arithmetic in float32, result in `dtype`."""
    codes = packing.unpack(weight.codes, weight.bits, weight.in_features).astype(jnp.float32)
    zeros = jnp.float32(2 ** (weight.bits - 1)) if weight.zeros is None else _by_row(weight, weight.zeros)
    return grids.decode(codes, _by_row(weight, weight.scales), zeros).astype(dtype)


def matrix(weight: QuantizedTensor, dtype: Any = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (in, out) matrix with inputs in natural order."""
    stored = stored_matrix(weight, dtype)
    if weight.permutation is None:
        return stored
    inverse = jnp.argsort(weight.permutation, axis=-1)
    return jnp.take_along_axis(stored, inverse[..., None], axis=-2)


def dequantize(weight: QuantizedTensor) -> Array:
    """The logical array a QuantizedTensor stands for, in its own shape and dtype."""
    return weight.dequantize()


def _by_row(weight: QuantizedTensor, values: Array) -> Array:
    """Repeats (…, groups, out) values for every row of their group, as a broadcast, which XLA can fuse."""
    *batch, groups, out = values.shape
    rows = jnp.broadcast_to(
        values.astype(jnp.float32)[..., :, None, :], (*batch, groups, weight.group_size, out)
    ).reshape(*batch, groups * weight.group_size, out)
    return rows[..., : weight.in_features, :]
