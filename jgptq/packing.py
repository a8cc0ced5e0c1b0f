"""Small integers in 32-bit words: one little-endian bit stream along an axis, exactly `bits` a code.

Code k of a stream occupies bits [k * bits, (k + 1) * bits) of the concatenated words. For 2, 4 and 8 bits a word holds
32 / bits whole codes; for 3 bits, 32 codes fill 3 words and two of them straddle a boundary. This is the order of
GPTQ checkpoints.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt32


def word_count(length: int, bits: int) -> int:
    """Words that hold `length` codes; the last may be partly used."""
    return -(-length * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of whole words that holds whole codes: (codes, words)."""
    shared = math.gcd(32, bits)
    return 32 // shared, bits // shared


def pack(codes: Integer[Array, "*batch length out"], bits: int) -> UInt32[Array, "*batch words out"]:
    """Packs codes in 0 .. 2**bits - 1 along the second to last axis; unused bits of the last word are zero."""
    *batch, length, out = codes.shape
    period, period_words = _period(bits)
    blocks = -(-length // period)
    ends = [(0, 0)] * len(batch) + [(0, blocks * period - length), (0, 0)]
    padded = jnp.pad(codes.astype(jnp.uint32), ends).reshape(*batch, blocks, period, out)
    words = [jnp.zeros((*batch, blocks, out), jnp.uint32) for _ in range(period_words)]
    for k in range(period):
        word, shift = divmod(k * bits, 32)
        words[word] |= padded[..., k, :] << shift
        if shift + bits > 32:
            words[word + 1] |= padded[..., k, :] >> (32 - shift)
    stream = jnp.stack(words, axis=-2).reshape(*batch, blocks * period_words, out)
    return stream[..., : word_count(length, bits), :]


def unpack(words: UInt32[Array, "*batch words out"], bits: int, length: int) -> UInt32[Array, "*batch length out"]:
    """The first `length` codes of packed words, along the second to last axis."""
    *batch, count, out = words.shape
    if count != word_count(length, bits):
        raise ValueError(
            f"{count} words cannot hold {length} codes of {bits} bits: that takes {word_count(length, bits)} words"
        )
    period, period_words = _period(bits)
    blocks = -(-count // period_words)
    if blocks * period_words != count:
        words = jnp.concatenate([words, jnp.zeros((*batch, blocks * period_words - count, out), jnp.uint32)], axis=-2)
    words = words.reshape(*batch, blocks, period_words, out)
    offsets = [divmod(k * bits, 32) for k in range(period)]
    per_code = (1,) * (len(batch) + 1) + (period, 1)
    shifts = jnp.array([shift for _, shift in offsets], jnp.uint32).reshape(per_code)
    # With one word a period the low parts are a broadcast, which XLA fuses into whatever reads the codes.
    low = words if period_words == 1 else words[..., jnp.array([word for word, _ in offsets]), :]
    codes = low >> shifts
    if period_words > 1:
        straddles = jnp.array([shift + bits > 32 for _, shift in offsets]).reshape(per_code)
        following = jnp.array([min(word + 1, period_words - 1) for word, _ in offsets])
        codes |= jnp.where(straddles, words[..., following, :] << ((32 - shifts) % 32), jnp.uint32(0))
    codes = codes & jnp.uint32(2**bits - 1)
    return codes.reshape(*batch, blocks * period, out)[..., :length, :]
