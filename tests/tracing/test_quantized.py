"""quantized(f) against f on the dequantized parameters: values, derivatives and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import Grid, QuantizedTensor

GRID = Grid(bits=4, group_size=8)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 4, dtype)


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


X = normal(5, 16, seed=1)


@pytest.fixture(scope="module")
def params():
    return {"w": jgptq.rtn(normal(16, 16), GRID)[0], "b": normal(16, seed=2)}


@jax.custom_vjp
def doubled_gradient(x, w):
    return jnp.tanh(x @ w)


doubled_gradient.defvjp(lambda x, w: (doubled_gradient(x, w), w), lambda w, g: (2 * g @ w.T, 0 * w))


@jax.custom_jvp
def tripled_tangent(x, w):
    return x @ w


tripled_tangent.defjvp(lambda primals, tangents: (tripled_tangent(*primals), 3 * tangents[0] @ primals[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(factor, x, w):
    return factor * (x @ w)


scaled.defvjp(lambda factor, x, w: (scaled(factor, x, w), w), lambda factor, w, g: (-g @ w.T, 0 * w))

DIFFERENTIATED = {
    "custom_vjp": lambda p, x: doubled_gradient(x, p["w"]) + p["b"][None],
    "custom_vjp with a static argument": lambda p, x: scaled(3.0, x, p["w"]),
    "custom_jvp": lambda p, x: tripled_tangent(x, p["w"].T),
    "custom_vjp in remat": lambda p, x: jax.checkpoint(doubled_gradient)(x, p["w"]),
    "remat, a choice for each operand": lambda p, x: jax.checkpoint(
        lambda w, b, x: jnp.sin(x @ w + b[None]), prevent_cse=(True, False, True)
    )(p["w"], p["b"], x),
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_follow_the_authors_rules(name, params):
    f = DIFFERENTIATED[name]

    def value_and_grad(f, params):
        return jax.value_and_grad(lambda x: jnp.sum(f(params, x)))(X)

    got = jax.jit(functools.partial(value_and_grad, jgptq.quantized(f)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, value_and_grad(f, dense(params)))


def test_a_custom_rule_keeps_the_weight_packed_in_the_forward_pass(params):
    text = str(jax.make_jaxpr(lambda p, x: jgptq.quantized(DIFFERENTIATED["custom_vjp"])(p, x))(params, X).eqns[0])
    assert "u32" in text


def test_a_product_in_bfloat16_summed_to_float32_is_not_rounded_to_bfloat16(params):
    def f(p, x):
        return jnp.dot(x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    got = jgptq.quantized(f)(params, X)
    x, w = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (X, dense(params)["w"]))
    np.testing.assert_allclose(got, x @ w, atol=1e-5)  # bfloat16 rounding would cost 1e-3
    assert got.dtype == jnp.float32


def test_products_with_integer_and_complex_activations(params):
    def f(p, x):
        whole = jax.lax.dot_general(x.astype(jnp.int8), p["w"], (((1,), (0,)), ((), ())))
        return whole, (x * 1j) @ p["w"]

    for got, expected in zip(jgptq.quantized(f)(params, 9 * X), f(dense(params), 9 * X), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert got.dtype == expected.dtype


def test_stacks_of_packed_weights_pass_through_scan_and_vmap():
    stack = jax.vmap(lambda w: jgptq.rtn(w, GRID)[0])(normal(3, 16, 16))

    def layers(p, x):
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, p)[0]

    np.testing.assert_allclose(jgptq.quantized(layers)(stack, X), layers(stack.dequantize(), X), atol=1e-5)
    rows = jax.vmap(jgptq.quantized(lambda w, x: x @ w), in_axes=(0, None))(stack, X)
    np.testing.assert_allclose(rows, jax.vmap(lambda w: X @ w)(stack.dequantize()), atol=1e-5)


def test_a_jitted_call_traces_once_and_closes_over_tracers(params):
    traces = []

    def f(p, x):
        traces.append(1)
        return x @ p["w"]

    served = jax.jit(lambda p, c, x: jgptq.quantized(lambda p, x: c * f(p, x))(p, x))
    for c in (2.0, 3.0):
        np.testing.assert_allclose(served(params, c, X), c * (X @ dense(params)["w"]), atol=1e-5)
    assert len(traces) == 1
