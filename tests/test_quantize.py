"""Sequential quantization of whole functions, and serving the result."""

import dataclasses
import functools
import gc
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import GPTQ, Grid, Options, QuantizationWarning, QuantizedTensor
from jgptq.executor import Executor
from jgptq.report import nbytes, report_json, report_table, weights_table

# What these tests are about is the same at every quality.
quantize = functools.partial(jgptq.quantize, quality="fast")

GRID = Grid(bits=4, group_size=16)
WIDTH, HIDDEN = 32, 48


def layer(p, x):
    h = jnp.einsum("btd,dhk->bthk", x, p["q"])
    x = x + jnp.einsum("bthk,hkd->btd", jax.nn.softmax(h), p["o"])
    y = x * p["norm"][None, None]
    return x + jax.checkpoint(lambda y, up, down: jax.nn.silu(y @ up.T) @ down)(y, p["up"], p["down"])


def network(p, tokens):
    x = p["embedding"][tokens]
    for layer_params in p["layers"]:
        x = layer(layer_params, x)
    return x @ p["embedding"].T


def random_params(depth, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    layers = [
        {
            "q": normal(WIDTH, 4, 8),
            "o": normal(4, 8, WIDTH),
            "norm": jnp.ones(WIDTH),
            "up": normal(HIDDEN, WIDTH),
            "down": normal(HIDDEN, WIDTH),
        }
        for _ in range(depth)
    ]
    return {"embedding": normal(60, WIDTH), "layers": layers}


def token_batches(count=3, rows=4, length=16, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 60, (rows, length)).astype(np.int32),) for _ in range(count)]


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


@pytest.fixture(scope="module")
def quantized_network():
    params = random_params(2)
    packed, report = quantize(network, params, token_batches(), grid=GRID)
    return params, packed, report


def test_every_product_is_packed_and_the_rest_left_with_a_reason(quantized_network):
    _, packed, report = quantized_network
    assert [row.path for row in report.rows] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("q", "o", "up", "down")
    ]
    assert (
        dict(report.skipped)["embedding"] == "also used in gather, dot_general"
        or "gather" in dict(report.skipped)["embedding"]
    )
    assert sum(is_packed(leaf) for leaf in jax.tree.leaves(packed, is_leaf=is_packed)) == 8
    for row in report.rows:
        assert row.tokens == 3 * 4 * 16
        assert 0 < row.relative_error < 0.1
        assert row.loss > 0
        assert row.damp == pytest.approx(0.01)


def test_quantized_forward_equals_a_dense_forward_on_dequantized_weights(quantized_network):
    _, packed, _ = quantized_network
    (tokens,) = token_batches(1, seed=5)[0]
    served = jax.jit(jgptq.quantized(network))(packed, tokens)
    np.testing.assert_allclose(served, network(dense(packed), tokens), atol=2e-5)


def test_no_dequantized_leaf_where_a_product_reads_it_as_packed(quantized_network, monkeypatch):
    """Every use goes to matmul, so the layout matched: dequantize is never called on a whole leaf."""
    _, packed, _ = quantized_network
    calls = []
    monkeypatch.setattr(QuantizedTensor, "dequantize", calls.append)
    jax.make_jaxpr(lambda tokens: jgptq.quantized(network)(packed, tokens))(token_batches(1)[0][0])
    assert not calls


def test_the_executor_ends_at_the_quantized_models_own_output():
    """The activations that reached the last Hessians are those of the quantized model: sequential by construction."""
    params, batches = random_params(2, seed=3), token_batches(2, seed=3)
    executor = Executor(network, params, batches, keep_outputs=True)
    packed_leaves = {}
    for step in executor.choose():
        hessian = executor.moments(step)[0]
        for part in step.parts:
            weight, _ = jgptq.gptq(part.layout.to_matrix(executor.leaf(part.leaf, part.index)), hessian, GRID)
            weight = dataclasses.replace(weight, layout=part.layout)
            executor.replace(part, weight.dequantize())
            packed_leaves[part.leaf] = weight
    leaves, tree = jax.tree.flatten(params)
    packed = jax.tree.unflatten(tree, [packed_leaves.get(i, leaf) for i, leaf in enumerate(leaves)])
    for output, batch in zip(executor.outputs(), batches, strict=True):
        np.testing.assert_allclose(output, jgptq.quantized(network)(packed, *batch), atol=2e-5)


