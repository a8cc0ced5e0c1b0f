"""What a quantization would take, against what it takes."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import GPTQ, Grid, Options, solves
from jgptq.models import MODELS, LanguageModel
from jgptq.phases import Phases
from jgptq.report import nbytes
from jgptq.tracing import batching
from jgptq.tracing.costs import flops, waiting_bytes, working_bytes
from jgptq.tracing.graph import trace

WIDTH, HIDDEN, ROWS = 64, 160, 48
GRID = Grid(bits=4, group_size=32)
PLAIN = GPTQ(scale_search=None, sweeps=0, targets=None)
FOLLOWED = GPTQ(scale_search=None, sweeps=0)


def network(params, x):
    for layer in params:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def shapes(depth=3):
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return [{"up": struct(WIDTH, HIDDEN), "down": struct(HIDDEN, WIDTH)} for _ in range(depth)]


def values(tree):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32) / 8, tree)


class Lazy:
    """A leaf on disk, as far as quantize can tell."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim

    def __getitem__(self, index):
        return self.array[index].copy()


def batches(count=4):
    return [jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)] * count


def test_operations_are_those_of_the_products():
    graph = trace(network, shapes(1), batches()[0])
    assert flops(graph.equations) == 2 * ROWS * WIDTH * HIDDEN * 2


def test_operations_inside_a_scan_count_for_every_step():
    def scanned(w, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    graph = trace(scanned, jnp.ones((8, 8)), jnp.ones((3, 8)))
    assert flops(graph.equations) == 5 * 2 * 3 * 8 * 8


def test_what_waits_is_what_later_equations_read():
    graph = trace(network, shapes(1), batches()[0])
    up, down = (next(step.start for step in graph.steps([leaf])) for leaf in (1, 0))
    x, hidden = 4 * ROWS * WIDTH, 4 * ROWS * HIDDEN
    assert waiting_bytes(graph, up) == x
    assert waiting_bytes(graph, down) == x + hidden
    # The product and its tanh, which may take its place.
    assert hidden <= working_bytes(graph, up, down) <= 2 * hidden


def test_before_and_after_are_what_quantize_makes():
    params = values(shapes())
    rules = [("0.up", Options(grid=Grid(bits=8, group_size=None))), ("1.*", None)]
    found = jgptq.estimate(network, shapes(), batches(), grid=GRID, method="rtn", rules=rules)
    data = [np.ones((4 * HIDDEN, WIDTH), np.float32)]
    packed, report = jgptq.quantize(network, params, data, grid=GRID, method="rtn", rules=rules)
    assert {weight.path: weight.packed_nbytes for weight in found.weights} == {
        row.path: row.nbytes for row in report.rows
    }
    assert found.skipped == report.skipped
    assert found.nbytes == nbytes(params)
    assert found.packed_nbytes == nbytes(packed)


def live_bytes():
    return sum({a.unsafe_buffer_pointer(): a.nbytes for a in jax.live_arrays() if a.size}.values())


def llama():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MODELS["llama"].parse_config({"model_type": "llama", "vocab_size": 256, **sizes})
    return LanguageModel(architecture=MODELS["llama"], config=config)


@pytest.mark.parametrize("method", [PLAIN, FOLLOWED], ids=["one model", "the float model followed"])
@pytest.mark.parametrize("lazy", [True, False])
def test_the_peak_is_that_of_a_run(method, lazy, monkeypatch):
    """Of arrays, as seen whenever a phase ends: what programs take inside does not show, so at most half is missing."""
    monkeypatch.setattr(batching, "CPU_BATCH", 2 << 20)
    model = llama()
    tokens = [np.random.default_rng(seed).integers(0, 256, (4, 64)).astype(np.int32) for seed in range(4)]
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    gc.collect()
    before = live_bytes()
    params = jax.tree.map(Lazy if lazy else jnp.asarray, params)
    seen = []

    def noting(self, value, wait=Phases.wait):
        value = wait(self, value)
        seen.append(live_bytes() - before)
        return value

    monkeypatch.setattr(Phases, "wait", noting)
    jgptq.quantize(model.apply, params, tokens, grid=GRID, method=method, profile=True)
    found = jgptq.estimate(model.apply, params, tokens, grid=GRID, method=method)
    assert 1.0 <= found.peak_nbytes / max(seen) <= 2.0


def test_shapes_give_what_arrays_give():
    from_shapes, from_arrays = (
        jgptq.estimate(network, params, batches(), grid=GRID, method=FOLLOWED, lazy=True)
        for params in (shapes(), values(shapes()))
    )
    assert from_shapes.peak == from_arrays.peak
    assert from_shapes.flops == from_arrays.flops


def test_more_batches_take_more_memory_and_time_and_a_second_model_twice_the_activations():
    def of(count, method):
        return jgptq.estimate(network, shapes(), batches(count), grid=GRID, method=method)

    one, two, followed = of(4, PLAIN), of(8, PLAIN), of(4, FOLLOWED)
    assert dict(two.peak)["activations"] == 2 * dict(one.peak)["activations"]
    assert dict(followed.peak)["activations"] == 2 * dict(one.peak)["activations"]
    assert dict(two.flops)["advance"] == 2 * dict(one.flops)["advance"] == dict(followed.flops)["advance"]


def test_an_8b_model_is_estimated_from_its_shapes(monkeypatch):
    """The layers of Llama-3-8B on 128 windows of 2048 tokens. Nothing waits but what its layers hand on."""
    monkeypatch.setattr(batching, "CPU_BATCH", 2 << 30)
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    config = MODELS["llama"].parse_config({"model_type": "llama", **sizes, **heads})
    model = LanguageModel(architecture=MODELS["llama"], config=config)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.parameter_shapes)
    tokens = [jax.ShapeDtypeStruct((8, 2048), jnp.int32)] * 16
    found = jgptq.estimate(model.apply, params, tokens, rules=[("lm_head.*", None)], quality="fast")
    waiting = 128 * 2048 * (4096 + 14336) * 2  # the residual stream and the gated product
    assert dict(found.peak)["activations"] == pytest.approx(waiting, rel=0.01)
    assert waiting < found.peak_nbytes < 1.6 * waiting


