"""Parameters that stay on disk: the same values as in memory, the same bytes when saved, and one at a time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jgptq import checkpoints, grid, tensor
from jgptq.checkpoints import reading, tensor_file
from jgptq.models import MODELS, LanguageModel
from jgptq.models.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, attention_bias=True
)
MODEL = LanguageModel(architecture=MODELS["llama"], config=CONFIG)
SHAPES = MODEL.parameter_shapes

from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def float_params(dtype=jnp.float32):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.1, leaf.shape), dtype), SHAPES)


def packed_params():
    """One kernel of each kind: symmetric, asymmetric with a permutation, and one left in float."""
    random = np.random.default_rng(1)
    params = float_params()
    layer = params["model"]["layers"][0]["mlp"]
    for name, symmetric in (("up_proj", True), ("down_proj", False)):
        inputs, outputs = layer[name]["kernel"].shape
        groups = -(-inputs // 16)
        layer[name]["kernel"] = from_codes(
            jnp.asarray(random.integers(0, 8, (inputs, outputs)), jnp.uint32),
            jnp.asarray(random.uniform(0.01, 0.1, (groups, outputs)), jnp.float32),
            None if symmetric else jnp.asarray(random.integers(0, 8, (groups, outputs)), jnp.uint8),
            grid=grid.Grid(bits=3, group_size=16, symmetric=symmetric),
            permutation=None if symmetric else jnp.asarray(np.argsort(np.arange(inputs) % groups), jnp.int32),
        )
    # Rows of the last, short group must be the ones that the permutation leaves over.
    natural = np.arange(44) // 16
    layer["down_proj"]["kernel"] = tensor.QuantizedTensor(
        **vars(layer["down_proj"]["kernel"])
        | {"permutation": jnp.asarray(np.argsort(random.permutation(natural), kind="stable"), jnp.int32)}
    )
    return params


class Watched:
    """A lazy array that knows how many arrays of its kind are alive."""

    alive = peak = 0

    def __init__(self, array):
        self.array = np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.ndim, self.nbytes = self.array.ndim, self.array.nbytes

    def __getitem__(self, index):
        copy = self.array[index].copy().view(Counted)
        Watched.alive += 1
        Watched.peak = max(Watched.peak, Watched.alive)
        copy.counted = True
        return copy


class Counted(np.ndarray):
    counted = False

    def __del__(self):
        Watched.alive -= self.counted


def directory_bytes(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize(("params", "arrays"), [(float_params, 1), (packed_params, 4)])
def test_lazy_trees_give_the_same_bytes_and_one_leaf_is_in_memory(params, arrays, max_shard_bytes, tmp_path):
    params = params()
    checkpoints.save(tmp_path / "whole", MODEL, params, max_shard_bytes=max_shard_bytes)
    lazy = jax.tree.map(Watched, params)
    Watched.peak = 0
    checkpoints.save(tmp_path / "lazy", MODEL, lazy, max_shard_bytes=max_shard_bytes)
    assert directory_bytes(tmp_path / "lazy") == directory_bytes(tmp_path / "whole")
    # The arrays of one leaf: a float leaf has one, the largest packed one codes, scales, zeros and permutation.
    assert Watched.peak == arrays
    assert Watched.alive == 0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_lazy_parameters_read_as_the_ones_in_memory(stored, dtype, tmp_path):
    checkpoints.save(tmp_path / "model", MODEL, float_params(jnp.dtype(stored)))
    eager = checkpoints.load(tmp_path / "model", dtype=dtype)[1]
    lazy = checkpoints.load(tmp_path / "model", dtype=dtype, lazy=True)[1]
    assert jax.tree.structure(eager) == jax.tree.structure(lazy)
    for leaf, wanted in zip(jax.tree.leaves(lazy), jax.tree.leaves(eager), strict=True):
        assert not isinstance(leaf, jax.Array | np.ndarray)
        assert (leaf.shape, leaf.ndim, leaf.dtype, leaf.nbytes) == (
            wanted.shape,
            wanted.ndim,
            wanted.dtype,
            wanted.nbytes,
        )
        assert leaf[...].dtype == wanted.dtype
        np.testing.assert_array_equal(leaf[...], wanted)
        np.testing.assert_array_equal(leaf[3:9], wanted[3:9])


def test_a_kernel_of_many_blocks_is_transposed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 32 * 7)
    params = float_params()
    checkpoints.save(tmp_path / "model", MODEL, params)
    lazy = checkpoints.load(tmp_path / "model", lazy=True)[1]
    jax.tree.map(lambda leaf, wanted: np.testing.assert_array_equal(leaf[...], wanted), lazy, params)


INDICES = [..., (), 1, -1, slice(1), slice(0, 2, 2), (1, slice(2, 5)), (slice(1, None), ..., 3), (..., 2), ([1, 0],)]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_a_stack_are_those_of_numpy(transposed, index, tmp_path):
    array = np.random.default_rng(0).normal(size=(2, 6, 7)).astype(np.float32)
    stack = stack_of(array, tmp_path, transposed)
    wanted = array.transpose(0, 2, 1) if transposed else array
    assert (stack.shape, stack.ndim, stack.dtype, stack.nbytes) == (wanted.shape, 3, np.float32, wanted.nbytes)
    np.testing.assert_array_equal(stack[index], wanted[index])


def stack_of(array, directory, transposed):
    """A LazyStack with each part in a file of its own."""
    parts = []
    for number, part in enumerate(array):
        save_file({"part": part}, directory / str(number))
        stored = tensor_file.read_header(directory / str(number))[0]["part"]
        parts.append(reading.LazyParameter(stored=stored, dtype=array.dtype, transposed=transposed))
    return reading.LazyStack(parts=tuple(parts))


@pytest.mark.parametrize("index", [0, slice(0, 1), (0, slice(2)), (slice(0, 1), 3)], ids=str)
def test_only_the_parts_of_a_stack_that_are_asked_for_are_read(index, tmp_path):
    stack = stack_of(np.zeros((2, 6, 7), np.float32), tmp_path, transposed=True)
    (tmp_path / "1").unlink()
    assert not stack[index].any()
    with pytest.raises(FileNotFoundError):
        stack[...]


def test_doubles_are_read_as_single_precision(tmp_path):
    checkpoints.save(tmp_path / "model", MODEL, float_params())
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = np.linspace(0, 1, 32) / 3
    save_file(tensors, file)
    (norm,) = checkpoints.load(tmp_path / "model", lazy=True)[1]["model"]["norm"].values()
    assert norm.dtype == norm[...].dtype == np.float32
    np.testing.assert_array_equal(norm[...], (np.linspace(0, 1, 32) / 3).astype(np.float32))


def test_packed_weights_are_read_at_once(tmp_path):
    params = packed_params()
    checkpoints.save(tmp_path / "model", MODEL, params)
    lazy = checkpoints.load(tmp_path / "model", lazy=True)[1]["model"]["layers"][0]["mlp"]["down_proj"]["kernel"]
    wanted = params["model"]["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert isinstance(lazy, tensor.QuantizedTensor)
    jax.tree.map(np.testing.assert_array_equal, lazy, wanted)


def test_a_lazy_model_is_saved_again_byte_for_byte(tmp_path):
    checkpoints.save(tmp_path / "first", MODEL, float_params(jnp.bfloat16))
    model, params = checkpoints.load(tmp_path / "first", lazy=True)
    checkpoints.save(tmp_path / "second", model, params)
    assert directory_bytes(tmp_path / "first") == directory_bytes(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["torch_dtype"] == "bfloat16"
