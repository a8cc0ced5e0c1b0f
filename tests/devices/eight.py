"""On eight simulated devices: run by tests/test_devices.py in a process of its own, since a process has them or not."""

import collections
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jgptq
from jgptq import tensor
from jgptq.models.language_model import LanguageModel
from jgptq.models.llama import ARCHITECTURE, LlamaConfig
from jgptq.sharding import solve_by_outputs
from jgptq.solvers.method import pack
from jgptq.solves import solve_matrix

GRID = jgptq.Grid(bits=4, group_size=16)
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def mesh_of(data, model, types=AxisType.Explicit):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(types, types))


def ran(f, *arguments):
    """f's result, and what its compiled program sends between devices: (result, how), and how often."""
    compiled = jax.jit(f).lower(*arguments).compile()
    pattern = r"= (.+?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)[-a-z]*\("
    return compiled(*arguments), collections.Counter(re.findall(pattern, compiled.as_text()))


def assert_nothing_packed(sent):
    assert not [result for result, _ in sent if re.search(r"[us](8|32)\[|f16", result)], sent


def packed(inputs, outputs, grid, batch=()):
    """A weight of random codes, and its matrix in float64."""
    codes = RNG.integers(0, 2**grid.bits, (*batch, inputs, outputs)).astype(np.uint8)
    groups = (*batch, inputs // grid.group_length(inputs), outputs)
    zeros = RNG.integers(0, 2**grid.bits, groups).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.1, groups).astype(np.float16)
    layout = tensor.Layout.dense(inputs, outputs).stacked(batch)
    weight = pack(codes, scales, zeros, grid=grid, layout=layout)
    zeros = 2 ** (grid.bits - 1) if grid.symmetric else zeros.repeat(grid.group_length(inputs), axis=-2)
    return weight, (codes - np.float64(zeros)) * scales.repeat(grid.group_length(inputs), axis=-2)


def test_there_are_eight():
    assert len(jax.devices()) == 8


METHOD = jgptq.GPTQ(scale_search=None, sweeps=0)  # targets and all, but quickly compiled


