"""LanguageModel.arranged: there and back bit for bit, the same logits and tokens, one layer in the program."""

import dataclasses
import functools
import importlib
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jgptq
from jgptq import tensor
from jgptq.kernels.prepack import Prepacked
from jgptq.models import MODELS, LanguageModel
from jgptq.models.layers import Joined
from jgptq.models.serving import runs_of

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GRID = jgptq.Grid(bits=4, group_size=16)


def language_model(model_type="llama", **fields) -> LanguageModel:
    architecture = MODELS[model_type]
    return LanguageModel(architecture=architecture, config=architecture.parse_config(SIZES | fields))


def random_params(model, grid_of=lambda path: GRID, permuted=False, dtype=jnp.float32):
    """Random parameters, linear kernels packed in the grid that `grid_of` gives their names, or float where it is None.

    permuted: inputs in another order for each layer, and the same for what it reads together, as act-order gives.
    """
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        names = [key.key for key in path]
        grid = grid_of(names) if names[-1] == "kernel" else None
        if grid is None:
            return jnp.asarray(rng.normal(0.1, 0.3, shape.shape), dtype)
        inputs, outputs = shape.shape
        groups = -(-inputs // grid.group_length(inputs))
        order = np.random.default_rng(names.index("kernel") + inputs + 7 * names[2]) if "layers" in names else rng
        return tensor.from_codes(
            jnp.asarray(rng.integers(0, 2**grid.bits, (inputs, outputs)), jnp.uint8),
            jnp.asarray(rng.uniform(0.01, 0.03, (groups, outputs)), jnp.float32),
            jnp.asarray(rng.integers(4, 12, (groups, outputs)), jnp.uint8),
            grid=grid,
            permutation=jnp.asarray(order.permutation(inputs), jnp.int32) if permuted else None,
            dtype=dtype,
        )

    return jax.tree.map_with_path(leaf, model.parameter_shapes)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def logits_of_steps(model, params, tokens, given=5):
    """Of a prompt of `given` tokens, and of each one after it."""
    capacity = tokens.shape[1]
    prefill = jax.jit(functools.partial(model.prefill, capacity=capacity))
    step = jax.jit(model.step, donate_argnums=3)
    count = len(tokens)
    logits, cache = prefill(params, tokens[:, :given], jnp.full(count, given))
    found = [logits]
    for place in range(given, capacity):
        logits, cache = step(params, tokens[:, place], jnp.full(count, place), cache)
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ("", ()),
        ("A", ((1, 1),)),
        ("A" * 32, ((1, 32),)),
        ("AB" * 4, ((2, 4),)),
        ("ABBBB", ((1, 1), (1, 4))),
        ("ABCD", ((1, 1),) * 4),
    ],
)
def test_the_fewest_layers_are_compiled(kinds, runs):
    assert runs_of(kinds) == runs


def test_a_pattern_with_a_rest():
    """Gemma 3: every sixth layer is another; 34 is no multiple of 6. A period of 6 and one layer more will do."""
    assert sum(period for period, _ in runs_of(("LLLLLG" * 6)[:34])) == 7


@given(st.text("AB", max_size=9))
def test_runs_cover_the_layers(kinds):
    start, runs = 0, runs_of(kinds)
    for period, repeats in runs:
        run = kinds[start : start + period * repeats]
        assert run == run[:period] * repeats
        start += period * repeats
    assert start == len(kinds)
    # At worst runs of one kind; a layer by itself costs what a run of it does.
    assert sum(period for period, _ in runs) <= len(list(itertools.groupby(kinds)))


def mixed(names):
    """Projections that cannot be joined, in one layer of three; a float one in another."""
    if names[2:] == [0, "self_attn", "v_proj", "kernel"]:
        return jgptq.Grid(bits=8, group_size=16)
    if names[2:] == [0, "mlp", "up_proj", "kernel"]:
        return jgptq.Grid(bits=4, group_size=32)
    return None if names[2:] == [2, "mlp", "down_proj", "kernel"] else GRID


CASES = {
    "biases": ({"model_type": "qwen2"}, {}),
    "permuted": ({}, {"permuted": True}),
    "mixed": ({}, {"grid_of": mixed}),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case):
    fields, options = CASES[case]
    model = language_model(**fields)
    params = random_params(model, **options)
    arranged = model.arranged(params)
    assert arranged.runs == (((1, 1),) * 3 if case == "mixed" else ((1, 3),))
    assert model.arranged(arranged) is arranged
    assert_same(model.plain(arranged), params)
    prepacked = jgptq.prepack(params)
    assert_same(jgptq.prepack(arranged), model.arranged(prepacked))
    assert_same(model.plain(model.arranged(prepacked)), prepacked)
    assert_same(jgptq.unprepack(model.plain(jgptq.prepack(arranged))), params)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_parameters_as_they_were(case):
    fields, options = CASES[case]
    model = language_model(**fields)
    params = random_params(model, **options)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 7))
    expected = np.asarray(jax.jit(model.apply)(params, tokens))
    for arranged in (model.arranged(params), model.arranged(jgptq.prepack(params))):
        # Sums in another order, of logits of order 1.
        np.testing.assert_allclose(logits_of_steps(model, arranged, tokens), expected[:, 4:], atol=2e-4, rtol=2e-4)