def test_each_hessian_is_that_of_the_quantized_models_activations(quantized_network):
    """Oracle: the second layer's first weight, solved on activations computed by hand from the packed first layer."""
    params, packed, report = quantized_network
    hessian = jgptq.init_hessian(WIDTH)
    for (tokens,) in token_batches():
        x = layer(dense(packed)["layers"][0], params["embedding"][tokens])
        hessian = jgptq.update_hessian(hessian, x)
    w = params["layers"][1]["q"].reshape(WIDTH, -1)
    expected, info = jgptq.PRESETS["gptq"]["fast"].solve(w, hessian, GRID)
    got = packed["layers"][1]["q"]
    different = np.mean(jgptq.tensor.unpack_codes(got) != jgptq.tensor.unpack_codes(expected))
    assert different < 0.005  # near ties: the activations agree to float32 rounding only
    row = next(row for row in report.rows if row.path == "layers.1.q")
    assert row.loss == pytest.approx(float(info.loss), rel=1e-2)


def test_a_deeper_model_compiles_nothing_more():
    counts = []
    for depth in (4, 32):
        executor = Executor(network, random_params(depth), token_batches(1))
        steps = executor.choose()
        for step in steps:
            executor.moments(step)[0]
        assert len(steps) == 4 * depth
        counts.append(executor.programs)
    assert counts[0] == counts[1] <= 6


def test_the_callers_arrays_survive(quantized_network):
    params = random_params(1, seed=8)
    batches = [tuple(map(jnp.asarray, batch)) for batch in token_batches(1)]
    before = jax.tree.map(np.array, (params, batches))
    quantize(network, params, batches, grid=GRID, method="rtn")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, batches)))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves((params, batches))))


def test_batches_may_be_bare_arrays_and_of_several_shapes():
    params = random_params(1)
    (long,), (short,) = token_batches(1, length=16)[0], token_batches(1, length=8)[0]
    _, report = quantize(network, params, [long, short, long], grid=GRID, method="rtn")
    assert {row.tokens for row in report.rows} == {4 * (16 + 8 + 16)}


def test_gptq_is_closer_to_the_float_function_than_rtn():
    params, batches = random_params(2, seed=1), token_batches(4, rows=8, seed=1)
    held_out = token_batches(1, rows=8, seed=99)[0][0]
    errors = {}
    for method in ("rtn", "gptq"):
        packed, _ = quantize(network, params, batches, grid=Grid(bits=3, group_size=16), method=method)
        errors[method] = float(jnp.mean((network(dense(packed), held_out) - network(params, held_out)) ** 2))
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_rules_choose_by_pattern_and_predicate_first_match_wins():
    packed, report = quantize(
        network,
        random_params(2),
        token_batches(1),
        grid=GRID,
        method="rtn",
        rules=[
            ("layers.0.*", Options(grid=Grid(bits=8, group_size=None))),
            (lambda site: site.path.endswith("down"), None),
            ("*", Options(method=GPTQ(damp=0.05))),
        ],
    )
    by_path = {row.path: row for row in report.rows}
    assert by_path["layers.0.down"].bits == 8
    assert by_path["layers.0.down"].method == "rtn"
    assert by_path["layers.0.q"].group_size == WIDTH
    assert "layers.1.down" not in by_path
    assert dict(report.skipped)["layers.1.down"] == "left alone by a rule"
    assert not is_packed(packed["layers"][1]["down"])
    assert by_path["layers.1.q"].damp == pytest.approx(0.05)


def test_progress_counts_every_weight():
    seen = []
    quantize(
        network,
        random_params(1),
        token_batches(1),
        grid=GRID,
        method="rtn",
        progress=lambda row, done, total: seen.append((row.path, done, total)),
    )
    assert [entry[1:] for entry in seen] == [(i, 4) for i in range(1, 5)]


