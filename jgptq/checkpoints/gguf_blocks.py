"""GGUF's blocks of 32 inputs that a QuantizedTensor holds as they are: Q4_0, Q4_1 and Q8_0.

An output feature is a row, cut into blocks of 32 consecutive inputs (d and m float16, u a code):

    Q4_0   18 bytes   d, 16 bytes of codes        d (u - 8)
    Q4_1   20 bytes   d, m, 16 bytes of codes     d u + m
    Q8_0   34 bytes   d, 32 signed codes          d q

Byte j of a 4-bit block has code j in its low half and code j + 16 in its high half. [ggml's ggml-common.h]
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import tensor
from jgptq.checkpoints.layout import SCALED_INPUTS
from jgptq.tensor import Layout, QuantizedTensor

LENGTH = 32
BLOCK = 1 << 20  # codes that are translated at once
KINDS = ("Q4_0", "Q4_1", "Q8_0")
HALF = np.dtype("<f2")
# One program for each shape.
unpack_codes = jax.jit(tensor.unpack_codes)


def kind_of(weight: QuantizedTensor) -> str:
    """The type that holds a weight's codes."""
    if weight.bits == 8:
        return "Q8_0"
    return "Q4_0" if weight.symmetric else "Q4_1"


def refusal(weight: QuantizedTensor) -> str | None:
    """Why one (in, out) matrix cannot be held, and the way out; None where it can."""
    if weight.bits == 8 and not weight.symmetric:
        return "is asymmetric with 8 bits, for which GGUF has no type; use a symmetric grid"
    if weight.input_scales is not None:
        return f"cannot be held: {SCALED_INPUTS}"
    if weight.in_features % LENGTH:
        return f"has {weight.in_features} inputs, not a multiple of {LENGTH}; leave it in float"
    if block_groups(weight) is None:
        if weight.permutation is not None:
            return 'has groups whose inputs are scattered (act_order=True); use act_order="group" or "static"'
        return f"has groups of {weight.group_size} inputs; use a group size that is a multiple of {LENGTH}"
    scales = np.asarray(weight.scales, np.float32)
    if np.any(scales.astype(HALF) != scales):
        return 'has scales that float16 does not hold exactly; quantize it with Grid(scale_dtype="float16")'
    if kind_of(weight) == "Q4_1" and not np.all(np.isfinite(_minimum(weight))):
        return "has scale times zero beyond the range of float16; use a symmetric grid"
    return None


def block_groups(weight: QuantizedTensor) -> np.ndarray | None:
    """The group of each block of inputs; None where a block has inputs of several groups."""
    stored = np.arange(weight.in_features) // weight.group_size
    groups = stored
    if weight.permutation is not None:
        groups = np.empty_like(stored)
        groups[np.asarray(weight.permutation)] = stored
    blocks = groups.reshape(-1, LENGTH)
    return blocks[:, 0] if np.all(blocks == blocks[:, :1]) else None


def rounding(weight: QuantizedTensor) -> float:
    """The largest change of a weight of one matrix by rounding Q4_1's minimum to float16, in steps of its grid."""
    if kind_of(weight) != "Q4_1":
        return 0.0
    scales, exact = np.asarray(weight.scales, np.float64), _exact_minimum(weight)
    change = np.abs(_minimum(weight).astype(np.float64) - exact)
    # Zeros that are quotients of float16 minima give those back, but for float32's own rounding.
    told = (scales != 0) & (change > np.abs(exact) * 2.0**-22)
    return float(np.max(np.divide(change, np.abs(scales), out=np.zeros_like(change), where=told)))


def _exact_minimum(weight: QuantizedTensor) -> np.ndarray:
    return -np.asarray(weight.scales, np.float64) * np.asarray(weight.zeros, np.float64)


def _minimum(weight: QuantizedTensor) -> np.ndarray:
    # Integer zeros are exact in float64; the quotients that stand for another file's minima are so to float32.
    with np.errstate(over="ignore"):
        return _exact_minimum(weight).astype(np.float32).astype(HALF)