OTHERS = {
    "gemma2": {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 3},
    "qwen3_moe": {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    },
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 3,
    },
    "bloom": {"n_layer": 3, "n_head": 4},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_float_layers_in_runs_of_other_models(model_type):
    model = language_model(model_type, **OTHERS[model_type])
    params = random_params(model, grid_of=lambda path: None)
    arranged = model.arranged(params, stack_floats=True)
    assert arranged.runs == (((1, 3),) if model_type == "bloom" else ((2, 2),))
    assert_same(model.plain(arranged), params)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 7))
    expected = np.asarray(jax.jit(model.apply)(params, tokens))
    np.testing.assert_allclose(logits_of_steps(model, arranged, tokens), expected[:, 4:], atol=2e-4, rtol=2e-4)


def test_what_a_scan_would_copy_is_not_stacked():
    model = language_model(num_hidden_layers=2)
    params = random_params(model, grid_of=lambda path: None)
    arranged = model.arranged(params)
    assert arranged.runs == ((1, 1), (1, 1))
    for one, other in zip(jax.tree.leaves(arranged), jax.tree.leaves(params), strict=True):
        assert one is other


@pytest.mark.parametrize("order", [lambda params: params, jgptq.prepack], ids=["stored", "prepacked"])
def test_packed_experts_under_a_scan(order):
    """With their router in float, as checkpoints have it."""
    fields = OTHERS["qwen3_moe"] | {"decoder_sparse_step": 1, "num_hidden_layers": 3, "moe_intermediate_size": 48}
    model = language_model("qwen3_moe", **fields)

    def packed(path, leaf):
        if path[-1].key != "kernel" or path[-2].key == "gate":
            return leaf
        return jgptq.rtn(leaf, GRID)[0] if leaf.ndim == 2 else jax.vmap(lambda w: jgptq.rtn(w, GRID)[0])(leaf)

    params = order(jax.tree.map_with_path(packed, random_params(model, grid_of=lambda path: None)))
    arranged = model.arranged(params)
    assert arranged.runs == ((1, 3),)
    assert_same(model.plain(arranged), params)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 7))
    expected = np.asarray(jax.jit(model.apply)(params, tokens))
    np.testing.assert_allclose(logits_of_steps(model, arranged, tokens), expected[:, 4:], atol=2e-4, rtol=2e-4)


def test_float_experts_are_not_stacked():
    model = language_model("qwen3_moe", **OTHERS["qwen3_moe"] | {"decoder_sparse_step": 1, "num_hidden_layers": 2})
    packed = jax.eval_shape(
        lambda params: jax.tree.map_with_path(
            lambda path, leaf: jgptq.rtn(leaf, GRID)[0] if path[-1].key == "kernel" and leaf.ndim == 2 else leaf, params
        ),
        model.parameter_shapes,
    )
    assert jax.eval_shape(model.arranged, packed).runs == ((1, 1), (1, 1))


def test_one_layer_is_compiled_and_calls_the_kernel_for_each_product():
    """q, k and v; o; gate and up; down; and the head. No weight is dequantized or taken out of its stack."""
    model = language_model()
    params = random_params(model, dtype=jnp.bfloat16)
    arranged = jgptq.prepack(model.arranged(params))
    _, cache = jax.eval_shape(
        functools.partial(model.prefill, capacity=8), arranged, jnp.ones((1, 4), int), jnp.full(1, 4)
    )
    step = (arranged, jnp.ones(1, int), jnp.full(1, 4), cache)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
        traced = jax.jit(model.step).trace(*step)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    scans = [equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [3]
    assert text.count("mosaic_gpu_v2") == 5
    assert text.count("stablehlo.dot_general") == 2  # attention's
    assert not [line for line in text.splitlines() if "dynamic_slice" in line and "xui32>" in line]


@pytest.mark.parametrize("order", [lambda params: params, jgptq.prepack], ids=["stored", "prepacked"])
def test_an_exported_step_gives_the_same_logits(order):
    model = language_model(num_hidden_layers=12)  # more than a sort of their names as text would leave in order
    params = order(model.arranged(random_params(model, grid_of=lambda names: None if names[2:3] == [5] else GRID)))
    assert params.runs == ((1, 5), (1, 1), (1, 6))
    tokens, place = jnp.ones(2, jnp.int32), jnp.full(2, 4, jnp.int32)
    _, cache = jax.jit(functools.partial(model.prefill, capacity=8))(params, jnp.ones((2, 4), jnp.int32), place)
    step = jax.jit(model.step)
    written = jax.export.export(step)(*jax.eval_shape(lambda: (params, tokens, place, cache))).serialize()
    again = jax.export.deserialize(written).call(params, tokens, place, cache)
    assert_same(again, step(params, tokens, place, cache))


def test_generate_arranges_a_deep_model_and_gives_the_same_tokens(monkeypatch):
    module = importlib.import_module("jgptq.generate")
    model = language_model()
    params = random_params(model)
    seen = []
    inner = LanguageModel.step
    monkeypatch.setattr(
        LanguageModel, "step", lambda self, params, *rest: (seen.append(params), inner(self, params, *rest))[1]
    )
    expected = jgptq.generate(model, params, [[1, 2, 3], [4]], max_new_tokens=6)
    assert all(isinstance(params, dict) for params in seen)
    seen.clear()
    monkeypatch.setattr(module, "SHALLOW", 2)
    found = jgptq.generate(model, params, [[1, 2, 3], [4]], max_new_tokens=6)
    assert {params.runs for params in seen} == {((1, 3),)}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_donated_arrays_are_gone_once_they_are_stacked():
    model = language_model()
    params, again = random_params(model), random_params(model)
    expected = model.arranged(again)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))
    assert_same(model.arranged(params, donate=True), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["model"]["layers"]))
    assert not params["model"]["embed_tokens"]["embedding"].is_deleted()