def test_quantized_composes_with_vmap_and_grad(quantized_network):
    _, packed, _ = quantized_network
    tokens = token_batches(1, rows=3)[0][0]
    rows = jax.vmap(lambda row: jgptq.quantized(network)(packed, row[None])[0])(tokens)
    np.testing.assert_allclose(rows, jgptq.quantized(network)(packed, tokens), atol=2e-5)

    def loss(embedding, f, params):
        return jnp.mean(f({**params, "embedding": embedding}, tokens) ** 2)

    got = jax.grad(loss)(packed["embedding"], jgptq.quantized(network), packed)
    np.testing.assert_allclose(got, jax.grad(loss)(packed["embedding"], network, dense(packed)), atol=1e-5)


def test_a_leaf_used_otherwise_than_packed_is_dequantized_there():
    w, _ = jgptq.rtn(jnp.asarray(np.random.default_rng(0).standard_normal((32, 8)), jnp.float32), GRID)
    x = jnp.ones((3, 32))

    def f(p, x):
        return x @ p["w"], p["w"].sum(), jnp.einsum("of,bo->bf", p["w"], x), p["w"][3], jnp.tanh(p["w"])

    for served, plain in zip(jgptq.quantized(f)({"w": w}, x), f({"w": w.dequantize()}, x), strict=True):
        np.testing.assert_allclose(served, plain, atol=1e-5)


def test_quantized_leaves_float_params_and_keywords_alone():
    def f(p, x, *, scale):
        return {"y": x @ p["w"] * scale}

    w = jnp.eye(4)
    assert jnp.array_equal(jgptq.quantized(f)({"w": w}, jnp.ones((1, 4)), scale=3.0)["y"], jnp.full((1, 4), 3.0))
    packed, _ = jgptq.rtn(w, Grid(bits=8, group_size=4))
    np.testing.assert_allclose(
        jgptq.quantized(f)({"w": packed}, jnp.ones((1, 4)), scale=3.0)["y"], jnp.full((1, 4), 3.0), rtol=1e-3
    )


def dense_layer(p, x):
    return x @ p["w"]


def test_leaves_of_one_path_are_two_weights():
    def f(p, x):
        return x @ p["a.b"] @ p["a"]["b"]

    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    only_outer = [(lambda site: site.leaf == 1, None)]
    params, batches = {"a.b": w, "a": {"b": w}}, [np.eye(8, dtype=np.float32)] * 3
    packed, report = quantize(f, params, batches, grid=GRID, method="rtn", rules=only_outer)
    assert is_packed(packed["a"]["b"])
    assert not is_packed(packed["a.b"])
    assert len(report.rows) == 1


def test_whole_number_activations_and_batches_without_tokens_count_as_they_are():
    def f(p, x):
        return jax.lax.dot_general(x.astype(jnp.int8), p["w"], (((1,), (0,)), ((), ())))

    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
    x = np.random.default_rng(1).integers(-5, 6, (40, 8)).astype(np.float32)
    packed, report = quantize(f, {"w": w}, [x, x[:0]], grid=GRID)
    expected, _ = jgptq.PRESETS["gptq"]["fast"].solve(
        w, jgptq.update_hessian(jgptq.init_hessian(8), jnp.asarray(x)), GRID
    )
    assert report.rows[0].tokens == 40
    assert jnp.array_equal(packed["w"].codes, expected.codes)


def test_no_batches_of_inputs_but_a_function_of_none():
    packed, _ = quantize(lambda p: jnp.eye(8) @ p["w"], {"w": jnp.eye(8)}, [()], grid=GRID, method="rtn")
    assert is_packed(packed["w"])


@pytest.mark.usefixtures("without_type_checker")
def test_arguments_of_the_wrong_kind_are_named():
    params, x = {"w": jnp.ones((8, 4))}, np.ones((20, 8), np.float32)
    for batches, message in [
        (x, r"batches is a ndarray; give a list of batches"),
        ({"x": x}, r"batches is a dict; give a list of batches"),
        (["text"], r"batch 0 holds a str; its inputs are arrays or numbers: bind anything else"),
        ([x, jax.ShapeDtypeStruct((20, 8), np.float32)], r"batch 1 holds a ShapeDtypeStruct"),
    ]:
        with pytest.raises(TypeError, match=message):
            quantize(dense_layer, params, batches)
    with pytest.raises(TypeError, match=r"grid=\{'bits': 3\}; give a jgptq.Grid"):
        quantize(dense_layer, params, [x], grid={"bits": 3})
    with pytest.raises(
        TypeError, match=r"method=3; choose one of \('rtn', 'gptq', 'awq', 'obq'\), or give a Method value"
    ):
        Options(method=3)
    with pytest.raises(TypeError, match=r"w is a ShapeDtypeStruct, with no values; give arrays"):
        quantize(dense_layer, jax.eval_shape(lambda: params), [x])


