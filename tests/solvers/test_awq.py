"""The search for AWQ's scales against its formula in float64, and the method's laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import AWQ, GPTQ, RTN, Grid, awq_scales, tensor

OPTIONS = {"bits": 4, "group_size": 16, "symmetric": False}
GRID = Grid(**OPTIONS)
PLAIN = GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None)
SCALES = np.random.default_rng(1).uniform(0.5, 2.0, 32).astype(np.float32)


def hessian_of(x):
    return jgptq.update_hessian(jgptq.init_hessian(x.shape[1]), jnp.asarray(x))


def outliers(seed=0):
    """A weight and inputs of which a few are up to 30 times as large as the rest."""
    w, x = reference.problem(32, 24, tokens=256, seed=seed)
    factors = np.ones(32, np.float32)
    factors[[3, 17, 18]] = 30, 20, 10
    return w, x * factors


def oracle_scales(weights, x, points, **options):
    """The candidates' errors and scales, as the docstring of `awq_scales` states them."""
    x = x.astype(np.float64)
    h = x.T @ x / len(x)
    r = np.sqrt(np.diag(h))
    found = []
    for k in range(points):
        s = r ** (k / points)
        s = s / np.exp(np.mean(np.log(s)))
        errors = [w - reference.rtn(s[:, None] * w, **options).weight / s[:, None] for w in weights]
        found.append((sum(np.trace(e.T @ h @ e) for e in errors), s))
    return found


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_those_of_the_formula(symmetric):
    options = OPTIONS | {"symmetric": symmetric}
    w, x = outliers()
    other = reference.problem(32, 9, seed=5)[0]
    oracle = oracle_scales([w, other], x, 10, **options)
    errors = sorted(error for error, _ in oracle)
    assert errors[1] > 1.001 * errors[0]  # no tie
    best = min(oracle, key=lambda item: item[0])[1]
    scales = awq_scales([jnp.asarray(w), jnp.asarray(other)], hessian_of(x), Grid(**options), points=10)
    np.testing.assert_allclose(scales, best, rtol=1e-5)
    assert best.max() > 2 * best.min()  # it does scale


def test_dead_inputs_are_not_scaled():
    w, x = outliers()
    x = np.where(np.arange(32) == 5, 0, x).astype(np.float32)
    scales = np.asarray(awq_scales([jnp.asarray(w)], hessian_of(x), GRID))
    assert scales[5] == 1
    assert np.all(np.isfinite(scales))
    assert np.ptp(scales) > 0


@pytest.mark.parametrize("solver", [RTN(), RTN(scale_search="lp")])
def test_less_output_error_than_rounding_where_some_inputs_are_large(solver):
    w, x = outliers()
    weight, info = AWQ(solver=solver).solve(jnp.asarray(w), hessian_of(x), GRID)
    _, plain = solver.solve(jnp.asarray(w), hessian_of(x), GRID)
    h = np.asarray(hessian_of(x).mean())
    assert float(info.relative_error) < 0.7 * float(plain.relative_error)
    assert float(info.relative_error) == pytest.approx(reference.relative_error(w, weight.dequantize(), h), rel=1e-3)


def test_the_solver_gets_the_scaled_problem():
    """GPTQ after AWQ is GPTQ of diag(s) W on the Hessian of x / s."""
    w, x = outliers()
    method, hessian = AWQ(solver=GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None)), hessian_of(x)
    weight, info = method.solve(jnp.asarray(w), hessian, GRID)
    s = np.asarray(weight.input_scales, np.float64)
    assert np.ptp(s) > 0
    h = np.asarray(hessian.mean(), np.float64)
    oracle = reference.gptq((s[:, None] * w).astype(np.float32), h / s[:, None] / s, **OPTIONS)
    agreement = reference.agreement(tensor.unpack_codes(weight), weight.scales, weight.zeros, oracle, bits=GRID.bits)
    assert agreement.unexplained == 0
    assert agreement.equal > 0.99
    shared = method.prepare(hessian, GRID, weight.input_scales)
    again, _ = method.solve(jnp.asarray(w), shared, GRID)
    np.testing.assert_array_equal(again.codes, weight.codes)
    d = jnp.asarray(w - np.asarray(weight.dequantize()))
    assert float(shared.energy(d)) == pytest.approx(float(hessian.energy(d)), rel=1e-3)
    assert float(info.loss) > 0