def test_nothing_to_calibrate_on_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        jgptq.estimate(network, shapes(), [])


def test_a_better_quality_takes_more_to_solve():
    def solving(method, quality):
        found = jgptq.estimate(network, shapes(), batches(), grid=GRID, method=method, quality=quality)
        return dict(found.flops)["solve"]

    best, balanced, fast = (solving("gptq", quality) for quality in ("best", "balanced", "fast"))
    assert best > balanced > fast > solving("rtn", "fast")
    assert solving("awq", "balanced") > solving("awq", "fast") > 20 * solving("rtn", "fast") / 2


def test_each_order_takes_a_factor_and_a_solve():
    def of(method):
        w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 16), (1, 512)))
        return jgptq.estimate(lambda w, x: x @ w, w, [x], grid=GRID, method=method)

    one, three = (of(GPTQ(orders=orders, targets=None)) for orders in (1, 3))
    assert dict(three.flops)["solve"] == pytest.approx(3 * dict(one.flops)["solve"])
    assert dict(three.peak)["factor"] == 3 * 4 * 512**2
    judged = of(jgptq.AWQ(solver=GPTQ(orders=3), judge=GPTQ(targets=None)))
    assert dict(judged.peak)["factor"] == dict(three.peak)["factor"]


def test_each_scaling_is_judged_by_a_solve():
    """Five judges' solves come to what five weights take that are solved as the judge solves."""

    def solving(method):
        return dict(jgptq.estimate(network, shapes(), batches(), grid=GRID, method=method).flops)["solve"]

    best, judge = jgptq.AWQ(solver=PLAIN, points=5, judge=FOLLOWED), FOLLOWED
    assert solving(best) == pytest.approx(solving(PLAIN) + 5 * solving(judge))


def test_exact_solves_take_in_to_the_third_for_each_output():
    def solving(width):
        w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, 32), (ROWS, width)))
        return dict(jgptq.estimate(lambda w, x: x @ w, w, [x], grid=GRID, method="obq").flops)["solve"]

    assert solving(128) == 8 * solving(64) >= 8 * 32 * 64**3


@pytest.mark.parametrize(
    "given",
    [np.ones((ROWS, WIDTH), np.float32), {"x": np.ones(3)}, "text", [("text",)], [], iter(())],
    ids=["an array", "a dict", "a string", "strings", "nothing", "an empty iterator"],
)
def test_batches_are_refused_as_quantize_refuses_them(given):
    with pytest.raises((TypeError, ValueError)) as refused:
        jgptq.quantize(network, values(shapes()), given)
    with pytest.raises(refused.type) as also:
        jgptq.estimate(network, shapes(), given)
    assert str(also.value) == str(refused.value)