def test_bad_calibration_is_named():
    params = {"w": jnp.ones((8, 4))}
    x = np.ones((20, 8), np.float32)
    with pytest.raises(ValueError, match="no calibration data: batches is empty; give at least one batch"):
        quantize(dense_layer, params, [], grid=GRID)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"activations that reach w in calibration contain NaN or infinity; check"):
        quantize(dense_layer, params, [x], grid=GRID)
    with pytest.raises(ValueError, match=r"NaN or infinity in w; repair"):
        quantize(dense_layer, {"w": jnp.full((8, 4), jnp.inf)}, [np.ones((20, 8), np.float32)], grid=GRID)


def test_a_function_without_a_weight_product_is_refused():
    with pytest.raises(ValueError, match=r"no weight that can be quantized \(w: no product .* \(used in add\)\)"):
        quantize(lambda p, x: x + p["w"], {"w": jnp.ones((1, 8))}, [np.ones((2, 8), np.float32)])


def test_rules_that_make_no_sense_are_refused(without_type_checker):
    params, batches = {"kernel": jnp.ones((8, 4))}, [np.ones((20, 8), np.float32)]

    def f(p, x):
        return x @ p["kernel"]

    with pytest.raises(ValueError, match=r"no weight matches the rule 'kernle'; the nearest paths are kernel"):
        quantize(f, params, batches, rules=[("kernle", None)])
    for rules in ("kernel", {"kernel": None}):
        with pytest.raises(TypeError, match=r"give a sequence of \(pattern, options\) pairs"):
            quantize(f, params, batches, rules=rules)
    with pytest.raises(TypeError, match=r"\('\*',\) in rules; give a pair of a glob on paths"):
        quantize(f, params, batches, rules=[("*",)])
    with pytest.raises(TypeError, match=r"has options \{'bits': 3\}; give jgptq.Options"):
        quantize(f, params, batches, rules=[("*", {"bits": 3})])
    params["bias"] = jnp.ones(4)
    with pytest.raises(
        ValueError, match=r"'bias' sets options for bias, which cannot be quantized \(not used\); remove"
    ):
        quantize(f, params, batches, rules=[("bias", Options(method="rtn"))])
    with pytest.raises(ValueError, match=r"method='gtpq'; choose one of \('rtn', 'gptq', 'awq', 'obq'\)"):
        quantize(f, params, batches, method="gtpq")


@pytest.mark.parametrize(
    ("x", "note"),
    [
        (np.zeros((20, 8), np.float32), "its inputs were zero throughout calibration: rounded to nearest"),
        (np.ones((3, 8), np.float32), "saw 3 tokens, fewer than its 8 inputs: calibrate on more"),
    ],
)
def test_starved_weights_are_in_the_report_and_warned_about(x, note):
    with pytest.warns(QuantizationWarning, match=note):
        _, report = quantize(dense_layer, {"w": jnp.ones((8, 4))}, [x], grid=GRID)
    assert report.rows[0].notes == (note,)


def test_grown_damping_is_said():
    """Two equal inputs and no damping: singular, in float32 too, so the factorization must fail at first."""
    x = np.zeros((16, 8), np.float32)
    x[:7, 1:] = 4 * np.eye(7)
    x[:, 0] = x[:, 1]
    with pytest.warns(QuantizationWarning, match="damping raised from 0 to"):
        quantize(dense_layer, {"w": jnp.eye(8)[:, :4]}, [x], grid=GRID, method=GPTQ(damp=0.0))


