"""The running Hessian against float64, and its damped factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import hessian as hessians


def accumulate(*batches) -> jgptq.Hessian:
    hessian = jgptq.init_hessian(batches[0].shape[-1])
    for batch in batches:
        hessian = jgptq.update_hessian(hessian, jnp.asarray(batch))
    return hessian


@pytest.mark.parametrize("split", [[64], [1, 63], [16, 16, 32], [0, 64]])
def test_sums_do_not_depend_on_the_batch_split(split):
    # Integers below 2^24 are exact in float32, in any order.
    x = np.random.default_rng(0).integers(-9, 10, (64, 12)).astype(np.float32)
    hessian = accumulate(*np.split(x, np.cumsum(split)[:-1]))
    np.testing.assert_array_equal(hessian.total, x.T @ x)
    assert int(hessian.tokens) == 64
    np.testing.assert_array_equal(hessian.mean(), x.T @ x / 64)


def test_every_leading_axis_is_tokens():
    x = np.random.default_rng(0).integers(-9, 10, (2, 4, 8, 12)).astype(np.float32)
    assert int(accumulate(x).tokens) == 64
    np.testing.assert_array_equal(accumulate(x).total, accumulate(x.reshape(64, 12)).total)
    assert int(accumulate(x[0, 0, 0]).tokens) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_inputs_are_summed_in_float32(dtype):
    # A large mean: partial sums kept in the narrow type would be off by 2^-9 (bfloat16) or overflow (float16).
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 12)) + 30.0).astype(dtype)
    exact = np.asarray(x).astype(np.float64)
    total = accumulate(x).total
    assert total.dtype == jnp.float32
    # Float32 sums of 4096 terms: about 64 * 2^-24 of the sum at random, 4096 * 2^-24 = 2.4e-4 at worst.
    np.testing.assert_allclose(total, exact.T @ exact, rtol=2e-5)


def test_wide_sums_are_made_block_by_block():
    x = np.random.default_rng(0).integers(-9, 10, (8, 1056)).astype(np.float32)
    np.testing.assert_array_equal(accumulate(x[:3], x[3:]).total, x.T @ x)


def test_merge_is_the_hessian_of_both():
    x = np.random.default_rng(0).integers(-9, 10, (20, 12)).astype(np.float32)
    merged = jgptq.merge_hessians(accumulate(x[:7]), accumulate(x[7:]))
    np.testing.assert_array_equal(merged.total, x.T @ x)
    assert int(merged.tokens) == 20


def test_it_jits_and_vmaps():
    x = np.random.default_rng(0).integers(-9, 10, (3, 16, 12)).astype(np.float32)
    stacked = jax.jit(jax.vmap(jgptq.update_hessian, in_axes=(None, 0)))(jgptq.init_hessian(12), jnp.asarray(x))
    np.testing.assert_array_equal(stacked.total, np.einsum("bni,bnj->bij", x, x))
    np.testing.assert_array_equal(stacked.mean(), np.einsum("bni,bnj->bij", x, x) / 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_inputs_stay_visible(value):
    x = np.ones((8, 12), np.float32)
    x[3, 5] = value
    assert not np.isfinite(np.asarray(accumulate(x).total)[5]).any()
    assert np.isfinite(np.asarray(accumulate(x).total)[:5, :5]).all()


def test_nothing_seen_has_mean_zero():
    assert not jgptq.init_hessian(12).mean().any()
    assert not accumulate(np.zeros((0, 12), np.float32)).mean().any()


def problem_hessian(in_features=48, tokens=1024):
    return np.asarray(accumulate(reference.problem(in_features, 1, tokens=tokens)[1]).mean())


def factored(h, damp, order=None):
    """The factor of a mean Hessian, of three tokens, and its upper triangle."""
    factor = hessians.factor(jgptq.Hessian(jnp.asarray(3 * h), jnp.int32(3)), damp, order)
    return factor, np.asarray(factor.lower, np.float64).T


def test_factor_is_that_of_the_damped_hessian():
    h = problem_hessian()
    (_, pivots, added, _, damp, failed), upper = factored(h, 0.01)
    pivots = np.asarray(pivots, np.float64)
    assert (np.tril(upper, -1) == 0).all()
    # XLA divides by multiplying with a reciprocal, which may leave one rounding.
    np.testing.assert_allclose(np.diagonal(upper), 1, atol=2.0**-23)
    # A backward-stable factorization in float32 errs by a few n * 2^-24 of the largest entry.
    np.testing.assert_allclose(upper * pivots @ upper.T, reference.damped(h, 0.01), atol=48 * 2.0**-24 * h.max())
    np.testing.assert_allclose(added, 0.01 * np.diagonal(h).mean(), rtol=1e-6)
    assert float(damp) == np.float32(0.01)
    assert not failed


def test_a_factor_in_another_order_with_empty_slots():
    h = problem_hessian(47)
    order = np.append(np.random.default_rng(0).permutation(47), 47)
    order = np.insert(order, 20, 47)  # 49 slots, two of them empty
    factor, upper = factored(h, 0.01, jnp.asarray(order))
    expected = np.zeros((49, 49))
    filled = order < 47
    expected[np.ix_(filled, filled)] = reference.damped(h, 0.01)[np.ix_(order[filled], order[filled])]
    # An empty slot is a dead input.
    expected[~filled, ~filled] = 1.01 * np.diagonal(h).mean()
    product = upper * np.asarray(factor.pivots, np.float64) @ upper.T
    np.testing.assert_allclose(product, expected, atol=48 * 2.0**-24 * h.max())


def test_a_singular_hessian_grows_its_damping_and_says_so():
    h = problem_hessian(tokens=5)
    factor, upper = factored(h, 0.0)
    assert 0 < float(factor.damp) <= 1e-3
    assert not factor.failed
    np.testing.assert_allclose(
        upper * np.asarray(factor.pivots) @ upper.T,
        reference.damped(h, float(factor.damp)),
        atol=48 * 2.0**-24 * h.max(),
    )


def test_dead_inputs_are_decoupled():
    x = reference.problem(48, 1)[1]
    x[:, [3, 40]] = 0
    h = np.asarray(accumulate(x).mean())
    factor, upper = factored(h, 0.01)
    off_diagonal = upper * (1 - np.eye(48))
    assert not off_diagonal[[3, 40]].any()
    assert not off_diagonal[:, [3, 40]].any()
    live_mean = np.diagonal(h).sum() / 46
    np.testing.assert_allclose(factor.added[jnp.array([3, 40])], 1.01 * live_mean, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_damping_cures_a_hessian_that_is_not_finite(value):
    h = problem_hessian().copy()
    h[5, :] = h[:, 5] = value
    assert factored(h, 0.01)[0].failed


@pytest.mark.parametrize("in_features", [521, 1056])
def test_a_wide_factor_made_in_blocks_or_by_the_library(in_features):
    h = problem_hessian(in_features, tokens=64)
    (_, pivots, *_, failed), upper = factored(h, 0.01)
    assert not failed
    assert (np.tril(upper, -1) == 0).all()
    tolerance = in_features * 2.0**-24 * h.max()
    product = upper * np.asarray(pivots, np.float64) @ upper.T
    np.testing.assert_allclose(product, reference.damped(h, 0.01), atol=tolerance)


def test_the_last_block_can_fail_and_more_damping_cures_it():
    h = np.eye(1056, dtype=np.float32)
    h[0, 1] = h[1, 0] = 1.5
    factor, upper = factored(h, 0.01)  # rows go from the last to the first
    assert float(factor.damp) == pytest.approx(1.0)
    assert not factor.failed
    np.testing.assert_allclose(upper * np.asarray(factor.pivots) @ upper.T, h + np.eye(1056), atol=1e-6)


@pytest.mark.parametrize("in_features", [1, 48, 700])
def test_energy_from_the_factor_is_that_of_the_hessian(in_features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, in_features)).astype(np.float32)
    dead = np.arange(in_features) % 7 == 3
    x[:, dead] = 0
    d = rng.normal(size=(in_features, 3)).astype(np.float32)
    exact = np.sum((x.astype(np.float64) @ d) ** 2) / 64
    order = np.append(rng.permutation(in_features), in_features)
    in_order = np.append(d, np.zeros((1, 3), np.float32), axis=0)[order]
    for damp, tolerance in ((0.01, 1e-5), (10.0, 1e-4)):  # what was added is subtracted again: damp/1 of the energy
        factor = hessians.factor(accumulate(x), damp, jnp.asarray(order))
        np.testing.assert_allclose(factor.energy(jnp.asarray(in_order)), exact, rtol=tolerance)
    product = np.asarray(factor.lower, np.float64) @ in_order
    np.testing.assert_allclose(factor.times(jnp.asarray(in_order)), product, atol=1e-5)


def test_dead_inputs_have_no_energy_at_all():
    factor = hessians.factor(jgptq.init_hessian(12), 0.01)
    assert float(factor.energy(jnp.ones((12, 3)))) == 0


@pytest.mark.parametrize("in_features", [1, 48, 512, 700, 767])
def test_energy_is_the_trace(in_features):
    rng = np.random.default_rng(0)
    a, d = rng.normal(size=(2, in_features, 3)).astype(np.float32)
    h = (a @ a.T + np.eye(in_features)).astype(np.float32)
    exact = np.trace(d.T.astype(np.float64) @ h.astype(np.float64) @ d)
    # Float32 sums of up to 767² terms of both signs, each at most |h| |d|².
    hessian = jgptq.Hessian(jnp.asarray(3 * h), jnp.int32(3))
    np.testing.assert_allclose(hessian.energy(jnp.asarray(d)), exact, rtol=1e-4)


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    @pytest.mark.parametrize("in_features", [0, -1, 2.0, True, "12"])
    def test_a_width_that_is_none(self, in_features):
        with pytest.raises(ValueError, match=r"in_features=.*; give the weight's number of inputs, a positive integer"):
            jgptq.init_hessian(in_features)

    @pytest.mark.parametrize(("shape", "features"), [((3, 5), 5), ((12, 3), 3), ((), 0)])
    def test_inputs_of_another_width(self, shape, features):
        message = (
            rf"x has {features} features in its last axis, but this Hessian was made for 12; reshape x to \(..., 12\)"
        )
        with pytest.raises(ValueError, match=message):
            jgptq.update_hessian(jgptq.init_hessian(12), jnp.ones(shape))

    @pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
    def test_inputs_that_are_not_real(self, dtype):
        with pytest.raises(TypeError, match=r"x has dtype .*; give the layer's floating-point inputs"):
            jgptq.update_hessian(jgptq.init_hessian(12), jnp.ones((3, 12), dtype))

    def test_merging_two_widths(self):
        with pytest.raises(ValueError, match=r"Hessians of 12 and 5 features; merge two of one width"):
            jgptq.merge_hessians(jgptq.init_hessian(12), jgptq.init_hessian(5))


@pytest.mark.parametrize("wide", [8, 8192])
def test_lower_triangles_of_batches_mirrored_once_are_the_sum(monkeypatch, wide):
    x = np.random.default_rng(3).standard_normal((50, 12)).astype(np.float32)
    monkeypatch.setattr(hessians, "panel_size", lambda n: 4)
    monkeypatch.setattr(hessians, "WIDE", wide)
    monkeypatch.setattr(hessians, "LEAST", 3)
    hessian = jgptq.init_hessian(12)
    for rows in (x[:20], x[20:]):
        hessian = jax.jit(lambda hessian, rows: hessians.add_below(hessian, rows))(hessian, rows)
    exact = x.astype(np.float64).T @ x
    np.testing.assert_allclose(np.tril(hessian.total), np.tril(exact), rtol=1e-5, atol=1e-5)
    whole = hessians.mirrored(hessian)
    np.testing.assert_array_equal(np.tril(whole.total), np.tril(hessian.total))
    np.testing.assert_array_equal(whole.total, whole.total.T)
    assert whole.tokens == 50


# With divisors that a block can have, without, and below one block.
@pytest.mark.parametrize("n", [1, 7, 100, 131, 300, 512])
def test_what_is_above_the_diagonal_does_not_matter_to_mirroring(n):
    total = np.random.default_rng(4).standard_normal((n, n)).astype(np.float32)
    mirrored = jax.jit(hessians.mirrored)(hessians.Hessian(jnp.asarray(total), jnp.int32(0))).total
    np.testing.assert_array_equal(mirrored, np.tril(total) + np.tril(total, -1).T)


def test_a_sum_has_a_gradient():
    x = np.random.default_rng(5).standard_normal((6, 130)).astype(np.float32)
    mask = np.random.default_rng(6).standard_normal((130, 130)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(mask * jgptq.update_hessian(jgptq.init_hessian(130), x).total))(x)
    np.testing.assert_allclose(gradient, x @ (mask + mask.T), rtol=1e-4, atol=1e-4)
