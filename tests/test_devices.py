"""Several devices and several processes, in processes of their own; and what a run leaves as it was."""

import functools
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jgptq
from jgptq import tensor
from jgptq.models.language_model import LanguageModel
from jgptq.models.llama import ARCHITECTURE, LlamaConfig
from jgptq.partition import Partition, auto
from jgptq.sharding import solve_by_outputs
from jgptq.solves import solve_matrix

HERE = Path(__file__).parent / "devices"


def environment(**more):
    flags = "--xla_cpu_use_fusion_emitters=false " if jax.__version_info__ < (0, 11) else ""
    return {**os.environ, "JAX_PLATFORMS": "cpu", **more, "XLA_FLAGS": flags + more.get("XLA_FLAGS", "")}


def test_on_eight_devices():
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "eight.py"), "-n", "0"]
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(XLA_FLAGS=flags), cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout


def test_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "error", str(HERE / "two_processes.py")]
    running = [
        subprocess.Popen(
            [*command, str(number), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert all("\nequal\n" in text for text in said), "\n".join(said)


class TestKernel:
    """The Hopper kernel is lowered for the parts of a divided weight."""

    MESH = AbstractMesh(
        (2, 4),
        ("data", "model"),
        abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
    )

    @staticmethod
    def weight(batch=()):
        def make(codes, scales):
            layout = tensor.Layout.dense(1024, 512).stacked(batch)
            return tensor.from_codes(
                codes, scales, scales.astype(jnp.uint8), grid=jgptq.Grid(bits=4, group_size=128), layout=layout
            )

        codes = jax.ShapeDtypeStruct((*batch, 1024, 512), jnp.uint8)
        return jax.eval_shape(make, codes, jax.ShapeDtypeStruct((*batch, 8, 512), jnp.float16))

    @staticmethod
    def lowered(f, *arguments):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    @pytest.mark.parametrize(("by_inputs", "part"), [((), "1024x128"), (("*",), "256x512")])
    def test_it_gets_a_part(self, by_inputs, part):
        divided = jgptq.shard(self.weight(), self.MESH, by_inputs=by_inputs)
        inputs, outputs = map(int, part.split("x"))
        assert divided.codes.sharding.shard_shape(divided.codes.shape) == (inputs // 8, outputs)
        x = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)
        prepacked = jax.eval_shape(jgptq.prepack, divided)
        text = self.lowered(jgptq.matmul, x, prepacked)
        assert text.count("mosaic_gpu_v2") == 1
        assert ("stablehlo.all_reduce" in text) == bool(by_inputs)
        (call,) = (line for line in text.splitlines() if "mosaic_gpu_v2" in line)
        assert f"tensor<{inputs // 128 * outputs}x16xui32>" in call  # the codes of the part

    def test_experts_and_elements(self):
        divided = jgptq.shard(self.weight((3,)), self.MESH)
        prepacked = jax.eval_shape(jgptq.prepack, divided)
        x, counts = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)
        assert self.lowered(jgptq.grouped_matmul, x, prepacked, counts).count("mosaic_gpu_v2") > 0

    def test_a_decoding_step_of_a_model(self):
        """Layers and what is alike in them are lowered once: q, k and v; the attention's output; gate and up; down."""
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LanguageModel(architecture=ARCHITECTURE, config=config)

        def made(path, leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
            packed = "proj" in jax.tree_util.keystr(path)
            return (
                jax.eval_shape(lambda w: jgptq.rtn(w, jgptq.Grid(bits=4, group_size=32))[0], leaf) if packed else leaf
            )

        params = jax.tree_util.tree_map_with_path(made, model.parameter_shapes)
        arranged = jax.eval_shape(model.arranged, jgptq.shard(params, self.MESH))
        assert arranged.prepacked
        assert arranged.runs == ((1, 3),)
        tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
        _, cache = jax.eval_shape(
            lambda params, tokens: model.prefill(params, tokens[:, None], tokens, 64), arranged, tokens
        )
        text = self.lowered(model.step, arranged, tokens, tokens, cache)
        assert text.count("mosaic_gpu_v2") == 4
        assert text.count("stablehlo.all_reduce") == 2  # of the attention's output and of down

    def test_a_solve_gets_a_part(self):
        """Each of eight devices solves 64 of 512 outputs by the solver's kernel."""
        method, grid = jgptq.GPTQ(scale_search=None, sweeps=0), jgptq.Grid(bits=4, group_size=64)
        w = jax.ShapeDtypeStruct((128, 512), jnp.float32)
        shared = jax.eval_shape(lambda: method.prepare(jgptq.init_hessian(128), grid))
        solve = functools.partial(solve_by_outputs, solve=solve_matrix, grid=grid, method=method, mesh=auto(self.MESH))
        text = self.lowered(solve, w, w, shared)
        calls = [line for line in text.splitlines() if "mosaic_gpu_v2" in line]
        assert calls
        assert all("x64xf32>" in line and "x512xf32>" not in line for line in calls)

    def test_by_name_on_float32_it_refuses(self):
        prepacked = jax.eval_shape(jgptq.prepack, jgptq.shard(self.weight(), self.MESH))
        with pytest.raises(ValueError, match="cannot serve this product: x is float32"):
            jax.eval_shape(
                lambda x, w: jgptq.matmul(x, w, implementation="hopper"),
                jax.ShapeDtypeStruct((4, 1024), jnp.float32),
                prepacked,
            )


def test_exported_programs_know_the_partition():
    partition = Partition(mesh=auto(AbstractMesh((2, 4), ("data", "model"))), axis="model", of="inputs")
    for one in (partition, None):
        static = (4, 128, jnp.dtype("bfloat16"), tensor.Layout.dense(1024, 512), one)
        assert tensor.static_from_bytes(tensor.static_to_bytes(static)) == static


def test_an_axis_that_is_none():
    mesh = jax.make_mesh((1,), ("x",))
    with pytest.raises(ValueError, match=r"axis='model'; the mesh has the axes \('x',\)"):
        jgptq.shard({}, mesh)


def test_one_device_is_a_mesh_too():
    weight, _ = jgptq.rtn(jnp.full((32, 16), 0.5), jgptq.Grid(bits=4, group_size=16))
    divided = jgptq.shard({"w": weight, "b": jnp.ones(16)}, jax.make_mesh((1,), ("model",)))
    assert divided["w"].partition.size == 1
    assert isinstance(divided["b"].sharding, NamedSharding)
    assert divided["b"].sharding.spec == P()
    np.testing.assert_array_equal(
        jgptq.matmul(jnp.ones((2, 32)), divided["w"]), jgptq.matmul(jnp.ones((2, 32)), weight)
    )


def test_the_same_bits_again():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(32, 32)), jnp.float32) for name in "ab"}
    batches = [jnp.asarray(rng.normal(size=(4, 16, 32)), jnp.float32) for _ in range(2)]

    def f(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def run(batches):
        method = jgptq.GPTQ(scale_search=None, sweeps=0)
        return jgptq.quantize(f, params, batches, grid=jgptq.Grid(bits=4, group_size=16), method=method)

    first, report = run(batches)
    jax.tree.map(np.testing.assert_array_equal, run(batches)[0], first)
    # In other batches sums round in another order: the errors are the same, and so are nearly all codes.
    for split in ([np.concatenate(batches)], [x[None] for batch in batches for x in batch]):
        other, again = run(split)
        for one, two in zip(report.rows, again.rows, strict=True):
            np.testing.assert_allclose(two.relative_error, one.relative_error, rtol=0.02)
            assert two.tokens == one.tokens
        assert np.mean(np.asarray(other["a"].codes) != np.asarray(first["a"].codes)) < 0.05


def test_global_random_states_stay_as_they_are(without_type_checker):
    """The type checker of the tests draws numbers, and so looks at an element of a list."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    x = jnp.eye(16)
    jgptq.quantize(lambda w, x: x @ w, jnp.ones((16, 16)), [x], grid=jgptq.Grid(bits=4, group_size=16), method="rtn")
    assert random.getstate() == states[0]
    jax.tree.map(np.testing.assert_array_equal, np.random.get_state()[1:], states[1][1:])  # noqa: NPY002