@pytest.fixture(scope="module")
def scaled():
    """A weight with scaled inputs and its dense (in, out) matrix, by NumPy."""
    plain, _ = jgptq.rtn(jnp.asarray(SCALES[:, None] * reference.problem(32, 24)[0]), GRID)
    dense = np.asarray(plain.dequantize()) / SCALES[:, None]
    return dataclasses.replace(plain, input_scales=jnp.asarray(SCALES)), dense


def test_a_weight_with_scaled_inputs_stands_for_its_logical_array(scaled):
    weight, dense = scaled
    np.testing.assert_allclose(weight.dequantize(), dense, rtol=1e-6)
    x = np.random.default_rng(2).normal(size=(5, 32)).astype(np.float32)
    product = jax.jit(jgptq.matmul)
    np.testing.assert_allclose(product(jnp.asarray(x), weight), x @ dense, atol=2e-5)
    np.testing.assert_allclose(product(jnp.asarray(x), jgptq.prepack(weight)), x @ dense, atol=2e-5)
    restored = jgptq.unprepack(jgptq.prepack(weight))
    np.testing.assert_array_equal(restored.input_scales, weight.input_scales)
    columns = tensor.unpack_columns(weight, jnp.asarray([3, 1]))
    np.testing.assert_allclose(columns, dense.T[[3, 1]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(jgptq.matmul(x, weight) ** 2))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, 2 * (x @ dense) @ dense.T, rtol=1e-4, atol=1e-3)
    assert "inputs scaled" in repr(weight)


def test_a_stack_of_scaled_and_unscaled_parts_is_joined(scaled):
    weight, dense = scaled
    part = dataclasses.replace(
        weight, layout=tensor.Layout(shape=(1, 32, 24), factors=(1, 32, 24), in_axes=(1,), out_axes=(2, 0))
    )
    plain = dataclasses.replace(part, input_scales=None)
    whole = tensor.Layout(shape=(2, 32, 24), factors=(2, 32, 24), batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    rest = ((0, 32), (0, 24))
    joined = tensor.join(whole, {((0, 1), *rest): plain, ((1, 2), *rest): part})
    np.testing.assert_allclose(joined.dequantize(), np.stack([SCALES[:, None] * dense, dense]), rtol=1e-6)


def test_permuted_inputs_are_scaled_in_their_natural_order():
    w, x = outliers()
    method = AWQ(solver=GPTQ(act_order=True, scale_search=None, sweeps=0, targets=None))
    weight, info = method.solve(jnp.asarray(w), hessian_of(x), GRID)
    assert weight.permutation is not None
    h = np.asarray(hessian_of(x).mean())
    assert reference.relative_error(w, weight.dequantize(), h) == pytest.approx(float(info.relative_error), rel=1e-3)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match=r"solver='rtn'; give a Method value that does not scale"):
        AWQ(solver="rtn")
    with pytest.raises(TypeError, match="that does not scale"):
        AWQ(solver=AWQ())
    with pytest.raises(TypeError, match="judge='loss'; give a Method value that does not scale, or None"):
        AWQ(judge="loss")
    with pytest.raises(ValueError, match="points=0; give a positive integer"):
        AWQ(points=0)


def test_a_solver_can_judge_the_scales():
    """Of the formula's candidates, those whose solved weights have the least output error, here in float64."""
    w, x = outliers(seed=8)
    other = reference.problem(32, 9, seed=5)[0]
    hessian = hessian_of(x)
    h = np.asarray(hessian.mean(), np.float64)
    errors, candidates = [], [s for _, s in oracle_scales([w, other], x, 10, **OPTIONS)]
    for s in candidates:
        scaled = h / s[:, None] / s
        solved = [reference.gptq((s[:, None] * each).astype(np.float32), scaled, **OPTIONS) for each in (w, other)]
        deltas = [each - found.weight / s[:, None] for each, found in zip((w, other), solved, strict=True)]
        errors.append(sum(np.trace(d.T @ h @ d) for d in deltas))
    assert np.sort(errors)[1] > 1.01 * min(errors)  # no tie
    weights = [jnp.asarray(w), jnp.asarray(other)]
    rounded = AWQ(points=10).scales(weights, hessian, GRID)
    scales = AWQ(points=10, judge=PLAIN).scales(weights, hessian, GRID)
    np.testing.assert_allclose(scales, candidates[np.argmin(errors)], rtol=1e-5)
    assert not np.allclose(scales, rounded, rtol=1e-3)
