"""The energy of many outputs, from sums of them, against the whole trace in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq.solvers.method import EXACT, energy


def case(outputs, spectrum=0.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 24)) * np.arange(1, 25) ** -spectrum
    hessian = jgptq.update_hessian(jgptq.init_hessian(24), jnp.asarray(x, jnp.float32))
    d = rng.normal(size=(24, outputs)).astype(np.float32)
    exact = np.einsum("io,ij,jo->", d.astype(np.float64), np.asarray(hessian.mean(), np.float64), d)
    return hessian, d, exact


@pytest.mark.parametrize("outputs", [1, 700, EXACT])
def test_it_is_exact_up_to_so_many_outputs(outputs):
    hessian, d, exact = case(outputs)
    assert float(energy(hessian, (jnp.asarray(d),))) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("outputs", [EXACT + 1, 2500])
@pytest.mark.parametrize("spectrum", [0.0, 2.0])
def test_the_estimate_is_near(outputs, spectrum):
    hessian, d, exact = case(outputs, spectrum)
    # Three standard deviations of the worst case, all outputs alike, are 27 %; these are far from it.
    assert float(energy(hessian, (jnp.asarray(d),))) == pytest.approx(exact, rel=0.05)


def test_it_is_exact_where_inputs_are_uncorrelated():
    _, d, _ = case(2500)
    diagonal = np.arange(1.0, 25.0, dtype=np.float32)
    hessian = jgptq.Hessian(jnp.diag(jnp.asarray(diagonal)), jnp.int32(1))
    exact = np.sum(diagonal[:, None] * d.astype(np.float64) ** 2)
    assert float(energy(hessian, (jnp.asarray(d),))) == pytest.approx(exact, rel=1e-5)


def test_differences_are_taken_of_outputs_for_themselves():
    hessian, d, _ = case(2500)
    w = jnp.asarray(d)
    at_once = energy(hessian, (w - jnp.round(w),))
    in_parts = energy(hessian, (w, w), lambda w, target: target - jnp.round(w))
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-6)


def test_what_is_not_finite_stays_visible_and_nothing_has_none():
    hessian, d, _ = case(1500)
    d[3, 1400] = np.nan
    assert np.isnan(float(energy(hessian, (jnp.asarray(d),))))
    assert float(energy(hessian, (jnp.zeros((24, 1500)),))) == 0
