"""AWQ through whole functions: where scales go, that the function stays the same, and saving the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import AWQ, GPTQ, RTN, Grid, Options, QuantizationWarning, QuantizedTensor
from jgptq.models import MODELS, LanguageModel
from jgptq.models.llama import LlamaConfig

WIDTH, HIDDEN = 16, 24
GRID = Grid(bits=4, group_size=8)
FAST = AWQ(solver=RTN())
PLAIN = GPTQ(scale_search=None, sweeps=0, targets=None)


def along(vector):
    return vector[None]


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * along(scale)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)


FACTORS = jnp.asarray(np.exp(np.random.default_rng(7).standard_normal(WIDTH)), jnp.float32)
NORM = FACTORS  # a scale that makes some inputs much larger than others
X = [(normal(40, WIDTH, seed=8) * 4,), (normal(40, WIDTH, seed=9) * 4,)]
A, B = normal(WIDTH, HIDDEN, seed=1), normal(WIDTH, HIDDEN, seed=2)
C, V = normal(HIDDEN, WIDTH, seed=3), normal(WIDTH, WIDTH, seed=4)


def layer_norm(p, x):
    y = (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
    return (y * along(p["scale"]) + along(p["bias"])) @ p["a"]


def gated(p, x):
    return (jax.nn.silu(x @ p["a"]) * (x @ p["b"])) @ p["c"]


def attention(p, x, heads=2, repeat=1):
    """Values of `heads` heads, each used by `repeat` query heads."""
    v = (x @ p["v"] + along(p["bias"])).reshape(-1, heads, WIDTH // heads)
    v = jnp.repeat(v, repeat, axis=1)
    weights = jax.nn.softmax(jnp.ones((heads * repeat, x.shape[0], x.shape[0])))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape[0], -1) @ p["o"]


def attention_in_parts(p, x, twice=False):
    """Heads one after another, and of each the first half of the queries, which see half the keys, before the rest."""
    v = (x @ p["v"] + along(p["bias"])).reshape(-1, 2, WIDTH // 2)
    half = x.shape[0] // 2

    def head(v):
        first = jnp.ones((half, half)) @ v[:half] / half
        second = jnp.ones((half, 2 * half)) @ v / half
        return jnp.concatenate([first, second * v[half:] if twice else second])

    heads = jax.lax.map(head, jnp.moveaxis(v, 1, 0))
    return jnp.moveaxis(heads, 0, 1).reshape(x.shape[0], -1) @ p["o"]


def fused(p, x):
    gate, up = jnp.split(x @ p["ab"], 2, axis=-1)
    return (jax.nn.sigmoid(gate) * up) @ p["c"]


def experts(p, x):
    hidden = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
    return jnp.einsum("etf,efd->td", hidden, p["down"])


def batched_experts(p, x):
    y = jax.nn.softmax(x[:, :3]).T[:, :, None] * x[None]
    hidden = jax.nn.sigmoid(jnp.einsum("etd,edf->etf", y, p["gate"])) * jnp.einsum("etd,edf->etf", y, p["up"])
    return jnp.sum(jnp.einsum("etf,efd->etd", hidden, p["down"]), axis=0)


def two_inputs(p, x):
    """Outputs of one leaf that see different inputs: scales of their own have no place there."""
    return rms(x, p["norm"]) @ p["ab"][:, :HIDDEN] + jnp.tanh(x) @ p["ab"][:, HIDDEN:]


def stacked(p, x):
    return jax.lax.scan(
        lambda x, layer: (x + jax.nn.relu(rms(x, layer["norm"]) @ layer["a"]) @ layer["c"], None), x, p
    )[0]


BIAS = 0.1 * normal(WIDTH, seed=5)
STACK = {
    "norm": jnp.stack([NORM, 1 / NORM]),
    "a": normal(2, WIDTH, HIDDEN, seed=11),
    "c": normal(2, HIDDEN, WIDTH, seed=12),
}
# Function, parameters, the leaves that take scales, and those whose scales stay.
CASES = {
    "norm": (lambda p, x: rms(x, p["norm"]) @ p["a"], {"norm": NORM, "a": A}, {"norm"}, set()),
    "1 + norm": (lambda p, x: rms(x, 1.0 + p["norm"]) @ p["a"], {"norm": NORM - 1, "a": A}, {"norm"}, set()),
    "norm of two": (
        lambda p, x: jnp.tanh((y := rms(x, p["norm"])) @ p["a"]) + y @ p["b"],
        {"norm": NORM, "a": A, "b": B},
        {"norm"},
        set(),
    ),
    "layer norm": (layer_norm, {"scale": NORM, "bias": BIAS, "a": A}, {"scale", "bias"}, set()),
    "gated": (gated, {"a": A, "b": B, "c": C}, {"b"}, {"a", "b"}),
    "fused": (fused, {"ab": jnp.concatenate([A, B], axis=1), "c": C}, {"ab"}, {"ab"}),
    "attention": (attention, {"v": V, "bias": BIAS, "o": V.T}, {"v", "bias"}, {"v"}),
    "attention in parts": (attention_in_parts, {"v": V, "bias": BIAS, "o": V.T}, {"v", "bias"}, {"v"}),
    "values in another way as well": (
        lambda p, x: attention_in_parts(p, x, twice=True),
        {"v": V, "bias": BIAS, "o": V.T},
        set(),
        {"v", "o"},
    ),
    "experts": (
        experts,
        {"up": normal(3, WIDTH, HIDDEN, seed=13), "down": normal(3, HIDDEN, WIDTH, seed=14)},
        {"up"},
        {"up"},
    ),
    "batched experts": (
        batched_experts,
        {
            "gate": normal(3, WIDTH, HIDDEN, seed=15),
            "up": normal(3, WIDTH, HIDDEN, seed=13),
            "down": normal(3, HIDDEN, WIDTH, seed=14),
        },
        {"up"},
        {"gate", "up"},
    ),
    "stacked": (stacked, STACK, {"norm", "a"}, set()),
    "norm used elsewhere": (
        lambda p, x: (y := rms(x, p["norm"])) @ p["a"] @ p["c"] + y,
        {"norm": NORM, "a": A, "c": C},
        {"a"},
        {"a"},
    ),
    "norm used twice": (
        lambda p, x: rms(rms(x, p["norm"]) @ p["v"], p["norm"]) @ p["a"],
        {"norm": NORM, "v": V, "a": A},
        set(),
        {"a", "v"},
    ),
    "repeated heads": (
        lambda p, x: attention(p, x, repeat=2),
        {"v": V, "bias": BIAS, "o": normal(2 * WIDTH, WIDTH)},
        set(),
        {"v", "o"},
    ),
    "residual": (
        lambda p, x: (x + x @ p["v"]) @ p["a"],
        {"v": V, "a": A},
        set(),
        {"v", "a"},
    ),
}


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


def batches(name):
    return (
        [(x * FACTORS[None],) for (x,) in X]
        if name in ("attention", "attention in parts", "gated", "fused", "experts", "batched experts", "residual")
        else X
    )


@pytest.fixture(scope="module", params=CASES)
def case(request):
    f, params, *sets = CASES[request.param]
    # Scales in float32: those of a product before are rounded once more when they take scales.
    grid = dataclasses.replace(GRID, scale_dtype="float32")
    packed, report = jgptq.quantize(f, params, batches(request.param), grid=grid, method=FAST)
    return request.param, f, params, packed, report, *sets


def test_scales_go_into_what_the_inputs_are_computed_from(case):
    _, _, params, packed, report, changed, kept = case
    assert {name for name, leaf in packed.items() if is_packed(leaf) and leaf.input_scales is not None} == kept
    floats = {name for name, leaf in packed.items() if not is_packed(leaf) and not np.array_equal(leaf, params[name])}
    assert floats == {name for name in changed if not is_packed(packed[name])}
    assert not report.notes
    assert all(row.method == "awq" for row in report.rows)
    nbytes = sum(leaf.nbytes for leaf in packed.values() if is_packed(leaf))
    assert sum(row.nbytes for row in report.rows) == nbytes


def test_folding_leaves_the_function_as_it_was(case, monkeypatch):
    """The same run with nothing folded keeps all scales at the inputs: two ways to the same function."""
    name, f, params, packed, *_ = case
    monkeypatch.setattr("jgptq.executor.Executor.folds", lambda self, step: None)
    grid = dataclasses.replace(GRID, scale_dtype="float32")
    unfolded, _ = jgptq.quantize(f, params, batches(name), grid=grid, method=FAST)
    assert all(leaf.input_scales is not None for leaf in unfolded.values() if is_packed(leaf))
    assert any(np.ptp(leaf.input_scales) > 0.1 for leaf in unfolded.values() if is_packed(leaf))
    (x,) = batches(name)[0]
    served = jax.jit(jgptq.quantized(f))
    expected = f(dense(unfolded), x)
    size = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(f(dense(packed), x), expected, atol=2e-5 * size)
    np.testing.assert_allclose(served(packed, x), expected, atol=2e-5 * size)
    np.testing.assert_allclose(served(unfolded, x), expected, atol=2e-5 * size)


def test_weights_that_cannot_take_scales_elsewhere_stay_unscaled_if_asked():
    f, params, *_ = CASES["norm used elsewhere"]
    with pytest.warns(QuantizationWarning, match="a: its inputs come from nothing that could take scales"):
        packed, report = jgptq.quantize(f, params, X, grid=GRID, method=AWQ(solver=RTN(), input_scales=False))
    assert not any(is_packed(leaf) and leaf.input_scales is not None for leaf in packed.values())
    plain, _ = jgptq.quantize(f, params, X, grid=GRID, method="rtn", quality="fast")
    np.testing.assert_array_equal(packed["a"].codes, plain["a"].codes)
    assert [row.method for row in report.rows] == ["awq", "awq"]
    assert [bool(row.notes) for row in report.rows] == [True, False]


def test_outputs_that_see_different_inputs_are_scaled_only_where_it_folds():
    with pytest.warns(QuantizationWarning, match=r"ab\[:, 24:48\]: its inputs come from nothing"):
        packed, report = jgptq.quantize(
            two_inputs, {"norm": NORM, "ab": jnp.concatenate([A, B], axis=1)}, X, grid=GRID, method=FAST
        )
    assert packed["ab"].input_scales is None
    assert not np.array_equal(packed["norm"], NORM)
    assert [bool(row.notes) for row in sorted(report.rows, key=lambda row: row.path)] == [False, True]


def test_weights_left_alone_or_quantized_otherwise_keep_their_inputs():
    """Of two weights that share a norm both must be scaled, or its scale stays."""
    f, params, *_ = CASES["norm of two"]
    for options in (None, Options(method="rtn")):
        packed, _ = jgptq.quantize(f, params, X, grid=GRID, method=FAST, rules=[("b", options)])
        np.testing.assert_array_equal(packed["norm"], params["norm"])
        assert packed["a"].input_scales is not None


def test_a_weight_left_in_float_takes_scales():
    f, params, *_ = CASES["gated"]
    packed, _ = jgptq.quantize(f, params, batches("gated"), grid=GRID, method=FAST, rules=[("b", None)])
    assert packed["c"].input_scales is None
    ratio = np.asarray(packed["b"] / params["b"])
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)
    assert np.ptp(ratio) > 0.1


def test_less_error_than_rounding_and_gptq_composes():
    f, params, *_ = CASES["norm of two"]
    errors = {}
    for method in (RTN(), FAST, PLAIN, AWQ(solver=PLAIN)):
        packed, _ = jgptq.quantize(f, params, X, grid=Grid(bits=3, group_size=16), method=method)
        (x,) = X[0]
        error = float(jnp.mean((jgptq.quantized(f)(packed, x) - f(params, x)) ** 2))
        errors[method.name, type(getattr(method, "solver", None))] = error
    rtn, awq, gptq, both = errors.values()
    assert awq < 0.8 * rtn
    assert gptq < rtn
    assert both < awq


@pytest.mark.parametrize("other", [None, RTN(), AWQ(solver=RTN(), points=2)])
def test_finished_weights_give_the_same_result(other):
    """A run goes on after any weight: the scales of a step are those of its weights of one method that are done."""
    f, params, *_ = CASES["norm of two"]
    settings = {"grid": GRID, "method": FAST, "rules": [("a", Options(method=other))]}
    whole, _ = jgptq.quantize(f, params, X, **settings)
    finished = {}
    jgptq.quantize(f, params, X, finished=finished, **settings)
    assert finished["b"][0].input_scales is not None
    del finished["b"]
    packed, _ = jgptq.quantize(f, params, X, finished=finished, **settings)
    for old, new in zip(jax.tree.leaves(whole), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    random = np.random.default_rng(0)

    def parameter(keys, leaf):
        values = random.normal(0, 1, leaf.shape)
        return jnp.asarray(np.exp(values) if keys[-1].key == "scale" else 0.1 * values, jnp.float32)

    params = jax.tree_util.tree_map_with_path(parameter, model.parameter_shapes)
    tokens = random.integers(0, 64, (4, 16)).astype(np.int32)
    packed, report = jgptq.quantize(model.apply, params, [(tokens,)], grid=Grid(bits=4, group_size=16), method=FAST)
    return model, params, packed, report, tokens


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_llama_is_saved_as_a_plain_checkpoint(llama, format, tmp_path):
    model, params, packed, report, tokens = llama
    assert not report.notes
    norm = packed["model"]["layers"][0]["input_layernorm"]["scale"]
    assert np.ptp(np.asarray(norm)) > 0.1
    jgptq.save(tmp_path / "out", model, packed, format=format)
    again, loaded = jgptq.load(tmp_path / "out")
    np.testing.assert_array_equal(jax.jit(again.apply)(loaded, tokens), jax.jit(model.apply)(packed, tokens))
    exact = model.apply(params, tokens)
    assert jnp.mean((model.apply(packed, tokens) - exact) ** 2) < 0.1 * jnp.mean(exact**2)  # round to nearest: 0.12


def test_formats_without_a_place_for_scales_say_so(llama, tmp_path):
    model, _, packed, *_ = llama
    kernel = packed["model"]["layers"][0]["self_attn"]["o_proj"]["kernel"]
    scaled = dataclasses.replace(kernel, input_scales=jnp.ones(kernel.in_features))
    params = jax.tree.map(lambda leaf: scaled if leaf is kernel else leaf, packed, is_leaf=is_packed)
    told = r"layers\.0\.self_attn\.o_proj.*inputs are scaled.*AWQ\(input_scales=False\)"
    for format in ("gptq", "awq", "compressed-tensors", "gguf"):
        with pytest.raises(ValueError, match=told):
            jgptq.save(tmp_path / format, model, params, format=format)
