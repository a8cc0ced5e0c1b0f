"""The order of codes that a Hopper GPU multiplies from, and the way back.

A wgmma instruction may take its left operand from registers, in a fixed distribution over the threads of a warp. Here
codes lie so that what a thread loads at once is its part of that operand: nothing is exchanged between threads, and
decoding is a shift, a mask and a subtraction for two codes together. Derived from the register fragments of
`wgmma.m64nNk16`, PTX ISA, "Asynchronous warpgroup level matrix instructions".
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jgptq import packing, tensor
from jgptq.partition import Partition

BLOCK = 128  # inputs that one step of the kernel takes
TILE = 128  # outputs are filled up to a multiple of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepacked:
    """A packed weight in the order of the Hopper kernel: a pytree that stands where the QuantizedTensor stood.

    codes: uint32 (batch…, blocks * outputs, 4 * stored_bits), outputs filled up to a multiple of TILE. Row
        `block * outputs + n` has BLOCK codes of output n, so that what one step reads lies in one piece.
    scales: (batch…, rows, outputs) in the dtype they had; zeros: (batch…, rows, outputs) uint8, or None: the symmetric
        grid's constant 2**(bits - 1). Both are 0 where they fill up.
    permutation, input_scales, bits, group_size, dtype, layout, partition: as in QuantizedTensor. Of a divided weight
        each device has its own part in this order; all properties but the logical ones are those of a part.

    A group takes `slots` places among the inputs; where its size is none of 32, 64 or a multiple of 128, some of them
    are empty. `spread` brings the inputs of a product into the same places.
    """

    codes: Any
    scales: Any
    zeros: Any
    permutation: Any
    input_scales: Any = None
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    layout: tensor.Layout = dataclasses.field(metadata={"static": True})
    partition: Partition | None = dataclasses.field(metadata={"static": True}, default=None)

    in_features = tensor.QuantizedTensor.in_features
    out_features = tensor.QuantizedTensor.out_features
    symmetric = tensor.QuantizedTensor.symmetric
    shape = tensor.QuantizedTensor.shape
    ndim = tensor.QuantizedTensor.ndim
    nbytes = tensor.QuantizedTensor.nbytes

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes here: 4 or 8."""
        return max(self.bits, 4)

    @property
    def slots(self) -> int:
        """Places that a group takes."""
        small = [size for size in (32, 64) if self.group_size <= size]
        return small[0] if small else -(-self.group_size // BLOCK) * BLOCK

    @property
    def groups(self) -> int:
        """Groups that hold codes."""
        return -(-self.in_features // self.group_size)

    @property
    def blocks(self) -> int:
        """Steps of BLOCK places; a multiple of 4 where there are many, so that 4 programs may share them."""
        blocks = -(-self.groups * self.slots // BLOCK)
        return blocks if blocks < 16 else -(-blocks // 4) * 4

    @property
    def rows(self) -> int:
        """Rows of scales: those of the groups, and more for blocks that fill up."""
        return -(-self.blocks * BLOCK // self.slots)

    @property
    def outputs(self) -> int:
        return -(-self.out_features // TILE) * TILE

    def dequantize(self) -> Array:
        """The logical array again, in its own shape and dtype."""
        return restore(self).dequantize()

    def specs(self) -> "Prepacked":
        """A PartitionSpec in the place of each array, by the partition."""
        return tensor.with_specs(self, codes=-2, by_group=-1 if self.partition.of == "outputs" else -2)

    def __repr__(self) -> str:
        return f"Prepacked{jax.eval_shape(restore, self)!r}".replace("QuantizedTensor", "")


# The static fields are those of QuantizedTensor.
jax.export.register_pytree_node_serialization(
    Prepacked,
    serialized_name="jgptq.Prepacked",
    serialize_auxdata=tensor.static_to_bytes,
    deserialize_auxdata=tensor.static_from_bytes,
)


def prepack(params: Any) -> Any:
    """A pytree with each QuantizedTensor in the order of the Hopper kernel, others than that kernel serves left alone.

    To be done once, at load; `jgptq.matmul` and the models take both orders. 2- and 3-bit codes take 4 bits each.
    """

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, tensor.QuantizedTensor) and tensor.has_integer_zeros(leaf)):
            return leaf
        is_stack = leaf.ndim > len(leaf.layout.shape)
        # One weight after another: unpacked, a stack of layers would be several times the model.
        run = functools.partial(jax.lax.map, prepack_weight) if is_stack else prepack_weight
        return run(leaf) if leaf.partition is None else tensor.by_part(run, leaf)

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, tensor.QuantizedTensor))


def unprepack(params: Any) -> Any:
    """The exact inverse of `prepack`."""

    def is_prepacked(leaf: Any) -> bool:
        return isinstance(leaf, Prepacked)

    return jax.tree.map(lambda leaf: restore(leaf) if is_prepacked(leaf) else leaf, params, is_leaf=is_prepacked)


def prepack_weight(weight: tensor.QuantizedTensor) -> Prepacked:
    """One weight, its batch and stack axes included."""
    if not tensor.has_integer_zeros(weight):
        raise ValueError(
            f"the zeros of this weight are {weight.zeros.dtype}, but those of a Prepacked weight are uint8; leave it "
            "in the order it has, in which jgptq.matmul takes it too"
        )
    if weight.partition is not None:
        return tensor.by_part(prepack_weight, weight)
    fields = vars(weight)
    form = Prepacked(**{**fields, "codes": None})
    codes = spread(jnp.moveaxis(tensor.unpack_codes(weight), -2, -1), form)
    codes = _fill(jnp.moveaxis(codes, -1, -2), form.blocks * BLOCK, form.outputs)
    values = {
        name: None if fields[name] is None else _fill(fields[name], form.rows, form.outputs)
        for name in ("scales", "zeros")
    }
    return dataclasses.replace(form, codes=_to_words(codes, form.stored_bits), **values)


def restore(weight: Prepacked) -> tensor.QuantizedTensor:
    """The same weight in the checkpoint's order, bit for bit."""
    if weight.partition is not None:
        return tensor.by_part(restore, weight)
    codes = _from_words(weight.codes, weight.blocks, weight.stored_bits)[..., : weight.groups * weight.slots, :]
    *batch, _, outputs = codes.shape
    codes = codes.reshape(*batch, weight.groups, weight.slots, outputs)[..., : weight.group_size, :]
    codes = codes.reshape(*batch, weight.groups * weight.group_size, outputs)
    fields = vars(weight) | {
        "codes": packing.pack(codes[..., : weight.in_features, : weight.out_features], weight.bits),
        "scales": weight.scales[..., : weight.groups, : weight.out_features],
        "zeros": None if weight.zeros is None else weight.zeros[..., : weight.groups, : weight.out_features],
    }
    return tensor.QuantizedTensor(**fields)


def spread(x: Array, weight: Prepacked) -> Array:
    """x (…, in), in stored order, with each input in its place: (…, blocks * BLOCK), 0 where the weight fills up."""
    lead, groups, size = x.shape[:-1], weight.groups, weight.group_size
    if size != weight.slots:
        x = _fill(x, groups * size).reshape(*lead, groups, size)
        x = _fill(x, weight.slots).reshape(*lead, groups * weight.slots)
    return _fill(x, weight.blocks * BLOCK)


def _fill(array: Array, *sizes: int) -> Array:
    """Zeros at the end of the last axes, up to `sizes`."""
    kept = array.ndim - len(sizes)
    ends = [(0, size - own) for size, own in zip(sizes, array.shape[kept:], strict=True)]
    return jnp.pad(array, [(0, 0)] * kept + ends)


# Input k = 8 p + 2 c + h of a block (p < 16, c < 4, h < 2) belongs to thread c of the four that share a row, in
# half h of its p-th register. Of the thread's words, number w holds pairs p = w * pairs + q, a pair's halves 16 bits
# apart. Words go to threads four at a time: word w of thread c is number 16 (w // 4) + 4 c + w % 4 of the row.


def _to_words(codes: Array, bits: int) -> UInt32[Array, "*batch rows words"]:
    """(…, blocks * BLOCK, outputs) codes of at most `bits` bits as (…, blocks * outputs, 4 * bits) words."""
    *batch, length, outputs = codes.shape
    blocks, pairs, n = length // BLOCK, 16 // bits, len(batch)
    parts = codes.astype(jnp.uint32).reshape(*batch, blocks, bits // 4, 4, pairs, 4, 2, outputs)
    # Axes: block, w // 4, w % 4, c, output.
    words = jnp.sum(parts << _shifts(bits, parts.ndim), axis=(n + 3, n + 5), dtype=jnp.uint32)
    words = words.transpose(*range(n), n, n + 4, n + 1, n + 3, n + 2)
    return words.reshape(*batch, blocks * outputs, 4 * bits)


def _from_words(words: Array, blocks: int, bits: int) -> Array:
    """The inverse of `_to_words`, uint8."""
    *batch, rows, _ = words.shape
    outputs, n = rows // blocks, len(batch)
    parts = words.reshape(*batch, blocks, outputs, bits // 4, 4, 4)
    parts = parts.transpose(*range(n), n, n + 2, n + 4, n + 3, n + 1)[..., :, None, :, None, :]
    codes = (parts >> _shifts(bits, parts.ndim)) & (2**bits - 1)
    return codes.astype(jnp.uint8).reshape(*batch, blocks * BLOCK, outputs)


def _shifts(bits: int, ndim: int) -> np.ndarray:
    """Where in its word a code lies, along the axes pair, thread, half, output, the last of `ndim`."""
    pair, half = np.arange(16 // bits), np.arange(2)
    shifts = (bits * pair[:, None] + 16 * half).astype(np.uint32)
    return shifts.reshape((1,) * (ndim - 4) + (16 // bits, 1, 2, 1))