def test_scales_beyond_float16_are_said():
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    with pytest.warns(QuantizationWarning, match=r'outside the range of float16: use Grid\(scale_dtype="float32"\)'):
        quantize(dense_layer, {"w": 1e-9 * jnp.eye(8)}, [x], grid=GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = Grid(bits=4, group_size=16, scale_dtype="float32")
        quantize(dense_layer, {"w": 1e-9 * jnp.eye(8)}, [x], grid=fine)


def test_batches_on_which_the_function_changes_its_weights_are_refused():
    def f(p, x):
        return x @ (p["a"] if x.shape[0] > 2 else p["b"])

    params = {"a": jnp.ones((8, 4)), "b": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match="give calibration batches of one shape"):
        quantize(f, params, [np.ones((4, 8), np.float32), np.ones((2, 8), np.float32)])


def test_the_report_as_json_and_tables(quantized_network):
    _, packed, report = quantized_network
    loaded = json.loads(report_json(report))
    assert [row["path"] for row in loaded["rows"]] == [row.path for row in report.rows]
    assert report_table(report).row_count == 8 + 1
    table = weights_table(packed, {row.path: row.relative_error for row in report.rows})
    assert table.row_count == len(jax.tree.leaves(random_params(2))) + 1
    codes = sum(WIDTH * WIDTH * 2 + HIDDEN * WIDTH * 2 for _ in range(2)) // 2
    assert nbytes(packed) > codes


def test_a_packed_tree_is_smaller_than_the_float_one(quantized_network):
    params, packed, _ = quantized_network
    assert nbytes(packed) < nbytes(params)


class Lazy:
    """A leaf on disk, as far as quantize can tell."""

    def __init__(self, array):
        self._array, self.shape, self.dtype, self.reads = np.asarray(array), array.shape, array.dtype, 0

    def __getitem__(self, index):
        self.reads += 1
        return self._array[index]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_lazy_leaves_are_read_when_needed_and_give_the_same(quantized_network):
    params, packed, _ = quantized_network
    lazy = jax.tree.map(Lazy, params)
    reads = []

    def note(row, done, total):
        reads.append([leaf["q"].reads for leaf in lazy["layers"]])

    from_lazy, _ = quantize(network, lazy, token_batches(), grid=GRID, progress=note)
    assert from_lazy["embedding"] is lazy["embedding"]
    assert from_lazy["layers"][1]["norm"] is lazy["layers"][1]["norm"]
    same([layer["q"] for layer in from_lazy["layers"]], [layer["q"] for layer in packed["layers"]])
    same([layer["down"] for layer in from_lazy["layers"]], [layer["down"] for layer in packed["layers"]])
    assert reads[0][1] == 0
    assert reads[-1] == [1, 1]


def test_bad_values_in_lazy_leaves_are_found():
    with pytest.raises(ValueError, match="NaN or infinity in w; repair"):
        quantize(dense_layer, {"w": Lazy(np.full((8, 4), np.nan, np.float32))}, [np.ones((20, 8), np.float32)])


def test_activations_on_the_host_give_the_same(quantized_network):
    params, packed, _ = quantized_network
    offloaded, _ = quantize(network, params, token_batches(), grid=GRID, offload="host")
    same(offloaded, packed)


def test_what_to_do_with_activations_is_checked(without_type_checker):
    params = random_params(1)
    with pytest.raises(ValueError, match=r"offload='disk'; give \"host\", or None"):
        quantize(network, params, token_batches(), grid=GRID, offload="disk")


def test_an_interrupted_run_goes_on_to_the_same_result(quantized_network):
    params, packed, report = quantized_network
    finished = {}

    def stop(row, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(network, params, token_batches(), grid=GRID, finished=finished, progress=stop)
    assert list(finished) == ["layers.0.q", "layers.0.o", "layers.0.up"]
    before = dict(finished)
    resumed, second = quantize(network, params, token_batches(), grid=GRID, finished=finished)
    same(resumed, packed)
    assert [row.path for row in second.rows] == [row.path for row in report.rows]
    assert all(finished[path] is before[path] for path in before)
    assert resumed["layers"][0]["q"].codes is finished["layers.0.q"][0].codes


def test_finished_needs_paths_that_tell_weights_apart():
    params = {"a.b": jnp.eye(8), "a": {"b": jnp.eye(8)}}
    with pytest.raises(ValueError, match="two weights have the same path"):
        quantize(lambda p, x: x @ p["a.b"] @ p["a"]["b"], params, [np.eye(8, dtype=np.float32)], finished={})


def test_a_stack_resumes_in_the_middle():
    def f(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]

    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal((3, 16, 16)) / 4, jnp.float32)
    batches = [rng.standard_normal((64, 16)).astype(np.float32)]
    whole, report = quantize(f, params, batches, grid=GRID)
    assert [row.path for row in report.rows] == ["params[0]", "params[1]", "params[2]"]
    finished = {}
    quantize(f, params, batches, grid=GRID, finished=finished)
    del finished["params[1]"], finished["params[2]"]
    resumed, _ = quantize(f, params, batches, grid=GRID, finished=finished)
    same(resumed, whole)


def test_a_tied_embedding_is_quantized_when_asked_for():
    params = random_params(1)
    rules = [("embedding", Options(tied=True, grid=Grid(bits=8, group_size=16))), ("*", None)]
    with pytest.raises(ValueError, match=r"also used in gather, so left alone unless Options\(tied=True\)"):
        quantize(network, params, token_batches(), rules=[("embedding", Options())])
    packed, report = quantize(network, params, token_batches(), rules=rules)
    assert [row.path for row in report.rows] == ["embedding"]
    # Its first use is the lookup, so the Hessian is that of the float model's last activations, whatever its own codes.
    x = [layer(params["layers"][0], params["embedding"][tokens]) for (tokens,) in token_batches()]
    hessian = jgptq.init_hessian(WIDTH)
    for batch in x:
        hessian = jgptq.update_hessian(hessian, batch)
    expected, _ = jgptq.PRESETS["gptq"]["fast"].solve(params["embedding"].T, hessian, Grid(bits=8, group_size=16))
    assert np.mean(np.asarray(packed["embedding"].codes) != np.asarray(expected.codes)) < 0.02
    (tokens,) = token_batches(1, seed=9)[0]
    np.testing.assert_allclose(
        jax.jit(jgptq.quantized(network))(packed, tokens), network(dense(packed), tokens), atol=2e-5
    )
    outside = tokens.at[0, 0].set(60) if hasattr(tokens, "at") else np.where(tokens == tokens[0, 0], 60, tokens)
    lookup = jax.jit(
        jgptq.quantized(lambda p, t: (jnp.take(p["embedding"], t, axis=0), jnp.ones(WIDTH) @ p["embedding"].T))
    )
    for got, want in zip(
        lookup(packed, outside),
        (jnp.take(dense(packed)["embedding"], outside, axis=0), jnp.ones(WIDTH) @ dense(packed)["embedding"].T),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_replaced_weights_are_dropped_after_their_last_use():
    executor = Executor(network, random_params(2), token_batches(1))
    held = []
    for step in executor.choose():
        executor.moments(step)[0]
        held.append(len(executor._quantized))
        for part in step.parts:
            executor.replace(part, executor.leaf(part.leaf, part.index))
    assert max(held) <= 1


def test_mappings_of_the_wrong_kind_of_module_arguments_are_refused():
    with pytest.raises(TypeError, match=r"takes \(f, params, batches\), or \(module, batches\)"):
        quantize(network, random_params(1))


@pytest.mark.parametrize("experts", [0, 3])
def test_a_steps_hessian_and_factor_are_gone_when_the_next_begins(experts, monkeypatch):
    random = np.random.default_rng(1)
    shapes = {"up": (20, 24), "down": (24, 12)}
    params = {name: jnp.asarray(random.normal(size=(experts, *s) if experts else s)) for name, s in shapes.items()}
    product = "etd,edf->etf" if experts else "td,df->tf"

    def f(params, x):
        return jnp.einsum(product, jax.nn.relu(jnp.einsum(product, x, params["up"])), params["down"])

    def square_arrays():
        return sum(array.ndim > 1 and array.shape[-1] == array.shape[-2] for array in jax.live_arrays())

    alive = []
    advance = Executor.advance

    def counted(self, step):
        alive.append(square_arrays())
        return advance(self, step)

    gc.collect()
    before = square_arrays()
    monkeypatch.setattr(Executor, "advance", counted)
    x = jnp.asarray(random.normal(size=(experts, 64, 20) if experts else (64, 20)))
    jgptq.quantize(f, params, [x], grid=Grid(bits=4, group_size=8))
    assert alive == [before, before]
