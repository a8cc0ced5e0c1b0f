"""The product on a TPU: a Pallas kernel that decodes codes in vector registers, next to the matrix unit.

A word holds codes along the inputs. Masked to one code in each half and put below the exponent of 128, a word is a pair
of bfloat16 numbers, 128 + code; so decoding takes three integer operations for two codes, and no conversion. Inputs are
brought into the same order beforehand, as they are few. A group's sum is corrected by (128 + zero) times the sum of its
inputs and scaled in float32:

    Σ x scale (code - zero) = scale (Σ x (128 + code) - (128 + zero) Σ x).

An 8-bit code is two of 4 bits, the second times 16, and a float32 input the sum of three in bfloat16; every product is
thus exact, and only the sums are rounded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jgptq import tensor

WORDS = 16  # of an output that are multiplied at once
LANES = 128  # the nibbles in them
OFFSET = 128  # what a decoded nibble exceeds its value by
# Words and outputs of a grid step: 1 MB of codes on its way while another is multiplied, of 16 MB of vector memory.
STEP_WORDS = 512
STEP_OUTPUTS = 512
STEP_ROWS = 128


def matmul(
    x: Float[Array, "*batch in"], weight: tensor.QuantizedTensor, result_dtype: Any
) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation."""
    rows = x.reshape(-1, weight.in_features)
    if weight.permutation is not None:
        rows = jnp.take(rows, weight.permutation, axis=-1)
    parts = [rows] if x.dtype == jnp.bfloat16 else _thirds(rows)
    products = _product(jnp.concatenate(parts), weight)
    product = jnp.sum(products.reshape(len(parts), *rows.shape[:1], -1), axis=0)
    return product.astype(result_dtype).reshape(*x.shape[:-1], weight.out_features)


def _thirds(x: Float[Array, "rows in"]) -> list[Array]:
    """Three bfloat16 arrays whose sum is x, as far as float32 tells."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _product(x: Array, weight: tensor.QuantizedTensor) -> Float[Array, "rows out"]:
    rows, outputs, groups = x.shape[0], weight.out_features, weight.scales.shape[0]
    inputs = WORDS * 32 // weight.bits  # of a chunk
    chunks = -(-weight.in_features // inputs)
    size = weight.group_size if groups > 1 else chunks * inputs
    step_chunks = min(STEP_WORDS // WORDS, chunks)
    steps = -(-chunks // step_chunks)
    tile = min(STEP_ROWS, -(-rows // 16) * 16)
    columns = min(STEP_OUTPUTS, outputs)

    x = jnp.pad(x, ((0, -rows % tile), (0, steps * step_chunks * inputs - weight.in_features)))
    values = [weight.scales, weight.zeros] if weight.zeros is not None else [weight.scales]
    if weight.scales.dtype == jnp.float16:  # which TPUs do not have
        values[0] = lax.bitcast_convert_type(weight.scales, jnp.int16)
    kernel = functools.partial(
        _kernel, bits=weight.bits, size=size, inputs=inputs, scale_dtype=weight.scales.dtype, symmetric=weight.symmetric
    )
    table = pltpu.VMEM((-(-steps * step_chunks * inputs // size), columns), jnp.float32)
    product = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32),
        grid=(x.shape[0] // tile, -(-outputs // columns), steps),
        in_specs=[
            pl.BlockSpec((step_chunks, tile, LANES), lambda row, column, step: (step, row, 0)),
            pl.BlockSpec((step_chunks * WORDS, columns), lambda row, column, step: (step, column)),
            *[pl.BlockSpec((groups, columns), lambda row, column, step: (0, column))] * len(values),
        ],
        out_specs=pl.BlockSpec((tile, columns), lambda row, column, step: (row, column)),
        scratch_shapes=[table] * len(values),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="jgptq_matmul",
    )(_in_decoded_order(x, weight.bits), weight.codes, *values)
    return product[:rows]


def _in_decoded_order(x: Array, bits: int) -> Array:
    """(rows, in) as (chunks, rows, LANES): the inputs of a chunk's nibbles, as the kernel decodes them.

    Nibble j + 4 h of word r comes to row 32 j + 2 r + h.
    """
    if bits == 8:
        x = jnp.stack([x, 16 * x], axis=-1)
    nibbles = x.reshape(x.shape[0], -1, WORDS, 2, 4)
    return nibbles.transpose(1, 0, 4, 2, 3).reshape(-1, x.shape[0], LANES)


def _kernel(x, codes, *references, bits, size, inputs, scale_dtype, symmetric):
    values, (result, *tables) = references[: 2 - symmetric], references[2 - symmetric :]
    step, chunks = pl.program_id(2), x.shape[0]
    parts = max(inputs // size, 1)
    words = WORDS // parts  # of a group in a chunk
    unit = 1 if bits == 4 else 1 + 16  # by which the sum of inputs, as they stand here, exceeds their own

    @pl.when(step == 0)
    def _():
        result[...] = jnp.zeros_like(result)
        for table, value, dtype in zip(tables, values, (scale_dtype, jnp.uint8), strict=False):
            table[...] = jnp.zeros_like(table)
            table[: value.shape[0]] = _as_float32(value[...], dtype)

    def multiply(chunk, _):
        pairs = codes[pl.ds(pl.multiple_of(chunk * WORDS, WORDS), WORDS)]
        decoded = jnp.concatenate([_decode(pairs >> 4 * j) for j in range(4)])
        own = x[chunk]
        word = lax.broadcasted_iota(jnp.int32, own.shape, 1) % 32 // 2
        split = [jnp.where(word // words == part, own, jnp.zeros_like(own)) for part in range(parts)]
        inputs_of = jnp.concatenate(split) if parts > 1 else own
        sums = jnp.dot(inputs_of, decoded, preferred_element_type=jnp.float32)
        totals = jnp.sum(inputs_of.astype(jnp.float32), axis=1, keepdims=True)
        first = (step * chunks + chunk) * inputs // size
        for part in range(parts):
            rows, group = slice(part * own.shape[0], (part + 1) * own.shape[0]), pl.ds(first + part, 1)
            zero = 2.0 ** (bits - 1) if symmetric else tables[1][group]
            result[...] += (sums[rows] - totals[rows] * (OFFSET + zero / unit)) * tables[0][group]
        return ()

    lax.fori_loop(0, chunks, multiply, ())


def _decode(words: Array) -> Array:
    """The lowest nibble of each half of words, plus OFFSET, one under the other, in bfloat16."""
    return pltpu.bitcast((words & 0x000F000F) | 0x43004300, jnp.bfloat16)


def _as_float32(values: Array, dtype: Any) -> Array:
    """Scales or zeros; float16 comes as its bits."""
    if jnp.dtype(dtype) != jnp.float16:
        return (values.astype(jnp.int32) if dtype == jnp.uint8 else values).astype(jnp.float32)
    bits = values.astype(jnp.int32)
    fraction, exponent = bits & 0x3FF, bits >> 10 & 0x1F
    normal = lax.bitcast_convert_type((exponent + 127 - 15) << 23 | fraction << 13, jnp.float32)
    small = fraction.astype(jnp.float32) * 2.0**-24
    size = jnp.where(exponent == 0, small, normal)
    return jnp.where(bits < 0, -size, size)
