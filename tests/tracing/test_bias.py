"""Bias correction: mean outputs over calibration are the float model's, wherever the bias stands; others stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import AWQ, GPTQ, Grid, QuantizedTensor, Targets
from jgptq.solvers.bias import bias_correction

WIDTH, HIDDEN = 16, 24
GRID = Grid(bits=2, group_size=8)


def pre_activations(p, x):
    """The result of every product with its bias added, by name; and x through all of them."""
    found = {}
    found["heads"] = jnp.einsum("bti,iho->btho", x, p["heads"]) + p["heads_bias"]
    x = x + jnp.tanh(found["heads"]).reshape(*x.shape[:2], WIDTH)
    found["left"] = jnp.einsum("oi,bti->obt", p["left"], x) + p["left_bias"][:, None, None]
    hidden = jax.nn.relu(found["left"]).transpose(1, 2, 0).reshape(-1, HIDDEN)
    # Added before the residual stream, and the stream before the bias.
    found["down"] = p["down_bias"] + (hidden @ p["down"]).reshape(x.shape)
    x = x + found["down"]

    def layer(x, p):
        y = x @ p["kernel"] + p["bias"]
        return x + jnp.sin(y), y

    x, stacked = jax.lax.scan(layer, x, p["layers"])
    found["layers[0]"], found["layers[1]"] = stacked
    found["shared"] = x @ p["shared"] + p["shared_bias"]
    found["scale"] = x @ p["scale"] + p["scale_bias"]
    return found, found["shared"] + jnp.sin(found["scale"]) * p["scale_bias"] + p["shared_bias"]


def network(p, x):
    return pre_activations(p, x)[1]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32)

    params = {
        "heads": normal(WIDTH, 4, 4),
        "heads_bias": normal(4, 4),
        "left": normal(HIDDEN, WIDTH),
        "left_bias": normal(HIDDEN),
        "down": normal(HIDDEN, WIDTH),
        "down_bias": normal(WIDTH),
        "layers": {"kernel": normal(2, WIDTH, WIDTH), "bias": normal(2, WIDTH)},
        "shared": normal(WIDTH, WIDTH),
        "shared_bias": normal(WIDTH),
        "scale": normal(WIDTH, WIDTH),
        "scale_bias": normal(WIDTH),
    }
    batches = [(0.5 + normal(2, 8, WIDTH),), (0.5 + normal(2, 8, WIDTH),)]
    with jax.numpy_rank_promotion("allow"):
        yield params, batches


def means(params, batches):
    """Of each output, over all tokens."""
    is_packed = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    params = jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)
    rows = {}
    for (x,) in batches:
        for name, value in pre_activations(params, x)[0].items():
            value = np.asarray(value, np.float64)
            value = value.reshape(HIDDEN, -1).T if name == "left" else value.reshape(-1, WIDTH)
            rows.setdefault(name, []).append(value)
    return {name: np.concatenate(values).mean(axis=0) for name, values in rows.items()}


@pytest.mark.parametrize("targets", [None, Targets()], ids=["plain", "targets"])
def test_mean_outputs_are_the_float_models(case, targets):
    params, batches = case
    method = GPTQ(scale_search=None, sweeps=0, targets=targets, bias_correction=True)
    packed, _ = jgptq.quantize(network, params, batches, grid=GRID, method=method)
    exact, found = means(params, batches), means(packed, batches)
    for name in ("heads", "left", "down", "layers[0]", "layers[1]"):
        np.testing.assert_allclose(found[name], exact[name], atol=2e-5, err_msg=name)
    # Biases that are used elsewhere too stay as they are.
    for name in ("shared", "scale"):
        np.testing.assert_array_equal(packed[f"{name}_bias"], params[f"{name}_bias"])
        assert abs(found[name] - exact[name]).max() > 1e-3


def test_awq_corrects_biases_if_its_solver_is_to(case):
    params, batches = case
    method = GPTQ(scale_search=None, sweeps=0, targets=None, bias_correction=True)
    exact = means(params, batches)
    for solver, least, most in ((method, 0.0, 2e-3), (dataclasses.replace(method, bias_correction=False), 1e-2, 10.0)):
        packed, _ = jgptq.quantize(network, params, batches, grid=GRID, method=AWQ(solver=solver))
        found = means(packed, batches)
        # Not "left", which takes the scales of what it becomes; float16 rounds its own scales once more for that.
        for name in ("heads", "down", "layers[0]", "layers[1]"):
            assert least <= abs(found[name] - exact[name]).max() < most, name


def test_without_it_no_bias_changes_and_means_do(case):
    params, batches = case
    packed, _ = jgptq.quantize(network, params, batches, grid=GRID, quality="fast")
    for name in ("heads_bias", "left_bias", "down_bias"):
        assert packed[name] is params[name]
    exact, found = means(params, batches), means(packed, batches)
    assert min(abs(found[name] - exact[name]).max() for name in ("heads", "left", "down")) > 1e-3


def test_a_run_taken_up_again_corrects_alike(case):
    params, batches = case
    method = GPTQ(scale_search=None, sweeps=0, targets=None, bias_correction=True)
    finished = {}
    first, _ = jgptq.quantize(network, params, batches, grid=GRID, method=method, finished=finished)
    for name in list(finished)[-2:]:
        del finished[name]
    again, _ = jgptq.quantize(network, params, batches, grid=GRID, method=method, finished=finished)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_bias_beside_the_weight_it_is_the_start_of_is_no_bias():
    """What is added to a product's result is no bias if it is an input, an output as well, or one number for all."""
    rng = np.random.default_rng(1)
    w, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 4), (4,)))
    x = jnp.asarray(rng.standard_normal((32, 8)) + 1, jnp.float32)
    method = GPTQ(scale_search=None, sweeps=0, targets=None, bias_correction=True)
    for f, bias in (
        (lambda p, x: x @ p["w"] + p["b"][:1], b),
        (lambda p, x: (x @ p["w"] + jnp.broadcast_to(p["b"], (32, 4)), p["b"]), b),
        (lambda p, x: x @ p["w"] + jnp.sin(p["b"])[None], b),
        (lambda p, x: x @ p["w"] + p["b"], jnp.broadcast_to(b, (32, 4))),
    ):
        with jax.numpy_rank_promotion("allow"):
            packed, _ = jgptq.quantize(f, {"w": w, "b": bias}, [(x,)], grid=Grid(bits=2, group_size=8), method=method)
        np.testing.assert_array_equal(packed["b"], bias)


def test_bias_correction_against_float64():
    rng = np.random.default_rng(2)
    w, q = rng.standard_normal((2, 6, 3))
    x, float_x = rng.standard_normal((2, 50, 6))
    expected = (float_x @ w).mean(axis=0) - (x @ q).mean(axis=0)
    arrays = (jnp.asarray(a, jnp.float32) for a in (w, q, x.mean(axis=0), float_x.mean(axis=0)))
    np.testing.assert_allclose(bias_correction(*arrays), expected, atol=1e-6)