def test_an_unknown_place_for_activations_is_refused():
    with pytest.raises(ValueError, match="offload='disk'; give \"host\""):
        jgptq.estimate(network, shapes(), batches(), offload="disk")


def test_keys_of_random_numbers_take_nothing():
    def with_key(params, x):
        return network(params["layers"], x + 0 * jax.random.normal(params["key"], x.shape))

    found = jgptq.estimate(with_key, {"key": jax.random.key(0), "layers": shapes()}, batches(), grid=GRID)
    assert found.nbytes == nbytes(values(shapes()))


def test_each_leaf_is_lazy_by_itself():
    params = values(shapes())
    params[1] = jax.tree.map(Lazy, params[1])
    found = jgptq.estimate(network, params, batches(), grid=GRID, method=PLAIN)
    assert dict(found.peak)["parameters"] == nbytes(params[0]) + nbytes(params[2])


def test_what_is_read_ahead_is_in_the_hosts_memory(monkeypatch):
    def step(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        few = [jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)]
        return dict(jgptq.estimate(network, shapes(), few, grid=GRID, method="rtn", quality="fast").peak)

    assert step("cpu")["read ahead"] == 4 * WIDTH * HIDDEN
    assert "read ahead" not in step("gpu")


SEARCHED = GPTQ(targets=None)


@pytest.mark.parametrize(
    ("method", "outputs", "copies"),
    [(SEARCHED, 1024, 2.25), (SEARCHED, 1031, 7.05), (PLAIN, 1024, 2.95), (PLAIN, 4096, 1.225), (PLAIN, 1031, 2.95)],
)
def test_outputs_that_cannot_be_divided_are_solved_at_once(method, outputs, copies):
    """1031 is a prime."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, outputs), (1, 64)))
    found = jgptq.estimate(lambda w, x: x @ w, w, [x], grid=GRID, method=method)
    assert dict(found.peak)["one solve"] == pytest.approx(copies * 4 * 64 * outputs, abs=1)


@pytest.mark.parametrize(("limit", "outputs"), [(0, 96), (64, 96), (128, 128), (160, 160)])
def test_weights_solved_as_one_take_what_all_of_their_outputs_do(limit, outputs, monkeypatch):
    monkeypatch.setattr(solves, "OUTPUTS", {"cpu": limit})
    params = {
        name: jax.ShapeDtypeStruct((64, width), jnp.float32) for name, width in {"q": 96, "k": 32, "v": 32}.items()
    }
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    found = jgptq.estimate(lambda params, x: [x @ w for w in params.values()], params, [x], grid=GRID, method=PLAIN)
    assert dict(found.peak)["one solve"] == pytest.approx(2.95 * 4 * 64 * outputs, abs=1)


@pytest.mark.parametrize("method", [PLAIN, SEARCHED], ids=["plain", "searched"])
def test_a_solve_takes_what_xla_compiles_it_to(method):
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 2048), (1, 2048)))
    grid = jgptq.Grid(bits=4, group_size=128)
    estimated = dict(jgptq.estimate(lambda w, x: x @ w, w, [x], grid=grid, method=method).peak)["one solve"]
    hessian = jax.eval_shape(jgptq.update_hessian, jax.eval_shape(lambda: jgptq.init_hessian(2048)), x)
    factors = jax.eval_shape(lambda hessian: method.prepare(hessian, grid), hessian)
    compiled = jax.jit(lambda w, factors: method.solve(w, factors, grid)).lower(w, factors).compile()
    memory = compiled.memory_analysis()
    # Here packing and the output's energy are in the same program, and tests do not optimize.
    assert 0.7 < estimated / (memory.temp_size_in_bytes + memory.output_size_in_bytes) < 1.3


@pytest.mark.parametrize(("one_by_one", "factors"), [(("cpu",), 1), ((), 3)])
def test_experts_solved_at_once_take_a_factor_each(one_by_one, factors, monkeypatch):
    """Of 30, three: the largest divisor of 30 up to an eighth of it."""
    monkeypatch.setattr(solves, "ONE_BY_ONE", one_by_one)
    w, x = (jax.ShapeDtypeStruct((30, rows, 64), jnp.float32) for rows in (64, 1))
    found = jgptq.estimate(lambda w, x: jnp.einsum("etd,edf->etf", x, w), w, [x], grid=GRID, method=PLAIN)
    assert dict(found.peak)["factor"] == factors * 4 * 64 * 64
    assert dict(found.peak)["Hessian"] == 30 * 4 * 64 * 64
