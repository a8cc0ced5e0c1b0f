"""rtn against rounding in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import tensor


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 24), (4, None), (8, 128)])
def test_codes_are_nearest(bits, group_size, symmetric):
    w, x = reference.problem(64, 50)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    hessian = jgptq.update_hessian(jgptq.init_hessian(64), jnp.asarray(x))
    weight, info = jgptq.rtn(jnp.asarray(w), jgptq.Grid(**options), hessian=hessian)
    oracle = reference.rtn(w, **options)
    assert oracle.code_margin.min() > 1e-6  # no tie to lose
    np.testing.assert_array_equal(tensor.unpack_codes(weight), oracle.codes)
    np.testing.assert_array_equal(weight.dequantize(), oracle.weight)
    expected = reference.relative_error(w, oracle.weight, np.asarray(hessian.mean()))
    assert float(info.relative_error) == pytest.approx(expected, rel=1e-4)


def test_without_a_hessian_the_error_is_that_of_white_inputs():
    w, _ = reference.problem(64, 50)
    weight, info = jgptq.rtn(jnp.asarray(w), jgptq.Grid(bits=4, group_size=None))
    error = w - np.asarray(weight.dequantize())
    assert float(info.loss) == pytest.approx(float(np.sum(error**2)), rel=1e-5)
    assert float(info.relative_error) == pytest.approx(float(np.sum(error**2) / np.sum(w**2)), rel=1e-5)


@pytest.mark.usefixtures("without_type_checker")
@pytest.mark.parametrize("shape", [(64,), (2, 64, 16), (0, 16)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"w has shape .*; give one nonempty \(in, out\) matrix"):
        jgptq.rtn(jnp.ones(shape), jgptq.Grid())
