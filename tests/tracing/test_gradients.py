"""Tokens weighted by the square of a loss's gradient, against gradients by errors added in the function itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import Grid
from jgptq.executor import Executor, part_key

WIDTH, HIDDEN, DEPTH = 6, 10, 2


def network(p, x, errors=None):
    """A left and a right product, a leaf used twice, a scanned stack and a scan over constants; errors by name."""
    errors = errors or {}

    def plus(value, name):
        return value + errors[name] if name in errors else value

    up = plus(jnp.einsum("oi,bti->obt", p["up"], x), "up").transpose(1, 2, 0)
    gate = plus(x @ p["gate"], "gate")
    x = x + plus((jnp.tanh(gate) * up) @ p["down"], "down")
    x = x + plus(jnp.sin(x) @ p["shared"], "first")
    x = x + plus(jnp.cos(x) @ p["shared"], "second")
    if "layers" in errors:  # unrolled by hand, for an error in each layer
        for w, error in zip(p["layers"], errors["layers"], strict=True):
            x = x + jnp.tanh(x @ w + error)
    else:
        x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])[0]
    return jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["cell"] + x),) * 2, x[:, 0], x.transpose(1, 0, 2))[1]


def loss(outputs, inputs):
    return jnp.sum(outputs**2 * (1 + jnp.abs(inputs[0].transpose(1, 0, 2)[..., :1])))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32) / 2

    params = {
        "up": normal(HIDDEN, WIDTH),
        "gate": normal(WIDTH, HIDDEN),
        "down": normal(HIDDEN, WIDTH),
        "shared": normal(WIDTH, WIDTH),
        "layers": normal(DEPTH, WIDTH, WIDTH),
        "cell": normal(WIDTH, WIDTH),
    }
    return params, [(normal(2, 5, WIDTH),), (normal(2, 5, WIDTH),), (normal(1, 3, WIDTH),)]


def squares(params, x):
    """By name, (tokens,) sums over outputs of the squared gradient, from the function with errors written into it."""
    tokens = x.shape[:2]
    zeros = {
        "up": jnp.zeros((HIDDEN, *tokens)),
        "gate": jnp.zeros((*tokens, HIDDEN)),
        **{name: jnp.zeros((*tokens, WIDTH)) for name in ("down", "first", "second")},
        "layers": jnp.zeros((DEPTH, *tokens, WIDTH)),
    }
    found = jax.grad(lambda errors: loss(network(params, x, errors), (x,)))(zeros)
    found = {name: np.asarray(gradient, np.float64) ** 2 for name, gradient in found.items()}
    layers = {f"layers[{layer}]": found["layers"][layer].sum(-1).ravel() for layer in range(DEPTH)}
    sums = {name: found[name].sum(-1).ravel() for name in ("gate", "down", "first", "second")}
    return {"up": found["up"].sum(0).ravel(), **sums, **layers}


def hessian(rows, weights):
    """Σ g x xᵀ with g normalized to a mean of 1; both over all batches."""
    rows, weights = np.concatenate(rows).astype(np.float64), np.concatenate(weights)
    return np.einsum("t,ti,tj->ij", weights / weights.mean(), rows, rows)


@pytest.fixture(scope="module")
def weighed(case):
    params, batches = case
    executor = Executor(network, params, batches)
    steps = executor.choose()
    costs = executor.weigh(loss)
    sites = {site.leaf: site for site in executor.sites}
    totals = {}
    for step in steps:
        found = executor.moments(step)[0]
        totals |= {sites[part.leaf].name(part): found for part in step.parts}
    named = {sites[part.leaf].name(part): costs.get(part_key(part)) for step in steps for part in step.parts}
    return totals, named


@pytest.fixture(scope="module")
def oracle(case):
    return [squares(case[0], x) for (x,) in case[1]]


def test_costs_are_sums_of_squared_gradients(weighed, oracle):
    expected = {name: sum(batch[name].sum() for batch in oracle) for name in oracle[0]}
    expected["shared"] = expected.pop("first") + expected.pop("second")
    outputs = {name: HIDDEN if name in ("up", "gate") else WIDTH for name in expected}
    found = weighed[1]
    assert found.pop("cell", None) is None  # inside a scan that is not unrolled
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value / outputs[name], rtol=1e-4, err_msg=name)


def test_tokens_of_a_step_are_weighted_alike_by_all_of_its_outputs(case, weighed, oracle):
    rows = [np.asarray(x).reshape(-1, WIDTH) for (x,) in case[1]]
    expected = hessian(rows, [batch["up"] + batch["gate"] for batch in oracle])
    for name in ("up", "gate"):
        np.testing.assert_allclose(weighed[0][name].total, expected, rtol=1e-4, atol=1e-4)


def test_calls_that_share_a_leaf_are_weighted_against_each_other(case, weighed, oracle):
    rows, weights = [], []
    for (x,), batch in zip(case[1], oracle, strict=True):
        p = case[0]
        x = x + (jnp.tanh(x @ p["gate"]) * jnp.einsum("oi,bti->bto", p["up"], x)) @ p["down"]
        rows += [jnp.sin(x), jnp.cos(x + jnp.sin(x) @ p["shared"])]
        weights += [batch["first"], batch["second"]]
    expected = hessian([np.asarray(row).reshape(-1, WIDTH) for row in rows], weights)
    np.testing.assert_allclose(weighed[0]["shared"].total, expected, rtol=1e-4, atol=1e-4)


def test_each_layer_of_a_stack_has_its_own_weights(case, weighed, oracle):
    rows = [[] for _ in range(DEPTH)]
    for (x,) in case[1]:
        p = case[0]
        x = x + (jnp.tanh(x @ p["gate"]) * jnp.einsum("oi,bti->bto", p["up"], x)) @ p["down"]
        x = x + jnp.sin(x) @ p["shared"]
        x = x + jnp.cos(x) @ p["shared"]
        for layer in range(DEPTH):
            rows[layer].append(np.asarray(x).reshape(-1, WIDTH))
            x = x + jnp.tanh(x @ p["layers"][layer])
    for layer in range(DEPTH):
        name = f"layers[{layer}]"
        expected = hessian(rows[layer], [batch[name] for batch in oracle])
        np.testing.assert_allclose(weighed[0][name].total, expected, rtol=1e-4, atol=1e-4)


def test_inside_a_scan_tokens_count_alike(case, weighed):
    plain = Executor(network, *case)
    *_, step = plain.choose()
    np.testing.assert_array_equal(weighed[0]["cell"].total, plain.moments(step)[0].total)


def test_tokens_that_the_loss_does_not_see_do_not_count():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((64, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)

    def first_half(outputs, inputs):
        return jnp.sum(outputs[:32])

    grid = Grid(bits=3, group_size=8)
    _, half = jgptq.quantize(lambda w, x: x @ w, w, [(x[:32],)], grid=grid, quality="fast")
    _, seen = jgptq.quantize(lambda w, x: x @ w, w, [(x,)], grid=grid, quality="fast", loss=first_half)
    _, every = jgptq.quantize(lambda w, x: x @ w, w, [(x,)], grid=grid, quality="fast")
    assert half.rows[0].loss == pytest.approx(seen.rows[0].loss, rel=1e-3)
    assert half.rows[0].loss != pytest.approx(every.rows[0].loss, rel=1e-2)


def test_drifts_are_weighted_too(case):
    params, batches = case
    executor = Executor(network, params, batches, follow_float=True)
    steps = executor.choose()
    executor.weigh(loss)
    moved = {}
    for step in steps[:2]:
        found = executor.moments(step)
        moved |= {executor.sites[part.leaf].path: found for part in step.parts}
        for part in step.parts:
            executor.replace(part, 0.9 * executor.float_leaf(part.leaf, part.index))
    drift = moved["down"][1]
    inputs, residual = np.zeros((HIDDEN, HIDDEN)), np.zeros((HIDDEN, WIDTH))
    weights = [squares(params, x)["down"] for (x,) in batches]
    mean = np.concatenate(weights).mean()
    for (x,), weight in zip(batches, weights, strict=True):
        up, gate = (jnp.einsum("oi,bti->bto", params["up"], x), x @ params["gate"])
        exact = np.asarray(jnp.tanh(gate) * up, np.float64).reshape(-1, HIDDEN)
        own = np.asarray(jnp.tanh(0.9 * gate) * 0.9 * up, np.float64).reshape(-1, HIDDEN)
        inputs += np.einsum("t,ti,tj->ij", weight / mean, own, exact - own)
    np.testing.assert_allclose(drift.inputs, inputs, rtol=1e-3, atol=1e-4)
    (found,) = drift.residuals.values()  # the stream is the function's input, the same for both
    np.testing.assert_array_equal(found, residual)


def test_a_loss_is_one_number(case):
    with pytest.raises(ValueError, match=r"loss\(outputs, inputs\) gave float32 of shape \(5, 2, 6\)"):
        jgptq.quantize(network, *case, loss=lambda outputs, inputs: outputs)


def test_a_loss_that_is_not_finite_is_refused(case):
    with pytest.raises(ValueError, match="gradients of the loss contain NaN"):
        jgptq.quantize(network, *case, loss=lambda outputs, inputs: jnp.sum(outputs) * jnp.nan)


def test_next_token_loss():
    logits = np.random.default_rng(2).standard_normal((2, 4, 5)).astype(np.float32)
    tokens = np.array([[0, 1, 2, 3], [4, 4, 0, 1]])
    exact = logits.astype(np.float64)
    scores = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    expected = -sum(scores[row, at, tokens[row, at + 1]] for row in range(2) for at in range(3))
    assert float(jgptq.next_token_loss(jnp.asarray(logits), (tokens,))) == pytest.approx(expected, rel=1e-5)
