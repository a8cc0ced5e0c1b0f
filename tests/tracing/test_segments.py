"""Programs: which runs of equations may share one, and what a stream of batches holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jgptq.executor import Executor
from jgptq.tracing.graph import trace
from jgptq.tracing.segments import segment

X = jnp.ones((4, 4))


def program(f, *inputs):
    graph = trace(lambda _, *inputs: f(*inputs), {}, *inputs)
    return segment(graph, 0, len(graph.equations), set(graph.outputs)).program


def noise(seed, impl="threefry2x32"):
    return lambda x: x + jax.random.normal(jax.random.key(seed, impl=impl), (4, 4))


def partitionable(flag):
    def f(x):
        with jax.threefry_partitionable(flag):
            return noise(0)(x)

    return f


def through_scan(array):
    return lambda x: lax.scan(lambda carry, row: (carry + array, row), x[0], x)[0]


EQUAL = {
    "other arguments": (lambda x: jnp.sin(x) * 2, lambda y: jnp.sin(y) * 2),
    "constants closed over are inputs": (through_scan(np.arange(4.0)), through_scan(np.ones(4))),
    "jitted and not": (jax.jit(jnp.sin), jnp.sin),
}
DIFFERENT = {
    "literals": (lambda x: x * 2, lambda x: x * 3),
    "signs of zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "dtypes": (lambda x: x.astype(jnp.int32), lambda x: x.astype(jnp.int16)),
    "options": (lambda x: lax.cumsum(x), lambda x: lax.cumsum(x, reverse=True)),
    "precision": (lambda x: jnp.dot(x, x), lambda x: jnp.dot(x, x, precision="highest")),
    "fill values": (
        lambda x: x.at[X[0].astype(int)].get(mode="fill", fill_value=3),
        lambda x: x.at[X[0].astype(int)].get(mode="fill", fill_value=7),
    ),
    "branches": (
        lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
        lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.tan, x),
    ),
    "bodies with a custom rule": (lambda x: lax.map(jax.nn.relu, x), lambda x: lax.map(jax.nn.relu6, x)),
    "host functions": (lambda x: jax.pure_callback(np.sin, x, x), lambda x: jax.pure_callback(np.cos, x, x)),
    "random seeds": (noise(0), noise(1)),
    "random generators": (noise(0), noise(0, "rbg")),
    "ways to generate": (partitionable(True), partitionable(False)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_runs_are_one_program(name):
    f, g = EQUAL[name]
    assert program(f, X) == program(g, X)


@pytest.mark.parametrize("name", DIFFERENT)
def test_runs_that_differ_are_two_programs(name):
    f, g = DIFFERENT[name]
    assert program(f, X) != program(g, X)


def test_weak_types_are_told_apart():
    assert program(lambda x, s: x * s, X, 2.0) != program(lambda x, s: x * s, X, jnp.float32(2))


def test_weights_cast_beforehand_are_not_held_once_a_batch():
    """Mixed precision casts all weights first: between segments only the activation may live."""

    def f(p, x):
        half = [w.astype(jnp.bfloat16) for w in p]
        for w in half:
            x = jnp.tanh(x.astype(jnp.bfloat16) @ w)
        return x @ half[4].T

    executor = Executor(f, [X] * 5, [X, X], keep_outputs=True)
    for step in executor.choose():
        executor.moments(step)
        assert all(len(values) == 1 for stream in executor._streams for values in stream._batch_values)
    for output in executor.outputs():
        np.testing.assert_array_equal(output, jax.jit(f)([X] * 5, X))


def test_outputs_that_are_views_of_weights_come_out():
    def f(p, x):
        return p["v"].T, x @ p["w"], p["v"], x

    params = {"w": X, "v": jnp.arange(6.0).reshape(2, 3)}
    executor = Executor(f, params, [X], keep_outputs=True)
    executor.moments(executor.choose()[0])
    for got, expected in zip(executor.outputs()[0], f(params, X), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_an_array_changed_in_place_across_segments_is_refused():
    def f(p, x):
        reference = jax.new_ref(jnp.zeros(4))
        reference[...] = x[0]
        return x @ p[0] @ p[1] + reference[...][None]

    executor = Executor(f, [X, X], [X])
    with pytest.raises(ValueError, match=r"changes an array in place \(jax.new_ref\).*return the new value instead"):
        executor.moments(executor.choose()[1])
