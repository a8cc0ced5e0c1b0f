"""Functions that broke tracing, calibration or serving once: each is quantized, served, and compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jgptq
from jgptq import GPTQ, Grid, Options, QuantizedTensor
from jgptq.executor import Executor

# What these tests are about is the same at every quality.
quantize = functools.partial(jgptq.quantize, quality="fast")

GRID = Grid(bits=4, group_size=8)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def dense(params):
    packed = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if packed(leaf) else leaf, params, is_leaf=packed)


def scanned(scale):
    return lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, scale(p["w"]))[0]


def looped(p, x):
    w = p["w"] * 0.5
    for layer in range(3):
        x = jnp.tanh(x @ w[layer])
    return x


def blocks(p, x):
    def block(c, pair):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), c, pair)[0], None

    return lax.scan(block, x, p["w"].reshape(2, 2, 16, 16))[0]


def heads(p, x):
    return [jnp.einsum("bi,ihd->bhd", x, w) for w in (p["w"][:, :2], p["w"][:, 2:3], p["w"][:, 3:])]


def halves_of_experts(p, x):
    return [jnp.einsum("eti,eio->eto", x.reshape(2, -1, 16), w) for w in jnp.split(p["w"], 2)]


def vmapped_convolution(p, x):
    def one(w):
        return lax.conv_general_dilated(x.reshape(-1, 16, 2), w, (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW"))

    return jax.vmap(one)(p["w"])


def cast_and_scaled(p, x):
    return x.astype(jnp.float16) @ (jnp.round(p["w"] * 100) * 2e-4).astype(jnp.float16)


CASES = {  # function, shape of w, rows of the report
    "a scaled stack in a scan": (scanned(lambda w: w * 0.5), (3, 16, 16), 3),
    "a stack scaled layer by layer": (scanned(lambda w: w * jnp.arange(1.0, 4.0)[:, None, None]), (3, 16, 16), 3),
    "a shifted stack in a scan": (scanned(lambda w: w + 0.1), (3, 16, 16), 3),
    "a scaled stack in a loop": (looped, (3, 16, 16), 3),
    "blocks of layers": (blocks, (4, 16, 16), 4),
    "a single head among several": (heads, (16, 4, 8), 3),
    "heads of a reshaped kernel": (lambda p, x: heads({"w": p["w"].reshape(16, 4, 8)}, x), (16, 32), 3),
    "halves of a batch of experts": (halves_of_experts, (4, 16, 8), 2),
    "one role in two factorizations": (
        lambda p, x: x @ p["w"] + jnp.einsum("bi,ijk->bjk", x, p["w"].reshape(16, 4, 2)).reshape(-1, 8),
        (16, 8),
        1,
    ),
    "a convolution vmapped over its weights": (vmapped_convolution, (3, 4, 16, 3), None),
    "a cast that rounds": (lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32), (16, 8), 1),
    "a cast to float8": (lambda p, x: x @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32), (16, 8), 1),
    "a small factor in float16": (lambda p, x: x.astype(jnp.float16) @ (p["w"] * 2e-6).astype(jnp.float16), (16, 8), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_quantized_function_is_the_function_on_dequantized_weights(name):
    f, shape, rows = CASES[name]
    params = {"w": normal(*shape) / 4}
    if "float16" in name:
        params = {"w": params["w"] * 1e6}  # beyond float16 by itself
    x = normal(64, 16, seed=1)
    packed, report = quantize(f, params, [x], grid=Grid(bits=4, group_size=8, scale_dtype="float32"), method="rtn")
    assert rows is None or len(report.rows) == rows
    for got, want in zip(
        jax.tree.leaves(jax.jit(jgptq.quantized(f))(packed, x)), jax.tree.leaves(f(dense(packed), x)), strict=True
    ):
        assert bool(jnp.all(jnp.isfinite(want)))
        tolerance = 2e-2 if got.dtype == jnp.float16 else 2e-5
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["a scaled stack in a scan", "blocks of layers"])
def test_no_dequantized_stack(name):
    f, shape, _ = CASES[name]
    packed, _ = quantize(f, {"w": normal(*shape)}, [normal(64, 16)], grid=GRID, method="rtn")
    text = str(jax.make_jaxpr(jgptq.quantized(f))(packed, normal(64, 16)))
    assert f"f32[{','.join(map(str, shape))}]" not in text


def test_a_whole_leaf_that_is_a_scans_start_is_replaced_before_it():
    def f(p, x):
        c = lax.scan(lambda c, t: (jnp.tanh(c @ p["u"] + t.mean()), None), p["m"], x)[0]
        return x @ p["m"] + c.sum()

    params, rules = {"m": normal(16, 16), "u": normal(16, 16, seed=2) / 4}, [("m", Options(tied=True))]
    x = normal(32, 16)
    packed, report = quantize(f, params, [x], grid=GRID, method="rtn", rules=rules)
    assert [row.path for row in report.rows] == ["m", "u"]
    np.testing.assert_allclose(jgptq.quantized(f)(packed, x), f(dense(packed), x), atol=1e-4, rtol=1e-4)


def test_a_scaled_stack_is_read_layer_by_layer():
    executor = Executor(looped, {"w": normal(3, 16, 16)}, [normal(64, 16)])
    steps = executor.choose()
    assert [step.parts[0].index[0] for step in steps] == [(0, 1), (1, 2), (2, 3)]
    assert {index[0] for _, index in executor._streams[0].graph.parts.values() if index[0] != (0, 3)} == {
        (0, 1),
        (1, 2),
        (2, 3),
    }
    used = executor._streams[0].graph.last_use
    assert all(index[0] != (0, 3) for var, (_, index) in executor._streams[0].graph.parts.items() if var in used)


def test_leaves_that_are_no_weights():
    def f(p, x):
        return x @ p["w"] + jax.random.normal(p["key"], (8,))[None] * (1.0 if p["train"] else 0.0)

    params = {"w": normal(16, 8), "key": jax.random.key(0), "train": False}
    packed, report = quantize(f, params, [normal(32, 16)], grid=GRID, method="rtn")
    assert [row.path for row in report.rows] == ["w"]
    np.testing.assert_allclose(jgptq.quantized(f)(packed, normal(4, 16)), f(dense(packed), normal(4, 16)), atol=1e-5)


def test_the_same_product_twice_counts_once():
    f = lambda p, x: x @ p["w"] + jnp.sin(x @ p["w"])  # noqa: E731
    with pytest.warns(jgptq.QuantizationWarning, match="saw 10 tokens"):
        _, report = quantize(f, {"w": normal(16, 8)}, [normal(10, 16)], grid=GRID)
    assert report.rows[0].tokens == 10


def test_a_choice_by_platform_is_left_to_jax():
    def f(p, x):
        def other(x, w):
            raise AssertionError

        return lax.platform_dependent(x, p["w"], default=jnp.matmul) + x @ p["w"]

    packed, _ = jgptq.rtn(normal(16, 8), GRID)
    x = normal(4, 16)
    served = jax.jit(jgptq.quantized(f))({"w": packed}, x)
    np.testing.assert_allclose(served, f({"w": packed.dequantize()}, x), atol=1e-5)


def test_a_lookup_in_a_stack_of_one():
    table, _ = quantize(lambda p, x: x @ p.T, normal(10, 16), [normal(32, 16)], grid=GRID, method="rtn")
    stack = jax.tree.map(lambda array: array[None], table)
    got = jgptq.quantized(lambda p, i: p[0][i])(stack, jnp.array([1, 2]))
    np.testing.assert_array_equal(got, table.dequantize()[jnp.array([1, 2])])


def test_finished_weights_of_other_settings_are_refused():
    f, shape, _ = CASES["a shifted stack in a scan"]
    params, x = {"w": normal(*shape)}, normal(40, 16)
    finished = {}
    quantize(f, params, [x], grid=Grid(bits=8, group_size=8, symmetric=True), method="rtn", finished=finished)
    for grid in (Grid(bits=8, group_size=8), Grid(bits=4, group_size=8, symmetric=True), Grid(bits=8, group_size=4)):
        with pytest.raises(ValueError, match=r"finished\['w\[0\]'\] is a QuantizedTensor.* remove it"):
            quantize(f, params, [x], grid=grid, method="rtn", finished={"w[0]": finished["w[0]"]})


def test_slices_that_would_be_permuted_differently_are_refused_before_any_work():
    def f(p, x):
        return (x @ p["w"][:, :8]).sum() + jnp.sin(3 * x) @ p["w"][:, 8:]

    rows = []
    with pytest.raises(ValueError, match=r'w is used through slices that see different inputs.*use act_order="group"'):
        quantize(
            f,
            {"w": normal(16, 16)},
            [normal(40, 16)],
            grid=GRID,
            method=GPTQ(act_order=True),
            progress=lambda *row: rows.append(row),
        )
    assert not rows


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


def test_an_nnx_module_that_changes_its_state():
    model, x = Stateful(nnx.Rngs(0)), normal(64, 16)
    before = jax.tree.map(lambda leaf: leaf, nnx.state(model, nnx.BatchStat))
    packed, _ = quantize(model, [x], grid=GRID, method="rtn")
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.BatchStat))))
    served = jgptq.quantized(packed)
    served(x)
    assert not np.array_equal(served.model.norm.mean.get_value(), model.norm.mean.get_value())


def test_an_nnx_module_that_changes_nothing_serves_under_plain_jax():
    model, x = Stateful(nnx.Rngs(0)), normal(64, 16)
    model.eval()
    served = jgptq.quantized(quantize(model, [x], grid=GRID, method="rtn")[0])
    expected = served(x)
    np.testing.assert_allclose(jax.jit(lambda x: served(x))(x), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda row: served(row[None])[0])(x), expected, atol=1e-5)
    assert jax.grad(lambda x: served(x).sum())(x).shape == x.shape


def test_an_nnx_recurrent_network():
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(16, 16, rngs=rngs))
            self.out = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(self.rnn(x))

    model, x = Recurrent(nnx.Rngs(0)), normal(4, 12, 16)
    packed, report = quantize(model, [x], grid=GRID)
    assert len(report.rows) == 9
    assert all(row.relative_error < row.rtn_error for row in report.rows)
    assert jgptq.quantized(packed)(x).shape == (4, 12, 4)
