"""jgptq.grid: min/max grids against float64, rounding, limits of the scale's dtype, and bad options."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import jgptq
from jgptq import grid as grids

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 24, None])
def test_grids_are_those_of_float64(bits, symmetric, group_size):
    w = reference.problem(64, 50)[0]
    scales, zeros = grids.fit_groups(jnp.asarray(w), jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric))
    size = group_size or 64
    fits = [reference.fit(w[start : start + size].astype(np.float64), bits, symmetric) for start in range(0, 64, size)]
    # No scale or zero of this weight lies near a tie, so float32 must find the very same ones.
    assert min(fit.scale_margin.min() for fit in fits) > 1e-4
    np.testing.assert_array_equal(scales, [fit.scale for fit in fits])
    np.testing.assert_array_equal(zeros, [fit.zero for fit in fits])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BITS), st.booleans(), st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_rounding_error_is_at_most_half_a_step(bits, symmetric, seed, offset):
    w = (np.random.default_rng(seed).normal(size=(16, 5)) + offset).astype(np.float32)
    grid = jgptq.Grid(bits=bits, symmetric=symmetric)
    scale, zero = grids.fit(jnp.asarray(w), grid)
    codes = grids.encode(jnp.asarray(w), scale[None], zero[None], grid.max_code)
    error = np.abs(w - np.asarray(grids.decode(codes, scale[None], zero[None])))
    # A symmetric grid has no code for +max: that end alone is a whole step off. Rounding the scale to float16
    # (2^-11) moves the ends by as much of the range; the zero may round by half a step, which the ends pay.
    steps = np.where((codes == 0) | (codes == grid.max_code), 1.0, 0.5) + 2.0**bits * 2.0**-11
    assert (error <= np.asarray(scale) * steps * (1 + 1e-5)).all()
    assert ((codes >= 0) & (codes <= grid.max_code)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_always_represented(symmetric):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 20)) + 5.0, jnp.float32)
    grid = jgptq.Grid(bits=3, symmetric=symmetric)
    scale, zero = grids.fit(w, grid)
    codes = grids.encode(jnp.zeros_like(w), scale[None], zero[None], grid.max_code)
    assert not grids.decode(codes, scale[None], zero[None]).any()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_are_rounded_to_their_dtype_and_kept_in_its_range(scale_dtype):
    info = jnp.finfo(scale_dtype)
    scales = jnp.array([1 / 3, -1 / 3, 1e-30, 1e38, 0.0], jnp.float32)
    rounded = grids.round_scales(scales, scale_dtype)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, rounded.astype(scale_dtype).astype(jnp.float32))
    np.testing.assert_array_equal(rounded[:2], scales[:2].astype(scale_dtype).astype(jnp.float32))
    assert float(rounded.max()) <= float(info.max)
    assert float(jnp.abs(rounded).min()) >= float(info.tiny)
    # 0.0 always; in float16 also 1e-30 and 1e38, which the wider exponents hold.
    assert int(grids.scales_at_limit(rounded.astype(scale_dtype))) == (3 if scale_dtype == "float16" else 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_that_overflows_when_subtracted_still_has_a_scale(symmetric):
    w = jnp.array([[-3e38], [3e38]], jnp.float32)
    scale, zero = grids.fit(w, jgptq.Grid(bits=4, symmetric=symmetric, scale_dtype="float32"))
    np.testing.assert_allclose(scale, 6e38 / 15, rtol=1e-6)
    assert 7 <= int(zero[0]) <= 8


def test_group_length():
    assert jgptq.Grid(group_size=None).group_length(172) == 172
    assert jgptq.Grid(group_size=32).group_length(172) == 32
    assert jgptq.Grid(group_size=128).group_length(64) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"bits=5; choose one of \(2, 3, 4, 8\)"),
        ({"bits": 4.0}, r"bits=4.0; choose one of"),
        ({"bits": "4"}, r"bits='4'; choose one of"),
        ({"group_size": 0}, r"group_size=0; give a positive integer, or None for one group an output feature"),
        ({"group_size": -1}, r"group_size=-1; give a positive integer, or None"),
        ({"group_size": 32.0}, r"group_size=32.0; give a positive integer"),
        ({"group_size": True}, r"group_size=True; give a positive integer"),
        ({"symmetric": "no"}, r"symmetric='no'; choose True or False"),
        ({"scale_dtype": "int8"}, r"scale_dtype='int8'; choose one of \('float16', 'bfloat16', 'float32'\)"),
    ],
)
@pytest.mark.usefixtures("without_type_checker")
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jgptq.Grid(**options)