def network(params, x):
    def layer(x, weights):
        return x + jax.nn.silu(x @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = jax.lax.ragged_dot(x.reshape(-1, 32), params["experts"], jnp.array([60, 0, 68], jnp.int32)).reshape(x.shape)
    return x @ params["head"]


@pytest.fixture(scope="module")
def given():
    layers = {"up": normal(2, 32, 32, scale=0.2), "down": normal(2, 32, 32, scale=0.2)}
    params = {"layers": layers, "experts": normal(3, 32, 32, scale=0.2)}
    params |= {"head": normal(32, 32, scale=0.2)}
    x = normal(8, 16, 32)
    settings = {"grid": GRID, "method": METHOD, "rules": [("experts", jgptq.Options(method="rtn"))]}
    return params, x, settings, jgptq.quantize(network, params, [x], **settings)


class TestQuantize:
    """Batches divided along the data axis and weights along the model axis: the codes of one device."""

    @pytest.mark.filterwarnings("ignore::jgptq.QuantizationWarning")
    def test_codes_and_errors_are_those_of_one_device(self, given):
        params, x, settings, (expected, report) = given
        mesh = mesh_of(2, 4)
        layers = {
            "up": jax.device_put(params["layers"]["up"], NamedSharding(mesh, P(None, None, "model"))),
            "down": jax.device_put(params["layers"]["down"], NamedSharding(mesh, P(None, "model"))),
        }
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found, other = jgptq.quantize(network, params | {"layers": layers}, [x], **settings, offload="host")
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
        different = np.concatenate([np.ravel(np.asarray(one) != np.asarray(many)) for one, many in pairs])
        # Sums differ in their last bits, and so may codes of which two are as good. Here none of 1,600 words does.
        assert np.mean(different) < 0.01
        for one, many in zip(report.rows, other.rows, strict=True):
            numbers = [(row.loss, row.relative_error, row.rtn_error, row.damp, row.tokens) for row in (one, many)]
            np.testing.assert_allclose(*numbers, rtol=1e-4)

    def test_two_meshes(self, given):
        params, x, settings, _ = given
        halves = [jax.sharding.Mesh(np.array(devices), ("data",)) for devices in (jax.devices()[:4], jax.devices()[4:])]
        params = jax.device_put(params, NamedSharding(halves[0], P()))
        with pytest.raises(ValueError, match=r"several meshes .* put all of them on one"):
            jgptq.quantize(network, params, [jax.device_put(x, NamedSharding(halves[1], P("data")))], **settings)

    @pytest.mark.parametrize("axes", ["data", ("data", "model")])
    def test_hessians_are_summed_where_tokens_are(self, axes):
        mesh = mesh_of(2, 4, AxisType.Auto)
        x = jax.device_put(normal(8, 16, 64), NamedSharding(mesh, P(axes)))
        hessian, sent = ran(jgptq.update_hessian, jgptq.init_hessian(64), x)
        assert sent == {("f32[64,64]{1,0}", "all-reduce"): 1}
        np.testing.assert_allclose(hessian.total, np.einsum("bti,btj->ij", x, x), rtol=1e-5, atol=1e-4)

    def test_no_device_sees_all_outputs(self):
        mesh = mesh_of(2, 4, AxisType.Auto)
        w = jax.device_put(normal(64, 128), NamedSharding(mesh, P(None, "model")))
        hessian = jgptq.update_hessian(jgptq.init_hessian(64), normal(256, 64))
        shared = jax.device_put(METHOD.prepare(hessian, GRID), NamedSharding(mesh, P()))

        def solve(w, shared):
            return solve_by_outputs(w, w, shared, solve=solve_matrix, grid=GRID, method=METHOD, mesh=mesh)

        (weight, info, _), sent = ran(solve, w, shared)
        assert {how for _, how in sent} == {"all-reduce"}, sent
        assert not any(re.search(r"\[\d", result) for result, _ in sent), sent  # only scalars
        assert weight.codes.sharding.shard_shape(weight.codes.shape) == (8, 16)
        expected, single = METHOD.solve(w, shared, GRID)
        np.testing.assert_array_equal(weight.codes, expected.codes)
        for name in ("loss", "relative_error", "output"):
            np.testing.assert_allclose(getattr(info, name), getattr(single, name), rtol=1e-5)


def test_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = text.partition("### Several devices\n")[2].partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    expected = names["f"](names["params"], names["batches"][0])
    assert np.linalg.norm(names["y"] - expected) < 0.2 * np.linalg.norm(expected)
    assert [weight.partition.of for weight in names["params_q"].values()] == ["inputs", "outputs"]


class TestMatmul:
    @pytest.mark.parametrize("by_inputs", [(), ("*",)], ids=["outputs", "inputs"])
    @pytest.mark.parametrize(
        ("inputs", "outputs", "grid"),
        [
            (512, 256, jgptq.Grid(bits=4, group_size=32)),
            (768, 64, jgptq.Grid(bits=3, group_size=None, symmetric=True)),
        ],
        ids=["4 bits", "3 bits, one group"],
    )
    def test_values_and_transfers(self, inputs, outputs, grid, by_inputs):
        weight, exact = packed(inputs, outputs, grid)
        divided = jgptq.shard(weight, mesh_of(2, 4), by_inputs=by_inputs)
        assert divided.partition.of == ("inputs" if by_inputs else "outputs")
        assert divided.codes.addressable_data(0).size * 4 == weight.codes.size
        np.testing.assert_allclose(divided.dequantize(), exact, rtol=1e-6)
        prepacked = jgptq.prepack(divided)
        jax.tree.map(np.testing.assert_array_equal, jgptq.unprepack(prepacked), divided)
        for form, rows in ((divided, (2,)), (divided, (2, 70)), (prepacked, (3, 1))):
            x = normal(*rows, inputs)
            y, sent = ran(jgptq.matmul, x, form)
            # Sums of 768 products of about 0.5 in float32, in another order.
            np.testing.assert_allclose(y, np.asarray(x) @ exact, atol=1e-3)
            assert {how for _, how in sent} == ({"all-reduce"} if by_inputs else set()), sent

    @pytest.mark.parametrize("by_inputs", [(), ("*",)], ids=["outputs", "inputs"])
    def test_transformations(self, by_inputs):
        weight, exact = packed(128, 16, GRID)
        x = normal(3, 2, 128, scale=0.1)
        divided = jgptq.shard(weight, mesh_of(1, 8), by_inputs=by_inputs)
        slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jgptq.matmul(x, divided)))))(x)
        np.testing.assert_allclose(slope, np.cos(x @ exact) @ exact.T, atol=1e-4)
        mapped = jax.jit(jax.vmap(jgptq.matmul, in_axes=(0, None)))(x, divided)
        np.testing.assert_allclose(mapped, x @ exact, atol=1e-4)

    @pytest.mark.parametrize("order", [lambda weight: weight, jgptq.prepack], ids=["stored", "prepacked"])
    def test_experts(self, order):
        experts, exact = packed(128, 32, GRID, batch=(4,))
        divided = order(jgptq.shard(experts, mesh_of(2, 4), by_inputs=("*",)))
        x = normal(12, 128)
        y, sent = ran(lambda x, w: jgptq.grouped_matmul(x, w, jnp.array([5, 0, 4, 3])), x, divided)
        expected = np.einsum("ri,rio->ro", x, exact.repeat([5, 0, 4, 3], axis=0))
        np.testing.assert_allclose(y, expected, atol=1e-4)
        assert_nothing_packed(sent)

    def test_in_the_callers_own_mesh(self):
        """Under jax.set_mesh, and inside a shard_map over another axis; not inside one over the weight's."""
        mesh = mesh_of(2, 4, AxisType.Auto)
        weight, exact = packed(128, 32, GRID)
        divided, x = jgptq.shard(weight, mesh), normal(4, 128)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(jgptq.matmul(x, divided), x @ exact, atol=1e-4)

        def over(axis):
            rows = P(axis)
            mapped = jax.shard_map(
                lambda x: jgptq.matmul(x, divided), mesh=mesh, axis_names={axis}, in_specs=rows, out_specs=rows
            )
            return jax.jit(mapped)(x)

        np.testing.assert_allclose(over("data"), x @ exact, atol=1e-4)
        with pytest.raises(ValueError, match=r"divided over the mesh axis 'model'.*outside of shard_map"):
            over("model")

    def test_what_cannot_be_divided(self):
        """Inputs in parts of groups, or permuted: outputs are divided; odd outputs as well: each device has a copy."""
        mesh, coarse = mesh_of(2, 4), jgptq.Grid(bits=4, group_size=32)
        permuted = dataclasses.replace(packed(64, 32, GRID)[0], permutation=jnp.arange(64)[::-1])
        weights = permuted, packed(64, 32, coarse)[0], packed(64, 31, coarse)[0]
        for weight, of in zip(weights, ("outputs", "outputs", None), strict=True):
            divided = jgptq.shard(weight, mesh, by_inputs=("*",))
            assert (divided.partition and divided.partition.of) == of
            assert all(len(array.sharding.device_set) == 8 for array in jax.tree.leaves(divided))
            np.testing.assert_array_equal(divided.dequantize(), weight.dequantize())


