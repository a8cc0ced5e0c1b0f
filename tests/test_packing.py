"""jgptq.packing against a string of bits and the published words of the GPTQ layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jgptq import packing

BITS = (2, 3, 4, 8)

# Codes (7 i + 3) mod 2**bits, i = 0 .. 31, as GPTQ checkpoints hold them.
VECTORS = {
    2: "1b1b1b1b 1b1b1b1b",
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    8: "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
}


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_gptq_checkpoints(bits):
    codes = jnp.array([[(7 * i + 3) % 2**bits] for i in range(32)], jnp.uint8)
    words = [int(word, 16) for word in VECTORS[bits].split()]
    assert packing.pack(codes, bits)[:, 0].tolist() == words
    assert packing.unpack(jnp.array(words, jnp.uint32)[:, None], bits, 32).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_three_bits_take_three_bits(bits):
    assert packing.word_count(4096, bits) * 4 == 4096 * bits // 8
    assert [packing.word_count(n, bits) for n in (1, 32, 33)] == [1, bits, -(-33 * bits // 32)]


# Eager, so that hypothesis does not compile anew for every length; few lengths, so that the operations are cached.
@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from((1, 10, 11, 21, 22, 31, 32, 33, 172)), st.integers(0, 2**32 - 1))
def test_packing_matches_a_string_of_bits_and_comes_back(bits, length, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (length, 3))
    words = packing.pack(jnp.asarray(codes, jnp.int32), bits)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(words, reference.pack(codes, bits))
    np.testing.assert_array_equal(packing.unpack(words, bits, length), codes)


@pytest.mark.parametrize("bits", BITS)
def test_batches_pack_one_by_one_under_jit_and_vmap(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 3, 43, 2)).astype(np.uint8)
    words = jax.jit(packing.pack, static_argnums=1)(jnp.asarray(codes), bits)
    expected = [[reference.pack(codes[i, j], bits) for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(words, np.array(expected))
    unpack = jax.vmap(lambda w: packing.unpack(w, bits, 43))
    np.testing.assert_array_equal(unpack(words), codes)


def test_wrong_word_count_is_refused():
    with pytest.raises(ValueError, match=r"5 words cannot hold 32 codes of 3 bits: that takes 3 words"):
        packing.unpack(jnp.zeros((5, 2), jnp.uint32), 3, 32)
