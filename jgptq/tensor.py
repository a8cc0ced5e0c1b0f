"""QuantizedTensor: a weight as packed codes, scales and zeros, in place of an array in a parameter pytree."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jgptq import grid as grids
from jgptq import packing
from jgptq.partition import Partition, auto


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

    @property
    def axes(self) -> tuple[int, ...]:
        """For each factor the leaf's axis that it is a part of."""
        result, axis, left = [], 0, self.shape[0] if self.shape else 1
        for factor in self.factors:
            result.append(axis)
            left //= factor
            if left == 1 and axis + 1 < len(self.shape):
                axis += 1
                left = self.shape[axis]
        return tuple(result)

    def roles(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(axis, size) of the factors in each role, outermost first; factors of size 1 say nothing and are left out."""
        axes = self.axes
        return tuple(
            tuple((axes[k], self.factors[k]) for k in role if self.factors[k] > 1)
            for role in (self.batch_axes, self.in_axes, self.out_axes)
        )

    def stacked(self, sizes: tuple[int, ...]) -> "Layout":
        """The layout of a stack of leaves of this one, with the stack's axes as batch axes."""
        n = len(sizes)
        batch, inputs, outputs = (
            tuple(axis + n for axis in axes) for axes in (self.batch_axes, self.in_axes, self.out_axes)
        )
        return Layout(
            shape=sizes + self.shape,
            factors=sizes + self.factors,
            batch_axes=tuple(range(n)) + batch,
            in_axes=inputs,
            out_axes=outputs,
        )

    def unstacked(self) -> "Layout":
        """The inverse of `stacked`, as far as it goes: without the batch axes that lead the leaf's own."""
        layout = self
        while layout.batch_axes[:1] == (0,) and layout.factors[0] == layout.shape[0]:
            layout = Layout(
                shape=layout.shape[1:],
                factors=layout.factors[1:],
                batch_axes=tuple(axis - 1 for axis in layout.batch_axes[1:]),
                in_axes=tuple(axis - 1 for axis in layout.in_axes),
                out_axes=tuple(axis - 1 for axis in layout.out_axes),
            )
        return layout

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
    zeros: (batch…, groups, out) uint8; None: the symmetric grid's constant 2**(bits - 1). Where a file has groups that
        begin anywhere they are float32 (see `has_integer_zeros`).
    permutation: (batch…, in) int32; stored row k is input permutation[k]. None: natural order.
    input_scales: (batch…, in) float32, in natural order: what each input is divided by before the product, which is
        to say each row of the matrix. None: nothing. See `jgptq.solvers.awq`.
    group_size: stored rows that share a scale; the last group may be short.
    dtype: of the logical array; layout: how that array maps to (batch…, in, out).
    partition: how the arrays are divided over a mesh, where `jgptq.shard` did that; None: not, or as XLA sees fit.

    Leading axes common to all arrays and beyond `layout` are a stack: `scan` and `vmap` may add and remove them.
    """

    codes: Any
    scales: Any
    zeros: Any
    permutation: Any
    input_scales: Any = None
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    partition: Partition | None = dataclasses.field(metadata={"static": True}, default=None)

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

    def specs(self) -> "QuantizedTensor":
        """A PartitionSpec in the place of each array, by the partition."""
        several = self.group_size < self.in_features
        by_group = -1 if self.partition.of == "outputs" else -2 if several else None
        return with_specs(self, codes=-1 if self.partition.of == "outputs" else -2, by_group=by_group)

    def __repr__(self) -> str:
        parts = [f"{self.bits} bits", f"group {self.group_size}", "symmetric" if self.symmetric else "asymmetric"]
        if self.permutation is not None:
            parts.append("permuted")
        if self.input_scales is not None:
            parts.append("inputs scaled")
        if self.partition is not None:
            parts.append(f"{self.partition.of} over {self.partition.axis}")
        shape = self.shape if hasattr(self.codes, "shape") else self.layout.shape
        return f"QuantizedTensor({jnp.dtype(self.dtype).name}{list(shape)}, {', '.join(parts)})"


def static_to_bytes(static: tuple) -> bytes:
    """The static fields (bits, group_size, dtype, layout, partition) as JSON, for exported programs."""
    bits, group_size, dtype, layout, partition = static
    divided = partition and [list(partition.mesh.shape.items()), partition.axis, partition.of]
    return json.dumps([bits, group_size, jnp.dtype(dtype).name, dataclasses.asdict(layout), divided]).encode()


def static_from_bytes(data: bytes) -> tuple:
    """The inverse of `static_to_bytes`."""
    bits, group_size, dtype, layout, divided = json.loads(data)
    layout = Layout(**{name: tuple(value) for name, value in layout.items()})
    partition = None
    if divided:
        names, sizes = zip(*divided[0], strict=True)
        mesh = jax.sharding.AbstractMesh(sizes, names)
        partition = Partition(mesh=auto(mesh), axis=divided[1], of=divided[2])
    return bits, group_size, jnp.dtype(dtype), layout, partition


jax.export.register_pytree_node_serialization(
    QuantizedTensor,
    serialized_name="jgptq.QuantizedTensor",
    serialize_auxdata=static_to_bytes,
    deserialize_auxdata=static_from_bytes,
)


def with_specs(weight: Any, *, codes: int, by_group: int | None) -> Any:
    """codes, by_group: the axis along which codes, and values of groups, are divided, from the end; None: none."""
    spec = weight.partition.spec
    return dataclasses.replace(
        weight,
        codes=spec(weight.codes, codes),
        scales=spec(weight.scales, by_group),
        zeros=spec(weight.zeros, by_group),
        permutation=spec(weight.permutation, None),
        input_scales=spec(weight.input_scales, None),
    )


def divisible(weight: QuantizedTensor, of: str, count: int) -> bool:
    """Whether inputs, in whole words and whole groups and in natural order, or outputs can be divided by `count`."""
    if of == "outputs":
        return weight.out_features % count == 0
    length = weight.in_features // count
    whole = length * count == weight.in_features and length * weight.bits % 32 == 0
    one_group = weight.group_size >= weight.in_features
    return whole and weight.permutation is None and (one_group or length % weight.group_size == 0)


def own_part(weight: Any) -> Any:
    """A divided weight whose arrays are those of one device, as a weight by itself."""
    inputs, outputs, partition = weight.in_features, weight.out_features, weight.partition
    inputs, outputs = (
        (inputs // partition.size, outputs) if partition.of == "inputs" else (inputs, outputs // partition.size)
    )
    return dataclasses.replace(
        weight,
        group_size=min(weight.group_size, inputs),
        layout=Layout.dense(inputs, outputs),
        partition=None,
    )


def by_part(f: Any, weight: Any) -> Any:
    """Another form of a divided weight: f of each device's own part."""
    partition, specs = weight.partition, weight.specs()
    statics = {name: getattr(weight, name) for name in ("group_size", "layout", "partition")}

    def shape(array: Any, spec: Any) -> jax.ShapeDtypeStruct:
        sizes = [size // partition.size if name else size for size, name in zip(array.shape, spec, strict=False)]
        return jax.ShapeDtypeStruct((*sizes, *array.shape[len(sizes) :]), array.dtype)

    def each(part: Any) -> Any:
        return f(own_part(part))

    result = jax.eval_shape(each, jax.tree.map(shape, weight, specs))
    own = {name: getattr(result, name) for name in statics}
    out_specs = dataclasses.replace(dataclasses.replace(result, **statics).specs(), **own)
    run = jax.shard_map(each, mesh=partition.mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)
    return dataclasses.replace(jax.jit(run)(weight), **statics)


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


def has_integer_zeros(weight: QuantizedTensor) -> bool:
    """Whether zeros are codes, as most file formats need them."""
    return weight.zeros is None or jnp.issubdtype(weight.zeros.dtype, jnp.integer)


def stored_matrix(weight: QuantizedTensor, dtype: Any = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (in, out) matrix of scaled inputs in stored row order; arithmetic in float32, result in `dtype`."""
    codes = packing.unpack(weight.codes, weight.bits, weight.in_features).astype(jnp.float32)
    zeros = jnp.float32(2 ** (weight.bits - 1)) if weight.zeros is None else _by_row(weight, weight.zeros)
    return grids.decode(codes, _by_row(weight, weight.scales), zeros).astype(dtype)


def matrix(weight: QuantizedTensor, dtype: Any = jnp.float32) -> Float[Array, "*batch in out"]:
    """The (in, out) matrix with inputs in natural order, for inputs that are not scaled."""
    rows = stored_matrix(weight, dtype if weight.input_scales is None else jnp.float32)
    if weight.permutation is not None:
        inverse = jnp.argsort(weight.permutation, axis=-1)
        rows = jnp.take_along_axis(rows, inverse[..., None], axis=-2)
    return rows if weight.input_scales is None else (rows / weight.input_scales[..., None]).astype(dtype)


def dequantize(weight: QuantizedTensor) -> Array:
    """The logical array a QuantizedTensor stands for, in its own shape and dtype."""
    return weight.dequantize()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Element:
    """One packed weight of a stack, which stays where it is: what a scan over layers multiplies by.

    stack: a QuantizedTensor, or another packed form, with one axis in front of its layout's own; index: int32 ().
    A product by few rows reads its codes in the stack; a slice of them, as scan takes it, would be a copy.
    """

    stack: Any
    index: Any

    @property
    def in_features(self) -> int:
        return self.stack.in_features

    @property
    def out_features(self) -> int:
        return self.stack.out_features

    @property
    def permutation(self) -> Array | None:
        return self._of(self.stack.permutation)

    @property
    def input_scales(self) -> Array | None:
        return self._of(self.stack.input_scales)

    def taken(self) -> Any:
        """The weight by itself."""
        return self._of(self.stack)

    def _of(self, arrays: Any) -> Any:
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, self.index, keepdims=False), arrays)


def taken(weight: Any) -> Any:
    """A packed weight by itself, where it may be an `Element`."""
    return weight.taken() if isinstance(weight, Element) else weight


def without_input_scales(weight: Any) -> Any:
    """A packed weight for inputs that are divided by its scales already."""
    if isinstance(weight, Element):
        return Element(stack=without_input_scales(weight.stack), index=weight.index)
    return dataclasses.replace(weight, input_scales=None)


def form(weight: Any) -> Any:
    """What says how a packed weight is stored: its stack, where it is an `Element`."""
    return weight.stack if isinstance(weight, Element) else weight


def side_by_side(weights: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Matrices that multiply the same inputs as one, outputs one after another; None where their forms differ.

    Bits, group size, dtypes, symmetry, the order of inputs and their scales must be the same, and for the last two that
    takes a look at values. `take_outputs` cuts them apart again, bit for bit.
    """
    first = weights[0]

    def description(weight: QuantizedTensor) -> tuple:
        arrays = (weight.codes, weight.scales, weight.zeros, weight.permutation, weight.input_scales)
        kinds = tuple(None if array is None else (array.dtype, array.shape[:-1]) for array in arrays)
        return weight.bits, weight.group_size, weight.dtype, weight.in_features, kinds

    dense = all(weight.layout == Layout.dense(weight.in_features, weight.out_features) for weight in weights)
    if any(weight.partition is not None for weight in weights):
        return None  # each device would hold part of one of them
    if not dense or len({description(weight) for weight in weights}) > 1:
        return None
    for name in ("permutation", "input_scales"):
        values = [getattr(weight, name) for weight in weights]
        if values[0] is not None and not all(np.array_equal(values[0], other) for other in values):
            return None
    arrays = {
        name: None if getattr(first, name) is None else jnp.concatenate([getattr(w, name) for w in weights], axis=-1)
        for name in ("codes", "scales", "zeros")
    }
    layout = Layout.dense(first.in_features, sum(weight.out_features for weight in weights))
    return dataclasses.replace(first, layout=layout, **arrays)


def take_outputs(weight: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Outputs start .. stop - 1 of a matrix, or of each of a stack, still packed."""
    arrays = {
        name: None if getattr(weight, name) is None else getattr(weight, name)[..., start:stop]
        for name in ("codes", "scales", "zeros")
    }
    return dataclasses.replace(weight, layout=Layout.dense(weight.in_features, stop - start), partition=None, **arrays)


# A part of an array: start and stop along each axis.
Index = tuple[tuple[int, int], ...]


def with_stack_in_layout(weight: Any) -> Any:
    """The same weight with the axes in front of its layout's own as batch axes of the layout."""
    stack = weight.shape[: weight.ndim - len(weight.layout.shape)]
    return dataclasses.replace(weight, layout=weight.layout.stacked(stack))


def cut(weight: QuantizedTensor, axis: int, start: int, stop: int) -> QuantizedTensor | None:
    """weight[..., start:stop, ...] along a logical axis, still packed; None where the axis is one of the inputs.

    The stack must be in the layout. A batch axis cut down to one keeps no place in the arrays.
    """
    layout = weight.layout
    factor = layout.axes.index(axis)
    step = layout.shape[axis] // layout.factors[factor]  # elements of the axis in one of its outermost factor
    if start % step or stop % step:
        return None
    start, stop = start // step, stop // step
    shape = tuple(step * (stop - start) if a == axis else n for a, n in enumerate(layout.shape))
    factors = tuple(stop - start if k == factor else n for k, n in enumerate(layout.factors))
    resized = dataclasses.replace(layout, shape=shape, factors=factors)
    weight = dataclasses.replace(weight, partition=None)
    if factor in layout.batch_axes:
        position = layout.batch_axes.index(factor)
        take = (slice(None),) * position + ((start,) if stop - start == 1 else (slice(start, stop),))
        if stop - start == 1:
            batch = layout.batch_axes[:position] + layout.batch_axes[position + 1 :]
            resized = dataclasses.replace(resized, batch_axes=batch, out_axes=(*layout.out_axes, factor))
        return dataclasses.replace(jax.tree.map(lambda array: array[take], weight), layout=resized)
    if factor not in layout.out_axes:
        return None
    position = layout.out_axes.index(factor)
    sizes = layout.sizes(layout.out_axes)

    def columns(array):
        apart = array.reshape(*array.shape[:-1], *sizes)
        chosen = jax.lax.slice_in_dim(apart, start, stop, axis=array.ndim - 1 + position)
        return chosen.reshape(*array.shape[:-1], resized.out_features)

    return dataclasses.replace(
        weight,
        codes=columns(weight.codes),
        scales=columns(weight.scales),
        zeros=None if weight.zeros is None else columns(weight.zeros),
        layout=resized,
    )


def join_layouts(shape: tuple[int, ...], parts: dict[Index, Layout]) -> Layout | None:
    """The layout of a leaf of `shape` that is solved in `parts`; None if these are no grid of parts of one kind.

    Along an axis, parts are the whole, or single elements (or equal pieces of the inputs), which makes it a batch
    axis, or ranges of outputs or of a batch, which lie side by side.
    """
    ranges = [sorted({index[axis] for index in parts}) for axis in range(len(shape))]
    for axis, cuts in enumerate(ranges):
        if cuts[0][0] != 0 or cuts[-1][1] != shape[axis] or any(a[1] != b[0] for a, b in itertools.pairwise(cuts)):
            return None
    if math.prod(map(len, ranges)) != len(parts):
        return None
    # The part with the most elements says in which order the outputs lie: axes of one element come last in a part.
    largest = max(parts.values(), key=lambda layout: math.prod(layout.shape))
    joined = _join(shape, ranges, largest)
    if joined is None:
        return None
    for part in parts.values():
        other = _join(shape, ranges, part)
        ones = {k for k, axis in enumerate(joined.axes) if part.shape[axis] == 1}
        order = [tuple(k for k in x.out_axes if k not in ones) if x else None for x in (joined, other)]
        if order[0] != order[1] or dataclasses.replace(other, out_axes=joined.out_axes) != joined:
            return None
    return joined


def _join(shape: tuple[int, ...], ranges: list, part: Layout) -> Layout | None:
    factors: list[int] = []
    number: dict[int, int] = {}  # factor of the part -> factor of the leaf
    batch = []
    axes = part.axes
    for axis, size in enumerate(shape):
        own = [k for k in range(len(part.factors)) if axes[k] == axis]
        cuts = ranges[axis]
        piece = part.shape[axis]
        if len(cuts) > 1:
            equal = all(stop - start == piece for start, stop in cuts)
            if equal and (piece == 1 or all(k in part.in_axes for k in own)):
                batch.append(len(factors))
                factors.append(size // piece)
                if piece == 1:
                    continue
            elif len(own) == 1 and own[0] in (*part.out_axes, *part.batch_axes):
                number[own[0]] = len(factors)
                factors.append(size)
                continue
            else:
                return None
        for k in own:
            number[k] = len(factors)
            factors.append(part.factors[k])
    roles = [tuple(number[k] for k in role if k in number) for role in (part.batch_axes, part.in_axes, part.out_axes)]
    # Axes of one element come last among the outputs, in their own order, whatever part they are seen from.
    order = sorted(k for k in roles[2] if factors[k] == 1)
    outputs = tuple(k for k in roles[2] if factors[k] > 1) + tuple(order)
    return Layout(
        shape=shape, factors=tuple(factors), batch_axes=(*batch, *roles[0]), in_axes=roles[1], out_axes=outputs
    )


# What `join` cannot join, and the way out.
DIFFERENT = {
    "permutation": ("permuted", 'act_order="group" or "static"'),
    "input_scales": ("scaled", "AWQ(input_scales=False)"),
}


def join(layout: Layout, parts: dict[Index, QuantizedTensor]) -> QuantizedTensor:
    """A leaf of `layout` (see `join_layouts`) from its separately packed parts, assembled on the host."""
    first = next(iter(parts.values()))
    kinds = {
        (part.bits, part.group_size, part.dtype, part.zeros is None, part.permutation is None)
        for part in parts.values()
    }
    if len(kinds) > 1:
        raise ValueError(
            "parts of one weight have different bits, group sizes, dtypes or symmetry; quantize them alike"
        )
    batch, outputs = layout.sizes(layout.batch_axes), layout.sizes(layout.out_axes)
    columns = np.arange(math.prod(outputs)).reshape(outputs)
    axes = layout.axes

    def ranges(index: Index, factors: tuple[int, ...]) -> tuple[slice, ...]:
        result = []
        for k in factors:
            outermost = axes.index(axes[k]) == k
            step = layout.shape[axes[k]] // layout.factors[k] if outermost else 1
            start, stop = index[axes[k]] if outermost else (0, layout.factors[k])
            result.append(slice(start // step, stop // step))
        return tuple(result)

    def assemble(name: str) -> np.ndarray | None:
        arrays = {index: getattr(part, name) for index, part in parts.items()}
        if all(array is None for array in arrays.values()):
            return None
        if name == "input_scales":
            ones = np.ones((*first.codes.shape[:-2], layout.in_features), np.float32)
            arrays = {index: ones if array is None else array for index, array in arrays.items()}
        array = arrays[next(iter(parts))]
        tail = array.shape[len(first.layout.batch_axes) :]
        by_column = name not in ("permutation", "input_scales")
        whole = np.full((*batch, *tail[:-1], columns.size) if by_column else (*batch, *tail), -1).astype(array.dtype)
        for index, part in parts.items():
            target = whole[ranges(index, layout.batch_axes)]
            values = np.asarray(arrays[index])
            values = values.reshape(*target.shape[: len(batch)], *values.shape[len(part.layout.batch_axes) :])
            if by_column:
                target[..., columns[ranges(index, layout.out_axes)].ravel()] = values
                continue
            if np.any((target != -1) & (target != values)):
                done, instead = DIFFERENT[name]
                raise ValueError(
                    f"parts of one weight that lie side by side were {done} differently, as they saw different "
                    f"inputs; use {instead}"
                )
            target[...] = values
        return whole

    arrays = {name: assemble(name) for name in ("codes", "scales", "zeros", "permutation", "input_scales")}
    # The layout's own leading batch axes are the stack that scan and vmap take apart.
    return dataclasses.replace(first, layout=layout.unstacked(), **jax.tree.map(jnp.asarray, arrays))


def unpack_columns(weight: QuantizedTensor, columns: Integer[Array, "*n"]) -> Float[Array, "*n in"]:
    """Some columns of an unbatched matrix, dequantized, in the weight's dtype; inputs in natural order."""
    chosen = dataclasses.replace(
        weight,
        codes=weight.codes[:, columns.reshape(-1)],
        scales=weight.scales[:, columns.reshape(-1)],
        zeros=None if weight.zeros is None else weight.zeros[:, columns.reshape(-1)],
        layout=Layout.dense(weight.in_features, columns.size),
        partition=None,
    )
    return matrix(chosen).T.reshape(*columns.shape, weight.in_features).astype(weight.dtype)


def _by_row(weight: QuantizedTensor, values: Array) -> Array:
    """Repeats (…, groups, out) values for every row of their group, as a broadcast, which XLA can fuse."""
    *batch, groups, out = values.shape
    rows = jnp.broadcast_to(
        values.astype(jnp.float32)[..., :, None, :], (*batch, groups, weight.group_size, out)
    ).reshape(*batch, groups * weight.group_size, out)
    return rows[..., : weight.in_features, :]