def encode(weight: QuantizedTensor, order: np.ndarray | None) -> np.ndarray:
    """One matrix, of which `refusal` has nothing to say, as (out, bytes of a row) uint8; row i is output order[i]."""
    codes = np.asarray(unpack_codes(weight))
    if weight.permutation is not None:
        codes = codes[np.argsort(np.asarray(weight.permutation))]
    groups = block_groups(weight)
    outputs = slice(None) if order is None else order

    def by_block(values: np.ndarray | jax.Array) -> np.ndarray:
        return np.asarray(values).astype(HALF)[groups].T[outputs]

    blocks = codes.T[outputs].reshape(weight.out_features, -1, LENGTH)
    kind, heads = kind_of(weight), [by_block(weight.scales)]
    if kind == "Q8_0":
        body = blocks ^ np.uint8(0x80)
    else:
        if kind == "Q4_0":
            blocks = blocks + np.uint8(8 - 2 ** (weight.bits - 1))
        else:
            heads.append(by_block(_minimum(weight)))
        body = blocks[..., :16] | blocks[..., 16:] << 4
    head = np.stack(heads, axis=-1).view(np.uint8)
    return np.concatenate([head, body], axis=-1).reshape(weight.out_features, -1)


def decode(raw: np.ndarray, kind: str, order: np.ndarray | None, dtype: Any) -> QuantizedTensor:
    """(stack…, out, bytes of a row) uint8 of a type in KINDS as a QuantizedTensor, row i being output order[i].

    Equal neighbours are joined to the largest groups that are of one size throughout, the last perhaps short. A Q4_1
    has integer zeros where they reproduce every minimum, and so comes back as it was saved; else float32 ones. Codes of
    2 and 3 bits come back as 4 bits, with the same values.
    """
    blocks = raw.reshape(*raw.shape[:-1], -1, {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind])
    count = 4 if kind == "Q4_1" else 2
    order = np.arange(blocks.shape[-3]) if order is None else order
    head = np.ascontiguousarray(blocks[..., :count][..., np.argsort(order), :, :]).view(HALF)
    words = _words(blocks[..., count:], kind, order)
    length = _group_length(head.view(np.uint16))
    groups = np.swapaxes(head[..., ::length, :], -3, -2)  # (stack…, groups, out, d and m)
    scales, zeros = groups[..., 0], None
    if kind == "Q4_1":
        words, scales, zeros = _affine(words, scales, groups[..., 1], length)
    in_features, out_features = head.shape[-2] * LENGTH, head.shape[-3]
    return QuantizedTensor(
        codes=jnp.asarray(words),
        scales=jnp.asarray(np.ascontiguousarray(scales)),
        zeros=None if zeros is None else jnp.asarray(zeros),
        permutation=None,
        bits=8 if kind == "Q8_0" else 4,
        group_size=min(length * LENGTH, in_features),
        dtype=jnp.dtype(dtype),
        layout=Layout.dense(in_features, out_features),
    )


def _words(body: np.ndarray, kind: str, order: np.ndarray) -> np.ndarray:
    """The codes of (stack…, out, blocks, bytes) as (stack…, words, out) uint32, in jgptq.packing's order.

    A run of rows at a time: what is made on the way is small whatever the tensor.
    """
    *stack, rows, blocks, _ = body.shape
    words = np.empty((*stack, blocks * (8 if kind == "Q8_0" else 4), rows), np.uint32)
    step = max(1, BLOCK // (blocks * LENGTH))
    for index in np.ndindex(*stack):
        for start in range(0, rows, step):
            part = body[index][start : start + step]
            if kind == "Q8_0":
                stream = part ^ np.uint8(0x80)
            else:
                codes = np.concatenate([part & np.uint8(15), part >> 4], axis=-1)
                stream = codes[..., ::2] | codes[..., 1::2] << 4
            words[index][:, order[start : start + step]] = stream.view("<u4").reshape(len(part), -1).T
    return words


def _group_length(head: np.ndarray) -> int:
    """The largest number of blocks of which every run, from the first block on, has one scale (and minimum)."""
    differ = np.any(head[..., 1:, :] != head[..., :-1, :], axis=-1)
    starts = 1 + np.flatnonzero(np.any(differ, axis=tuple(range(differ.ndim - 1))))
    return math.gcd(*starts.tolist()) if len(starts) else head.shape[-2]


def _affine(words: np.ndarray, d: np.ndarray, m: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, scales and zeros of d u + m = d (u - zero)."""
    wide, minimum = d.astype(np.float32), m.astype(np.float32)
    with np.errstate(all="ignore"):
        zeros = np.where((d == 0) & (m == 0), np.float32(0), -minimum / wide)
        whole = np.round(zeros)
        same = (whole >= 0) & (whole <= 15) & ((-wide * whole).astype(HALF) == m)
    if np.all(same):
        return words, d, whole.astype(np.uint8)
    constant = d == 0  # m alone: scale m, zero -1 and code 0
    if np.any(constant):
        per_word = np.repeat(constant, length * LENGTH // 8, axis=-2)[..., : words.shape[-2], :]
        words = np.where(per_word, np.uint32(0), words)
    return words, np.where(constant, m, d), np.where(constant, np.float32(-1), zeros)
