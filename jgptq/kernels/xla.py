"""The product in plain XLA, which runs on every platform: on codes, on one slab of the weight after another, or on all.

With W = scale (code - zero), the outputs are sums over groups of scale (Σ x code - zero Σ x): few rows are multiplied
by codes, and no program holds the weight in float. For more, a slab of it at a time is dequantized, once a call; for
many, the whole weight is.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import tensor

# Rows on which `from_codes` beats `dequantized`. 4096×4096, 4 bits, group 128, float32, 2 cores of a Xeon (AVX-512):
# 2.5 ms at 1 row and 10 ms at 4 against 37 and 47 ms; the float32 product takes 5 and 9 ms.
FEW_ROWS = 4
# Fewer codes than this are dequantized whatever the rows: they stay in a cache, and compiling the loop takes longer.
FEW_CODES = 2**17
# Rows on which `by_slabs` beats `dequantized`. 2048×2048, 4 bits, group 128, float32, the same Xeon: 3.3 ms against 10
# at 4 rows, 15 against 16 at 64, the same at 128, 89 against 76 at 512. With respect to x: 6.7 against 12, 14 against
# 16, 22 against 25, 70 against 84.
SLAB_ROWS = 128
SLABS = 16  # at least: what is in float at a time is a sixteenth of the weight
# Codes that one iteration of the loop on a CPU unrolls: its program is compiled in half a second.
UNROLLED = 32

Weight = tensor.QuantizedTensor | tensor.Element


@functools.partial(jax.checkpoint, static_argnums=2)  # the backward pass dequantizes again rather than hold the weight
def dequantized(x: Float[Array, "*batch in"], weight: Weight, result_dtype: Any) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation, on the dequantized weight."""
    weight = tensor.taken(weight)
    product = jnp.matmul(
        _in_stored_order(x, weight),
        tensor.stored_matrix(weight, x.dtype),
        precision=_precision(x),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return product.astype(result_dtype)


def by_slabs(x: Float[Array, "*batch in"], weight: Weight, result_dtype: Any) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation, in a loop over slabs of inputs, one of which is dequantized at a time.

    So is its derivative's transpose, which gives one slab of x's cotangent after another.
    """
    rows = _in_stored_order(x, weight).reshape(-1, weight.in_features)
    return _by_slab(rows, weight).astype(result_dtype).reshape(*x.shape[:-1], weight.out_features)


def _by_slab(rows: Float[Array, "rows in"], weight: Weight) -> Float[Array, "rows out"]:
    length = _slab_length(tensor.form(weight))
    count = weight.in_features // length
    whole = rows[:, : count * length].reshape(-1, count, length).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the slabs are kept, for the backward pass
    def add(sums: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        x, number = step
        return sums + dequantized(x, _slab(weight, number * length, length), sums.dtype), None

    product = jnp.zeros((rows.shape[0], weight.out_features), _wide(rows))
    product, _ = lax.scan(add, product, (whole, jnp.arange(count)))
    if count * length < weight.in_features:
        rest = _slab(weight, count * length, weight.in_features - count * length)
        product = product + dequantized(rows[:, count * length :], rest, product.dtype)
    return product


def _slab_length(weight: tensor.QuantizedTensor) -> int:
    """Inputs of a slab: whole words, and a part of a group or several groups; all, where there is no such number."""
    inputs = weight.in_features
    size = weight.group_size if weight.scales.shape[-2] > 1 else 0
    lengths = [n for n in range(32, inputs // 2 + 1, 32) if size == 0 or n % size == 0 or size % n == 0]
    return max((n for n in lengths if n * SLABS <= inputs), default=min(lengths, default=inputs))


def _slab(weight: Weight, start: Any, length: int) -> tensor.QuantizedTensor:
    """`length` inputs from `start` on, in stored order; without the permutation. A stack is read where it is."""
    form = tensor.form(weight)
    size = form.group_size if form.scales.shape[-2] > 1 else form.in_features
    groups = -(-length // size)

    def rows(array: Array, first: Any, count: int) -> Array:
        if not isinstance(weight, tensor.Element):
            return lax.dynamic_slice_in_dim(array, first, count)
        return lax.dynamic_slice(array, (weight.index, first, 0), (1, count, form.out_features))[0]

    return tensor.QuantizedTensor(
        codes=rows(form.codes, start * form.bits // 32, -(-length * form.bits // 32)),
        scales=rows(form.scales, start // size, groups),
        zeros=None if form.zeros is None else rows(form.zeros, start // size, groups),
        permutation=None,
        bits=form.bits,
        group_size=min(size, length),
        dtype=form.dtype,
        layout=tensor.Layout.dense(length, form.out_features),
    )


def from_codes(x: Float[Array, "*batch in"], weight: Weight, result_dtype: Any) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation, on codes; for at most FEW_ROWS rows.

    GPUs and TPUs take the words of all groups at once, which XLA fuses with their decoding; CPUs, for which it does
    not, run over the inputs. Weights whose groups are no whole words go slab by slab.
    """
    rows = _in_stored_order(x, weight).reshape(-1, weight.in_features)
    form = tensor.form(weight)
    product = lax.platform_dependent(
        rows.astype(_wide(x)),
        weight,
        cpu=_by_slab if _run_length(form) is None else _by_run,
        default=_by_slab if form.group_size % _period(form)[0] else _by_word,
    )
    return product.astype(result_dtype).reshape(*x.shape[:-1], weight.out_features)


def _by_word(x: Float[Array, "rows in"], weight: Weight) -> Float[Array, "rows out"]:
    """Each word's codes are decoded and multiplied where the word is read: no array of codes is ever formed.

    Of any other form of this sum, matrix products among them, XLA on GPUs writes codes to memory for some widths.
    """
    weight = tensor.taken(weight)
    groups, size, (period, span) = weight.scales.shape[0], weight.group_size, _period(weight)
    words = groups * size // period * span
    words = jnp.pad(weight.codes, ((0, words - weight.codes.shape[0]), (0, 0)))
    words = words.reshape(groups, -1, span, weight.out_features)
    x = jnp.pad(x, ((0, 0), (0, groups * size - weight.in_features))).reshape(-1, groups, size // period, period)
    parts = [words[:, :, number] for number in range(span)]
    codes = [_code(parts, k, weight.bits).astype(x.dtype) for k in range(period)]
    products = [sum(row[:, :, k, None] * code for k, code in enumerate(codes)) for row in x]
    sums = jnp.stack([jnp.sum(product, axis=1) for product in products], axis=1)
    return jnp.sum(_scaled(weight, sums, jnp.sum(x, axis=(2, 3)).T), axis=0)


def _period(weight: tensor.QuantizedTensor) -> tuple[int, int]:
    """The fewest codes that fill whole words, and the words."""
    shared = math.gcd(32, weight.bits)
    return 32 // shared, weight.bits // shared


def _by_run(x: Float[Array, "rows in"], weight: Weight) -> Float[Array, "rows out"]:
    """A loop over runs of inputs of one group. Each row has a sum of its own, so that a code is decoded but once."""
    stack, weight = weight, tensor.taken(weight)
    length = _run_length(weight)
    runs = weight.in_features // length
    x = x.reshape(-1, runs, length)
    # The codes of a stack are read where they are: those of one weight, taken out, would be a copy.
    codes, first = (stack.stack.codes, stack.index * runs) if isinstance(stack, tensor.Element) else (weight.codes, 0)
    words = codes.reshape(-1, length * weight.bits // 32, weight.out_features)
    totals = jnp.sum(x, axis=-1)

    def add(run: Array, sums: tuple) -> tuple:
        products = [jnp.zeros_like(total) for total in sums]
        for k in range(length):
            code = _code(words[first + run], k, weight.bits).astype(x.dtype)
            products = [product + x[row, run, k] * code for row, product in enumerate(products)]
        one = jax.tree.map(lambda values: lax.dynamic_slice_in_dim(values, run * length // weight.group_size, 1), group)
        scaled = [
            _scaled(one, product[None, None], totals[row, run][None, None]) for row, product in enumerate(products)
        ]
        return tuple(total + product[0, 0] for total, product in zip(sums, scaled, strict=True))

    group = tensor.QuantizedTensor(**{**vars(weight), "codes": None, "permutation": None})
    return jnp.stack(lax.fori_loop(0, runs, add, (jnp.zeros(weight.out_features, x.dtype),) * x.shape[0]))


def _run_length(weight: tensor.QuantizedTensor) -> int | None:
    """The most inputs, up to UNROLLED, that always lie in one group and fill whole words; None if these are few."""
    common = math.gcd(weight.group_size, weight.in_features)
    lengths = [n for n in range(8, UNROLLED + 1) if common % n == 0 and n * weight.bits % 32 == 0]
    return max(lengths, default=None)


def _code(words: Any, k: int, bits: int) -> Array:
    """Code k along the first axis of packed words, or of a list of them; see jgptq.packing."""
    word, shift = divmod(k * bits, 32)
    code = words[word] >> shift
    if shift + bits > 32:
        code |= words[word + 1] << (32 - shift)
    return code & (2**bits - 1)


def _scaled(weight: tensor.QuantizedTensor, sums: Array, totals: Array) -> Array:
    """scale (sum - zero total): sums (groups, rows, out) of inputs times codes, totals (groups, rows) of inputs."""
    midpoint = 2.0 ** (weight.bits - 1)
    zeros = midpoint if weight.zeros is None else weight.zeros.astype(sums.dtype)[:, None, :]
    return (sums - totals[:, :, None] * zeros) * weight.scales.astype(sums.dtype)[:, None, :]


def _in_stored_order(x: Array, weight: Weight) -> Array:
    order = weight.permutation
    if order is None:
        return x
    # The barrier keeps XLA from multiplying by a transposed gather, which on CPUs fails for bfloat16 ("Unsupported
    # element type for DotThunk::Execute", jaxlib 0.10.2).
    return lax.optimization_barrier(jnp.take(x, order, axis=-1))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _precision(x: Array) -> lax.Precision | None:
    """A float32 product is exact to float32; narrower ones have nothing to gain from more passes."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
