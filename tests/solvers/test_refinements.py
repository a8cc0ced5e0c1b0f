"""Scales chosen with the solver in the loop, and sweeps, against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import grid as grids
from jgptq import tensor
from jgptq.hessian import factor
from jgptq.solvers import fits, sweeps
from jgptq.solvers.descent import Block, with_grids


def hessian_of(x) -> jgptq.Hessian:
    return jgptq.update_hessian(jgptq.init_hessian(x.shape[-1]), jnp.asarray(x))


@pytest.fixture(scope="module")
def block():
    """Sixteen inputs, their Hessian in float64, and the feedback of inputs solved before them."""
    w, x = reference.problem(16, 6, tokens=200, seed=3)
    feedback = 0.1 * np.random.default_rng(0).normal(size=w.shape)
    hessian = hessian_of(x)
    return w, feedback.astype(np.float32), reference.damped(np.asarray(hessian.mean()), 0.01), factor(hessian, 0.01)


def group_of(block, grid, feedback):
    w, _, _, factored = block
    own = Block(factored.lower, factored.pivots)

    def losses(scales, zeros):
        return with_grids(w, feedback, own, scales, zeros, grid, (4,)).loss

    moved = w + np.linalg.inv(np.asarray(factored.lower, np.float64)) @ feedback
    return fits.Group(lambda: jnp.asarray(moved, jnp.float32), factored.pivots, losses)


def recursion(w, feedback, h, scale, zero, bits):
    """Codes and loss of one output, in float64, by the recursion over U D Uᵀ = H itself."""
    lower = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    pivots = np.diagonal(lower) ** 2
    upper = lower / np.diagonal(lower)
    codes, errors, loss = [], [], 0.0
    for j in range(len(w)):
        t = w[j] + feedback[j] + sum(errors[k] * upper[k, j] for k in range(j))
        code = float(np.clip(np.round(t / scale) + zero, 0, 2**bits - 1))
        q = scale * (code - zero)
        codes.append(code)
        errors.append(w[j] - q)
        loss += pivots[j] * (t - q) ** 2
    return np.array(codes), loss


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True), (2, False)])
def test_each_candidate_costs_what_the_groups_own_recursion_says(block, bits, symmetric):
    w, feedback, h, _ = block
    grid = grids.levels(jgptq.Grid(bits=bits, group_size=16, symmetric=symmetric))
    group = group_of(block, grid, jnp.asarray(feedback))
    scale, zero = grids.fit(group.compensated(), grid)
    factors = np.array([0.6, 0.8, 1.0, -0.9 if symmetric else 1.1], np.float32)
    scales = grids.round_scales(scale[None] * factors[:, None], "float16")
    zeros = jnp.broadcast_to(zero[None], scales.shape)
    found = np.asarray(group.losses(scales, zeros))
    for c in range(len(factors)):
        for o in range(w.shape[1]):
            expected = recursion(w[:, o], feedback[:, o], h, float(scales[c, o]), float(zeros[c, o]), bits)[1]
            assert found[c, o] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("bits", "symmetric", "positive"), [(4, False, False), (4, True, False), (3, True, True)])
def test_no_candidate_beats_the_scale_and_zero_chosen(block, bits, symmetric, positive):
    w, feedback, h, _ = block
    grid = grids.levels(jgptq.Grid(bits=bits, group_size=16, symmetric=symmetric, positive_scales=positive))
    group = group_of(block, grid, jnp.asarray(feedback))
    scale, zero = (np.asarray(found, np.float64) for found in fits.in_loop(group, grid))
    assert (scale == scale.astype(np.float16)).all()
    assert (scale > 0).all() or (symmetric and not positive)
    centre = grids.search(group.compensated(), grid)
    others = [(np.asarray(grids.round_scales(centre[0] * f, "float16")), np.asarray(centre[1])) for f in fits.COARSE]
    for o in range(w.shape[1]):
        chosen = recursion(w[:, o], feedback[:, o], h, scale[o], zero[o], bits)[1]
        for scales, zeros in others:
            other = recursion(w[:, o], feedback[:, o], h, float(scales[o]), float(zeros[o]), bits)[1]
            assert chosen <= other * (1 + 1e-3)


def test_a_signed_scale_turns_the_grid_round():
    """One large positive weight: only a negative scale has a level for it."""
    w = np.full((16, 1), -0.1, np.float32)
    w[3] = 0.8
    x = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    errors = []
    for positive in (False, True):
        grid = jgptq.Grid(bits=4, group_size=16, symmetric=True, positive_scales=positive)
        weight, info = jgptq.gptq(jnp.asarray(w), hessian_of(x), grid, scale_search="in_loop")
        assert (float(weight.scales[0, 0]) > 0) == positive
        errors.append(float(info.relative_error))
    assert errors[0] < 0.5 * errors[1]


def test_a_scale_refitted_to_given_codes_is_the_least_squares_one(block):
    w, _, h, _ = block
    scale, zero = jnp.full(6, 0.2), jnp.arange(6.0)
    codes = np.random.default_rng(1).integers(0, 16, w.shape).astype(np.uint8)
    codes[:, 5] = 5  # all zero: no scale is better than another
    found = sweeps.refit(jnp.asarray(w), jnp.asarray(codes), scale, zero, jnp.asarray(h, jnp.float32))
    root = np.linalg.cholesky(h).T
    for o in range(5):
        steps = codes[:, o].astype(np.float64) - float(zero[o])
        expected = np.linalg.lstsq((root @ steps)[:, None], root @ w[:, o], rcond=None)[0][0]
        assert float(found[o]) == pytest.approx(expected, rel=1e-4)
    assert float(found[5]) == pytest.approx(0.2)


def test_codes_set_one_by_one_are_each_the_best_of_all(block):
    w, _, h, _ = block
    scale, zero = jnp.full(6, 0.25), jnp.full(6, 7.0)
    start = np.random.default_rng(2).integers(0, 16, w.shape).astype(np.uint8)
    operands = jnp.asarray(w), jnp.asarray(start), scale, zero, jnp.asarray(h, jnp.float32)
    found = np.asarray(sweeps.one_by_one(*operands, grids.levels(jgptq.Grid()), (4,)))
    for o in range(w.shape[1]):
        codes = start[:, o].astype(np.float64)
        for j in range(len(codes)):
            tried = np.repeat(codes[None], 16, axis=0)
            tried[:, j] = np.arange(16)
            errors = w[:, o] - 0.25 * (tried - 7.0)
            codes[j] = np.argmin(np.einsum("ci,ij,cj->c", errors, h, errors))
        np.testing.assert_array_equal(found[:, o], codes)


@pytest.mark.parametrize(
    ("act_order", "group_size", "symmetric"), [("group", 16, False), (True, 24, True), (False, None, False)]
)
def test_sweeps_lower_the_loss_of_every_output_and_say_by_how_much(act_order, group_size, symmetric):
    w, x = reference.problem(64, 8, tokens=300, seed=5)
    hessian, grid = hessian_of(x), jgptq.Grid(bits=3, group_size=group_size, symmetric=symmetric)
    h = reference.damped(np.asarray(hessian.mean(), np.float64), 0.01)
    losses = []
    for count in (0, 1, 3):
        weight, info = jgptq.gptq(
            jnp.asarray(w), hessian, grid, act_order=act_order, scale_search="in_loop", sweeps=count
        )
        delta = w - np.asarray(tensor.dequantize(weight), np.float64)
        losses.append(np.einsum("io,ij,jo->o", delta, h, delta))
        assert float(info.loss) == pytest.approx(losses[-1].sum(), rel=1e-3)
    assert (losses[1] <= losses[0] * (1 + 1e-4)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-4)).all()
    assert losses[2].sum() < 0.98 * losses[0].sum()


def test_a_group_is_solved_towards_what_makes_up_for_all_others():
    """With one group off the grid's reach, w_g + m is the least-squares answer of the others' errors."""
    _, x = reference.problem(32, 4, tokens=300, seed=6)
    hessian = hessian_of(x)
    factored = factor(hessian, 0.01)
    h = reference.damped(np.asarray(hessian.mean(), np.float64), 0.01)
    errors = np.random.default_rng(0).normal(size=(32, 4))
    own = sweeps.group_factors(factored, 8)
    lower = np.asarray(factored.lower, np.float64)
    products = lower @ errors
    pull = lower[:, 8:16].T @ (np.asarray(factored.pivots)[:, None] * products)
    move = np.asarray(own.inverse[1], np.float64) @ pull - errors[8:16]
    others = np.delete(np.arange(32), np.s_[8:16])
    np.testing.assert_allclose(move, np.linalg.solve(h[8:16, 8:16], h[8:16][:, others] @ errors[others]), atol=2e-4)
    np.testing.assert_allclose(own.matrix[1], h[8:16, 8:16], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_search": "best"}, "scale_search='best'"),
        ({"sweeps": -1}, "sweeps=-1"),
        ({"sweeps": 1, "act_order": "static"}, 'act_order="static"'),
    ],
)
def test_bad_options_are_named(options, message):
    w, x = reference.problem(16, 4, tokens=50)
    with pytest.raises(ValueError, match=message):
        jgptq.gptq(jnp.asarray(w), hessian_of(x), jgptq.Grid(group_size=8), **options)
    with pytest.raises(ValueError, match=message):
        jgptq.GPTQ(**options)
