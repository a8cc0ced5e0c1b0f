"""GGUF's blocks against the gguf package, which is ggml's own, both ways."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import SHORT_SCALES, packed

from jgptq import grid, tensor
from jgptq.checkpoints import gguf_blocks

ANY_SCALES = np.random.default_rng(7).uniform(0.01, 0.1, 200).astype(np.float16)
GRIDS = {
    "Q4_0": grid.Grid(bits=4, group_size=64, symmetric=True),
    "Q4_0 of 3 bits": grid.Grid(bits=3, group_size=32, symmetric=True),
    "Q4_0 of 2 bits": grid.Grid(bits=2, group_size=None, symmetric=True),
    "Q8_0": grid.Grid(bits=8, group_size=32, symmetric=True),
    "Q8_0 with a short group": grid.Grid(bits=8, group_size=96, symmetric=True),
    "Q4_1": grid.Grid(bits=4, group_size=64),
    "Q4_1 of 3 bits": grid.Grid(bits=3, group_size=128),
    "Q4_1 of 2 bits": grid.Grid(bits=2, group_size=32),
}


def weight_of(name, scales=SHORT_SCALES, shape=(256, 24)):
    return packed(np.random.default_rng(1), shape, GRIDS[name], scales=scales)


def test_halves_of_bytes_lie_sixteen_codes_apart():
    codes = jnp.asarray(np.tile(np.arange(16), 2)[:, None], jnp.uint32)
    weight = tensor.from_codes(codes, jnp.ones((1, 1)), None, grid=grid.Grid(group_size=32, symmetric=True))
    row = gguf_blocks.encode(weight, None)
    assert row.tobytes().hex() == "003c" + "00112233445566778899aabbccddeeff"


def test_minimum_and_signed_codes():
    codes = jnp.asarray(np.arange(32)[:, None] % 16, jnp.uint32)
    affine = tensor.from_codes(codes, jnp.full((1, 1), 0.5), jnp.full((1, 1), 3), grid=grid.Grid(group_size=32))
    assert gguf_blocks.encode(affine, None).tobytes()[:4].hex() == "0038" + "00be"  # 0.5 and -1.5
    wide = tensor.from_codes(codes + 112, jnp.ones((1, 1)), None, grid=grid.Grid(bits=8, group_size=32, symmetric=True))
    assert gguf_blocks.encode(wide, None)[0, 2:].view(np.int8).tolist() == [*range(-16, 0), *range(-16, 0)]


@pytest.mark.parametrize("name", GRIDS)
def test_ggml_reads_exactly_the_dequantized_weight(name):
    weight = weight_of(name)
    raw = gguf_blocks.encode(weight, None)
    read = gguf.quants.dequantize(raw, Kind[gguf_blocks.kind_of(weight)])
    np.testing.assert_array_equal(read, np.asarray(weight.dequantize()).T)
    assert gguf_blocks.refusal(weight) is None
    assert gguf_blocks.rounding(weight) == 0


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scales", [SHORT_SCALES, ANY_SCALES], ids=["short", "any"])
def test_comes_back_bit_for_bit(name, scales):
    weight = weight_of(name, scales)
    order = np.random.default_rng(2).permutation(24)
    again = gguf_blocks.decode(gguf_blocks.encode(weight, order), gguf_blocks.kind_of(weight), order, jnp.float32)
    assert again.group_size == weight.group_size
    np.testing.assert_array_equal(again.scales, weight.scales)
    if weight.bits in (4, 8):
        np.testing.assert_array_equal(again.codes, weight.codes)
        if not weight.symmetric:
            assert again.zeros.dtype == jnp.uint8
            np.testing.assert_array_equal(again.zeros, weight.zeros)
    else:  # Narrow codes are kept as 4 bits.
        np.testing.assert_array_equal(again.dequantize(), weight.dequantize())


def test_rounding_of_the_minimum_is_told_in_steps():
    weight = weight_of("Q4_1", ANY_SCALES)
    read = gguf.quants.dequantize(gguf_blocks.encode(weight, None), Kind.Q4_1).T
    steps = np.asarray(weight.scales, np.float32)[np.arange(256) // 64]
    change = np.abs(read - np.asarray(weight.dequantize())) / steps
    assert gguf_blocks.rounding(weight) == pytest.approx(change.max(), rel=1e-3)
    # m is at most 15 steps, and float16 has 11 significant bits.
    assert 0 < change.max() <= 15 / 2**11


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_reads_what_ggml_quantized(kind):
    values = np.random.default_rng(3).normal(0.05, 0.1, (24, 256)).astype(np.float32)
    values[3, 32:64] = 0.0
    values[4, 32:64] = 0.125  # a block of one value
    raw = gguf.quants.quantize(values, Kind[kind])
    expected = gguf.quants.dequantize(raw, Kind[kind])
    weight = gguf_blocks.decode(raw, kind, None, jnp.float32)
    assert weight.group_size == 32
    assert tensor.has_integer_zeros(weight) == (kind != "Q4_1")
    # Q4_1: d (u - zero) for d u + m; both round to float32, errors are of the size of m.
    tolerance = 4 * np.finfo(np.float32).eps * np.abs(values).max() if kind == "Q4_1" else 0
    np.testing.assert_allclose(np.asarray(weight.dequantize()).T, expected, rtol=0, atol=tolerance)
    if kind == "Q4_1":
        assert weight.dequantize()[40, 4] == 0.125
    np.testing.assert_array_equal(
        gguf.quants.dequantize(gguf_blocks.encode(weight, None), Kind[kind]), expected
    )  # and float zeros give back the same minima


def test_constant_blocks_of_any_group_length():
    """d = 0 leaves m alone, whatever the codes."""
    raw = np.zeros((2, 4, 20), np.uint8)
    raw[..., 4:] = 0x5A
    raw[..., :4] = np.array([[0.0, 0.25]], np.float16).view(np.uint8)
    raw[1, 2:, :4] = np.array([[0.5, 0.3]], np.float16).view(np.uint8)
    weight = gguf_blocks.decode(raw.reshape(2, -1), "Q4_1", None, jnp.float32)
    assert weight.group_size == 64
    expected = gguf.quants.dequantize(raw.reshape(2, -1), Kind.Q4_1)
    np.testing.assert_allclose(np.asarray(weight.dequantize()).T, expected, rtol=1e-6)
    assert (np.asarray(weight.dequantize())[:, 0] == 0.25).all()


@pytest.mark.parametrize(
    ("in_features", "given", "length"),
    [(256, 96, 96), (160, 128, 128), (224, 32, 32), (96, None, 96), (32, 32, 32)],
)
def test_groups_are_found_again(in_features, given, length):
    own = grid.Grid(bits=4, group_size=given, symmetric=True)
    weight = packed(np.random.default_rng(4), (in_features, 40), own, scales=ANY_SCALES)
    assert gguf_blocks.decode(gguf_blocks.encode(weight, None), "Q4_0", None, jnp.float32).group_size == length


def test_order_within_groups_needs_no_permutation():
    """Inputs permuted so that every block still has one group: codes go back to natural order."""
    random = np.random.default_rng(5)
    permutation = np.concatenate([random.permutation(64) + 64, random.permutation(64)]).astype(np.int32)
    own = grid.Grid(bits=4, group_size=64)
    weight = packed(random, (128, 8), own, permutation=jnp.asarray(permutation))
    assert gguf_blocks.refusal(weight) is None
    again = gguf_blocks.decode(gguf_blocks.encode(weight, None), "Q4_1", None, jnp.float32)
    assert again.permutation is None
    np.testing.assert_array_equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("shape", "own", "changes", "message"),
    [
        ((64, 8), grid.Grid(bits=8, group_size=32), {}, "asymmetric with 8 bits"),
        ((48, 8), grid.Grid(bits=4, group_size=16, symmetric=True), {}, "48 inputs, not a multiple of 32"),
        ((96, 8), grid.Grid(bits=4, group_size=48, symmetric=True), {}, "groups of 48 inputs"),
        ((64, 8), grid.Grid(bits=4, group_size=16, symmetric=True), {}, "groups of 16 inputs"),
        (
            (64, 8),
            grid.Grid(bits=4, group_size=32),
            {"permutation": np.arange(64).reshape(2, 32).T.ravel()},
            "act_order",
        ),
        ((64, 8), grid.Grid(bits=4, group_size=32), {"scales": np.full((2, 8), 0.1, np.float32)}, "scale_dtype"),
        ((64, 8), grid.Grid(bits=4, group_size=32), {"scales": np.full((2, 8), 6e4, np.float32)}, "beyond the range"),
    ],
)
def test_refuses_what_blocks_cannot_hold(shape, own, changes, message):
    weight = packed(np.random.default_rng(6), shape, own)
    weight = tensor.QuantizedTensor(**{**vars(weight), **{name: jnp.asarray(x) for name, x in changes.items()}})
    assert message in gguf_blocks.refusal(weight)
