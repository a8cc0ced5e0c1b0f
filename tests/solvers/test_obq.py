"""obq against a brute-force float64 loop that inverts the Hessian anew at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import tensor

# in, out, bits, group_size, symmetric; 33 outputs are one more than are solved at once.
CASES = [(24, 33, 3, 8, False), (24, 33, 4, None, True), (20, 5, 2, 8, True), (1, 1, 8, 128, False)]


def make(in_features, out_features):
    w, x = reference.problem(in_features, out_features)
    return w, jgptq.update_hessian(jgptq.init_hessian(in_features), jnp.asarray(x))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_codes_and_loss_are_those_of_brute_force(case):
    in_features, out_features, bits, group_size, symmetric = case
    w, hessian = make(in_features, out_features)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    with jax.enable_x64(True):
        weight, info = jgptq.obq(jnp.asarray(w), hessian, jgptq.Grid(**options))
        codes = np.asarray(tensor.unpack_codes(weight))
    expected, loss = reference.obq(w, np.asarray(hessian.mean()), **options)
    np.testing.assert_array_equal(codes, expected)
    assert float(info.loss) == pytest.approx(loss, rel=1e-5)
    error = reference.relative_error(w, np.asarray(weight.dequantize()), np.asarray(hessian.mean()))
    assert float(info.relative_error) == pytest.approx(error, rel=1e-4, abs=1e-9)


def test_in_float32_near_ties_cost_no_quality():
    w, hessian = make(24, 33)
    _, info = jgptq.obq(jnp.asarray(w), hessian, jgptq.Grid(bits=3, group_size=8))
    _, loss = reference.obq(w, np.asarray(hessian.mean()), bits=3, group_size=8, symmetric=False)
    assert float(info.loss) == pytest.approx(loss, rel=1e-3)


def test_the_greedy_order_beats_gptq_in_natural_order_on_average():
    # [Frantar et al. 2022 against 2023]: greedy per output feature is never much worse and mostly better.
    w, hessian = make(24, 33)
    grid = jgptq.Grid(bits=3, group_size=8)
    _, greedy = jgptq.obq(jnp.asarray(w), hessian, grid)
    _, nearest = jgptq.rtn(jnp.asarray(w), grid, hessian=hessian)
    assert float(greedy.relative_error) < 0.9 * float(nearest.relative_error)


def test_dead_inputs_are_rounded_to_nearest():
    w, x = reference.problem(24, 33)
    x[:, [2, 9]] = 0
    hessian = jgptq.update_hessian(jgptq.init_hessian(24), jnp.asarray(x))
    weight, info = jgptq.obq(jnp.asarray(w), hessian, jgptq.Grid(bits=3, group_size=8))
    assert int(info.dead_inputs) == 2
    nearest = reference.rtn(w, bits=3, group_size=8, symmetric=False).codes
    np.testing.assert_array_equal(np.asarray(tensor.unpack_codes(weight))[[2, 9]], nearest[[2, 9]])


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    def test_shape(self):
        with pytest.raises(ValueError, match=r"w has shape \(24,\); give one nonempty \(in, out\) matrix"):
            jgptq.obq(jnp.ones(24), jgptq.init_hessian(24), jgptq.Grid())

    def test_hessian(self):
        with pytest.raises(ValueError, match=r"the Hessian is \(24, 24\) but w has 25 inputs"):
            jgptq.obq(jnp.ones((25, 2)), jgptq.init_hessian(24), jgptq.Grid())

    def test_damp(self):
        with pytest.raises(ValueError, match=r"damp=-1.0; give a number from 0"):
            jgptq.obq(jnp.ones((24, 2)), jgptq.init_hessian(24), jgptq.Grid(), damp=-1.0)
