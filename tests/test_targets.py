"""Solving towards the float model's outputs: what the executor measures of both models, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jgptq
from jgptq.executor import Executor
from jgptq.solvers import targets
from jgptq.tracing.graph import trace

WIDTH, HIDDEN, DEPTH = 16, 24, 3
GRID = jgptq.Grid(bits=3, group_size=8)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def layer(x, up, down):
    return x + jnp.tanh(x @ up) @ down


def looped(params, x):
    for up, down in zip(params["up"], params["down"], strict=True):
        x = layer(x, up, down)
    return x


def scanned(params, x):
    return lax.scan(lambda x, p: (layer(x, p["up"], p["down"]), None), x, params)[0]


@pytest.fixture(scope="module")
def params():
    return {"up": 0.3 * normal(0, DEPTH, WIDTH, HIDDEN), "down": 0.3 * normal(1, DEPTH, HIDDEN, WIDTH)}


def batches(count=3, seed=7):
    return [normal(seed + k, 40, WIDTH) for k in range(count)]


def added(f, *arguments):
    """For each weight, the values added to its product that are known before it."""
    sites = trace(f, *arguments).sites
    return [len(read.added) for site in sites for part in site.parts for read in part.reads]


def heads(p, x):
    """Two axes contracted, and the sum with the axes turned round and back."""
    y = jnp.einsum("thd,hdo->to", x.reshape(5, 2, 8), p.reshape(2, 8, 16))
    return (x.T + y.T).T


CASES = {
    "residual": (lambda w, x: x + x @ w, 1),
    "with a bias": (lambda p, x: (x @ p["w"] + p["b"][None]) + x, 1),
    "in another dtype": (lambda w, x: x + (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), 1),
    "weight on the left": (lambda w, x: x + (w.T @ x.T).T, 1),
    "heads": (heads, 1),
    "two sums": (lambda w, x: (lambda s: (x @ w + s) + x)(jnp.sin(x)), 2),
    "no sum": (lambda w, x: jnp.tanh(x @ w), 0),
    "after a function": (lambda w, x: x + jnp.tanh(x @ w), 0),
    "read twice": (lambda w, x: (lambda y: x + y * jnp.sin(y))(x @ w), 0),
    "of what comes later": (lambda w, x: (lambda y: y + jnp.cos(y))(x @ w), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_residual_stream_is_seen(name):
    f, count = CASES[name]
    w = normal(0, 16, 16)
    argument = {"w": w, "b": normal(1, 16)} if name == "with a bias" else w
    assert added(f, argument, normal(2, 5, 16)) == [count]


@pytest.mark.parametrize("name", ["residual", "weight on the left", "heads", "in another dtype"])
def test_what_is_added_is_seen_as_the_products_outputs(name):
    """An added value's rows, plus the product of rows and matrix, are the rows of the function's result."""
    f, _ = CASES[name]
    w, x = normal(0, 16, 16), normal(2, 5, 16)
    (read,) = (read for site in trace(f, w, x).sites for part in site.parts for read in part.reads)
    (value,) = read.added
    rows = value.outputs.rows(x)
    np.testing.assert_allclose(rows, x, rtol=1e-6)


@pytest.fixture(scope="module")
def both_models(params):
    """Moments of the last layer's weights with earlier layers quantized, and both models' activations in NumPy."""
    data = batches()
    packed, _ = jgptq.quantize(looped_list, as_list(params), data, grid=GRID, method="rtn")
    executor = Executor(looped_list, as_list(params), data, follow_float=True)
    found = []
    for step in executor.choose():
        found.append(executor.moments(step))
        for part in step.parts:
            leaf = jax.tree.leaves(packed, is_leaf=lambda leaf: isinstance(leaf, jgptq.QuantizedTensor))[part.leaf]
            executor.replace(part, leaf.dequantize())
    dense = [leaf.dequantize() for leaf in packed]
    return found, np.concatenate(data).astype(np.float64), [np.asarray(leaf, np.float64) for leaf in dense]


def as_list(params):
    return [matrix for pair in zip(params["up"], params["down"], strict=True) for matrix in pair]


def looped_list(matrices, x):
    for up, down in zip(matrices[::2], matrices[1::2], strict=True):
        x = layer(x, up, down)
    return x


def test_the_drift_of_each_weights_inputs_and_of_its_residual_stream(params, both_models):
    found, x, dense = both_models
    floats = [np.asarray(leaf, np.float64) for leaf in as_list(params)]
    own, theirs = x, x
    assert found[0][1] is None  # nothing was quantized yet
    for number in range(DEPTH):
        for side in (0, 1):
            hessian, drift = found[2 * number + side]
            inputs = own if side == 0 else np.tanh(own @ dense[2 * number])
            float_inputs = theirs if side == 0 else np.tanh(theirs @ floats[2 * number])
            np.testing.assert_allclose(hessian.total, inputs.T @ inputs, rtol=2e-4, atol=1e-3)
            if drift is None:
                continue
            np.testing.assert_allclose(drift.inputs, inputs.T @ (float_inputs - inputs), atol=2e-3)
            assert list(drift.residuals) == ([0] if side else [])
            if side:
                np.testing.assert_allclose(drift.residuals[0], inputs.T @ (theirs - own), atol=2e-3)
        own = own + np.tanh(own @ dense[2 * number]) @ dense[2 * number + 1]
        theirs = theirs + np.tanh(theirs @ floats[2 * number]) @ floats[2 * number + 1]


def test_the_target_is_the_formula_in_float64(both_models):
    hessian, drift = both_models[0][-1]
    w = normal(5, HIDDEN, WIDTH)
    correction = targets.corrections(hessian, jax.tree.map(jnp.copy, drift), 0.05)  # which are donated
    target = targets.moved(w, correction.inputs, correction.residuals[0], jnp.array([0.75, 0.5]))
    h = np.asarray(hessian.total, np.float64)
    damped = h + 0.05 * np.mean(np.diagonal(h)) * np.eye(HIDDEN)
    sums = 0.75 * np.asarray(drift.inputs, np.float64) @ np.asarray(w) + 0.5 * np.asarray(drift.residuals[0])
    np.testing.assert_allclose(target, w + np.linalg.solve(damped, sums), rtol=1e-3, atol=1e-5)


def output_error(f, params, packed):
    x = jnp.concatenate(batches(seed=90))
    return float(jnp.sum((jgptq.quantized(f)(packed, x) - f(params, x)) ** 2))


def method(**strengths):
    return jgptq.GPTQ(scale_search=None, sweeps=0, targets=jgptq.Targets(**strengths))


def test_targets_bring_the_model_closer_to_the_float_one(params):
    errors = [
        output_error(looped, params, jgptq.quantize(looped, params, batches(), grid=GRID, method=chosen)[0])
        for chosen in (method(inputs=0.0, residual=0.0), method(inputs=0.75, residual=0.0), method())
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.95 * errors[1]


def test_a_scan_over_layers_is_solved_towards_the_same_as_a_loop(params):
    from_loop, loop_report = jgptq.quantize(looped, params, batches(), grid=GRID, method=method())
    from_scan, scan_report = jgptq.quantize(scanned, params, batches(), grid=GRID, method=method())
    for key in params:
        codes = [np.asarray(jgptq.tensor.unpack_codes(packed[key])) for packed in (from_loop, from_scan)]
        assert np.mean(codes[0] != codes[1]) < 0.01  # float32 sums in another order: near ties
    assert [row.path for row in loop_report.rows] == [row.path for row in scan_report.rows]


def routed(params, x):
    """Two experts for three of a token's: the router's choice decides which rows meet which weights."""
    x = x + x @ params["before"]
    scores, choice = lax.top_k(x @ params["router"], 1)
    order = jnp.argsort(choice[:, 0])
    sizes = jnp.bincount(choice[:, 0], length=2)
    y = lax.ragged_dot(x[order], params["experts"], sizes.astype(jnp.int32))
    return x + scores * jnp.zeros_like(y).at[order].set(y)


def test_experts_see_the_same_tokens_in_both_models():
    """The float model's rows are those of the tokens that the quantized one's router chose."""
    params = {"before": normal(3, WIDTH, WIDTH), "router": normal(4, WIDTH, 2), "experts": normal(5, 2, WIDTH, WIDTH)}
    data = batches(count=2)
    executor = Executor(routed, params, data, follow_float=True)
    sites = {site.path: site for site in executor.sites}
    first, *_, last = executor.choose([sites["before"].leaf, sites["experts"].leaf])
    (part,) = first.parts
    executor.moments(first)
    rough = jnp.round(params["before"])
    executor.replace(part, rough)
    hessian, drift = executor.moments(last)

    x = np.concatenate(data).astype(np.float64)
    own, theirs = (x + x @ np.asarray(w, np.float64) for w in (rough, params["before"]))
    router = np.asarray(params["router"], np.float64)
    choice = np.argmax(own @ router, axis=1)
    assert (choice != np.argmax(theirs @ router, axis=1)).sum() > 3  # the models disagree about some tokens
    for expert in range(2):
        rows, float_rows = own[choice == expert], theirs[choice == expert]
        np.testing.assert_allclose(hessian.total[expert], rows.T @ rows, rtol=1e-3, atol=2e-2)
        np.testing.assert_allclose(drift.inputs[expert], rows.T @ (float_rows - rows), rtol=1e-3, atol=2e-2)


def test_an_interrupted_run_ends_with_the_same_targets(params):
    finished = {}
    whole, _ = jgptq.quantize(looped, params, batches(), grid=GRID, method=method(), finished=finished)
    some = dict(list(finished.items())[:3])
    again, _ = jgptq.quantize(looped, params, batches(), grid=GRID, method=method(), finished=some)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize("options", [{"inputs": 1.5}, {"residual": -0.1}, {"ridge": 0.0}])
def test_bad_strengths_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        jgptq.Targets(**options)


@pytest.mark.parametrize(("quality", "most"), [("fast", 0.95), ("balanced", 0.4), ("best", 0.4)])
def test_each_quality_is_closer_than_rounding(params, quality, most):
    packed, _ = jgptq.quantize(looped, params, batches(), grid=GRID, quality=quality)
    rounded, _ = jgptq.quantize(looped, params, batches(), grid=GRID, method=jgptq.RTN())
    assert output_error(looped, params, packed) < most * output_error(looped, params, rounded)


def test_an_unknown_quality_is_named(params):
    with pytest.raises(ValueError, match=r"quality='better'; choose one of \('fast', 'balanced', 'best'\)"):
        jgptq.quantize(looped, params, batches(), quality="better")