def test_arrays_in_several_places_are_not_donated():
    """An order of inputs may be that of projections which are not joined, and is stacked once for each of them."""
    model = language_model()

    def params():
        params = random_params(model, permuted=True)
        for layer in params["model"]["layers"].values():
            order = layer["self_attn"]["q_proj"]["kernel"].permutation
            for part, name in (("self_attn", "k_proj"), ("self_attn", "v_proj"), ("mlp", "gate_proj")):
                layer[part][name]["kernel"] = dataclasses.replace(layer[part][name]["kernel"], permutation=order)
        return params

    assert_same(model.arranged(params(), donate=True), model.arranged(params()))


def test_saved_as_it_was(tmp_path):
    model = language_model()
    params = random_params(model, permuted=True)
    jgptq.save(tmp_path / "plain", model, params)
    jgptq.save(tmp_path / "arranged", model, jgptq.prepack(model.arranged(params)))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "arranged" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_on_a_hopper_gpu_kernels_come_to_its_order(monkeypatch):
    """Those that its kernel multiplies; and generate does it for a model of any depth."""
    model = language_model(tie_word_embeddings=True)
    params = random_params(model, dtype=jnp.bfloat16)
    table, _ = jgptq.rtn(params["model"]["embed_tokens"]["embedding"].astype(jnp.float32), GRID)
    params["model"]["embed_tokens"]["embedding"] = dataclasses.replace(table, dtype=jnp.dtype(jnp.bfloat16))
    here, seen = model.arranged(params), []
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER)):
        arranged = model.arranged(params)
        assert not model.arranged(random_params(model)).prepacked  # its activations are float32
        monkeypatch.setattr(LanguageModel, "prefill", lambda self, params, *rest: seen.append(params))
        with pytest.raises(TypeError):  # None, in place of logits and a cache
            jgptq.generate(model, params, [1, 2, 3], max_new_tokens=1)
    assert [params.prepacked for params in seen] == [True]
    assert arranged.prepacked
    assert not here.prepacked
    assert_same(arranged.params["model"]["layers"], jgptq.prepack(here.params["model"]["layers"]))
    assert_same(arranged.params["model"]["embed_tokens"], params["model"]["embed_tokens"])
    assert_same(model.plain(arranged), params)


def test_projections_of_other_forms_stay_apart():
    weight = random_params(language_model())["lm_head"]["kernel"]
    order = jnp.arange(32)
    changes = {
        "group_size": 8,
        "dtype": jnp.dtype(jnp.bfloat16),
        "zeros": None,
        "scales": weight.scales.astype(jnp.float32),
        "permutation": order,
        "layout": dataclasses.replace(weight.layout, shape=(40, 32), factors=(40, 32), in_axes=(1,), out_axes=(0,)),
    }
    assert tensor.side_by_side([weight, weight]).shape == (32, 80)
    for name, value in changes.items():
        assert tensor.side_by_side([weight, dataclasses.replace(weight, **{name: value})]) is None
    orders = [dataclasses.replace(weight, permutation=values) for values in (order, order[::-1])]
    assert tensor.side_by_side(orders) is None
    assert tensor.side_by_side(orders[:1] * 2).permutation is order


def test_what_is_joined():
    model = language_model()
    layer = jgptq.prepack(model.arranged(random_params(model))).params["model"]["layers"]["0"]["layers"]["0"]
    attention, mlp = layer["self_attn"], layer["mlp"]
    assert isinstance(attention["q_proj"]["kernel"].weight, Prepacked)
    for joined, widths in ((attention["q_proj"]["kernel"], (32, 16, 16)), (mlp["gate_proj"]["kernel"], (48, 48))):
        assert isinstance(joined, Joined)
        assert joined.widths == widths
        assert joined.weight.shape == (3, 32, sum(widths))
    assert attention["k_proj"]["kernel"] is mlp["up_proj"]["kernel"] is None