class TestModel:
    def test_it_generates_as_on_one_device(self, monkeypatch):
        monkeypatch.setattr("jgptq.sharding.LARGE", 2**13)  # else the table of tokens is too small to be divided
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LanguageModel(architecture=ARCHITECTURE, config=config)

        def made(path, leaf):
            return packed(*leaf.shape, GRID)[0] if "proj" in jax.tree_util.keystr(path) else normal(*leaf.shape)

        params = jax.tree_util.tree_map_with_path(made, model.parameter_shapes)
        divided = jgptq.shard(params, mesh_of(2, 4))
        layer = divided["model"]["layers"][0]
        assert layer["self_attn"]["q_proj"]["kernel"].partition.of == "outputs"
        assert layer["mlp"]["down_proj"]["kernel"].partition.of == "inputs"
        assert divided["model"]["embed_tokens"]["embedding"].sharding.spec == P("model")
        arranged = model.arranged(divided)
        assert arranged.runs == ((1, 2),)
        jax.tree.map(np.testing.assert_array_equal, model.plain(arranged), divided)

        prompts = RNG.integers(0, 256, (2, 6))
        tokens = np.array(jgptq.generate(model, arranged, list(prompts), max_new_tokens=6))
        expected = jax.jit(model.apply)(params, tokens)
        np.testing.assert_array_equal(np.argmax(expected, axis=-1)[:, 5:-1], tokens[:, 6:])
        for form in (divided, arranged):
            logits, sent = ran(model.apply, form, tokens)
            np.testing.assert_allclose(logits, expected, atol=1e-3 * np.max(np.abs(expected)))
            assert_nothing_packed(sent)
            assert not any(how == "all-gather" for _, how in sent), sent
