"""Whole model directories: saved and loaded again, and refused with one clear line."""

import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jgptq import checkpoints, grid, tensor
from jgptq.models import MODELS, LanguageModel
from jgptq.models.llama import LlamaConfig

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": (1, 2),
}


from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def language_model(**options):
    return LanguageModel(architecture=MODELS["llama"], config=LlamaConfig(**{**SIZES, **options}))


def float_params(model, dtype=jnp.float32):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.1, leaf.shape), dtype), model.parameter_shapes)


def packed_params(model, choose, dtype=jnp.float32):
    """Kernels replaced by random codes on the grid `choose(path)` gives; None leaves one as it is."""
    random = np.random.default_rng(0)

    def packed(keys, leaf):
        own = choose(tuple(key.key for key in keys)) if keys[-1].key == "kernel" else None
        if own is None:
            return leaf
        length = own.group_length(leaf.shape[0])
        groups = -(-leaf.shape[0] // length)
        return from_codes(
            jnp.asarray(random.integers(0, 2**own.bits, leaf.shape), jnp.uint32),
            jnp.asarray(random.uniform(0.01, 0.1, (groups, leaf.shape[1])), jnp.float32),
            jnp.asarray(random.integers(0, 2**own.bits, (groups, leaf.shape[1])), jnp.uint8),
            grid=own,
            permutation=jnp.asarray(
                np.argsort(random.permutation(np.arange(leaf.shape[0]) // length), kind="stable").astype(np.int32)
            )
            if keys[-2].key == "up_proj" and groups > 1
            else None,
            dtype=leaf.dtype,
        )

    return jax.tree_util.tree_map_with_path(packed, float_params(model, dtype))


def assert_identical(given, wanted):
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


GRIDS = {
    "4 bits": lambda path: grid.Grid(bits=4, group_size=16),
    "3 bits symmetric": lambda path: grid.Grid(bits=3, group_size=32, symmetric=True),
    "one group": lambda path: grid.Grid(bits=2, group_size=None),
    "wide scales": lambda path: grid.Grid(bits=8, group_size=128, scale_dtype="bfloat16"),
    "mixed": lambda path: {
        "q_proj": grid.Grid(bits=8, group_size=16),
        "k_proj": grid.Grid(bits=4, group_size=None, symmetric=True),
        "down_proj": grid.Grid(bits=3, group_size=16),
        "lm_head": None,
        "o_proj": None,
    }.get(path[-2], grid.Grid(bits=4, group_size=16)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", GRIDS)
def test_packed_parameters_survive_bit_for_bit(name, dtype, tmp_path):
    model = language_model(attention_bias=True)
    params = packed_params(model, GRIDS[name], dtype)
    checkpoints.save(tmp_path / "out", model, params)
    again, read = checkpoints.load(tmp_path / "out")
    assert again == model
    assert_identical(read, params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float_parameters_survive_and_say_nothing_of_quantization(dtype, tmp_path):
    model = language_model(tie_word_embeddings=True)
    params = float_params(model, dtype)
    checkpoints.save(tmp_path / "out", model, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == jnp.dtype(dtype).name
    again, read = checkpoints.load(tmp_path / "out")
    assert again == model
    assert_identical(read, params)


def test_packed_weight_keeps_a_dtype_that_is_not_the_models(tmp_path):
    model = language_model()
    params = packed_params(model, lambda path: grid.Grid() if path[-2] == "q_proj" else None)
    attention = params["model"]["layers"][0]["self_attn"]["q_proj"]
    attention["kernel"] = tensor.QuantizedTensor(**{**vars(attention["kernel"]), "dtype": jnp.dtype("bfloat16")})
    checkpoints.save(tmp_path / "out", model, params)
    assert_identical(checkpoints.load(tmp_path / "out")[1], params)


def test_dtype_replaces_what_is_stored(tmp_path):
    model = language_model()
    checkpoints.save(tmp_path / "out", model, packed_params(model, GRIDS["mixed"]))
    params = checkpoints.load(tmp_path / "out", dtype=jnp.bfloat16)[1]
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, tensor.QuantizedTensor))
    assert {jnp.dtype(leaf.dtype).name for leaf in leaves} == {"bfloat16"}
    with pytest.raises(ValueError, match="give a floating-point dtype"):
        checkpoints.load(tmp_path / "out", dtype="int8")


def test_shards_are_bounded_and_read_back(tmp_path):
    model = language_model()
    params = packed_params(model, GRIDS["4 bits"])
    checkpoints.save(tmp_path / "out", model, params, max_shard_bytes=8_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(sum(array.nbytes for array in load_file(tmp_path / "out" / shard).values()) <= 8_000 for shard in shards)
    assert_identical(checkpoints.load(tmp_path / "out")[1], params)


def test_tokenizer_files_follow_the_model(tmp_path):
    model = language_model()
    params = float_params(model)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "weights.bin").write_text("not wanted")
    checkpoints.save(tmp_path / "first", model, params, tokenizer_from=tmp_path / "tokenizer")
    loaded, _ = checkpoints.load(tmp_path / "first")
    checkpoints.save(tmp_path / "second", loaded, params)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in (tmp_path / "second").iterdir()) == names
    with pytest.raises(FileNotFoundError, match=r"tokenizer_from=.* is not a directory"):
        checkpoints.save(tmp_path / "third", model, params, tokenizer_from=tmp_path / "nowhere")


def test_transformers_reads_the_config_and_float_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    model = language_model(attention_bias=True)
    params = float_params(model)
    checkpoints.save(tmp_path / "out", model, params)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = np.random.default_rng(0).integers(0, 48, (1, 20))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    # Float32 sums in another order; logits are well below 1 at initialization.
    np.testing.assert_allclose(model.apply(params, jnp.asarray(tokens, jnp.int32)), expected, atol=1e-4)


def test_old_directories_keep_the_quantization_config_beside(tmp_path):
    model = language_model()
    params = packed_params(model, GRIDS["3 bits symmetric"])
    checkpoints.save(tmp_path / "out", model, params)
    edit_config(tmp_path / "out", quantization_config=None)
    assert_identical(checkpoints.load(tmp_path / "out")[1], params)


# A directory as AutoGPTQ wrote it, and as most GPTQ models on the hub are: its own file name, zeros for biases that the
# layers do not have, a quantize_config.json that says nothing of the version.
AUTOGPTQ_CONFIG = {
    "bits": 4,
    "group_size": 16,
    "damp_percent": 0.01,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "gptq_model-4bit-16g",
}


@pytest.fixture
def autogptq(tmp_path):
    """The directory and the parameters in it."""
    model, directory = language_model(), tmp_path / "autogptq"
    params = packed_params(
        model, lambda path: None if path[-2] == "lm_head" else grid.Grid(group_size=16, symmetric=True), jnp.float16
    )
    checkpoints.save(directory, model, params)
    edit_config(directory, quantization_config=None, architectures=["LlamaForCausalLM"], torch_dtype="float16")
    (directory / "quantize_config.json").write_text(json.dumps(AUTOGPTQ_CONFIG))

    def add_biases(tensors):
        for name in [name for name in tensors if name.endswith(".qweight")]:
            tensors[name.replace("qweight", "bias")] = np.zeros(tensors[name].shape[1], np.float16)

    edit_tensors(directory, add_biases)
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-16g.safetensors")
    return directory, params


def test_autogptq_directory_is_read_packed(autogptq, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a dequantized copy was made")

    directory, params = autogptq
    for module, name in ((tensor, "stored_matrix"), (tensor, "unpack_columns"), (tensor.QuantizedTensor, "dequantize")):
        monkeypatch.setattr(module, name, refuse)
    read = checkpoints.load(directory)[1]
    assert_identical(read, params)
    assert read["model"]["layers"][0]["mlp"]["up_proj"]["kernel"].permutation is not None


def test_autogptq_bias_that_is_not_zero_is_refused(autogptq):
    directory, _ = autogptq
    weights = directory / "gptq_model-4bit-16g.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    save_file(tensors, weights)
    message = refused(directory)
    assert "model.layers.1.mlp.up_proj.bias is not zero, and a llama with this config.json has no bias there" in message


def test_weights_with_another_name_are_found_by_it_or_if_there_is_but_one(autogptq):
    directory, params = autogptq
    weights = directory / "gptq_model-4bit-16g.safetensors"
    shutil.copyfile(weights, directory / "another.safetensors")
    assert_identical(checkpoints.load(directory)[1], params)
    (directory / "quantize_config.json").write_text(json.dumps(AUTOGPTQ_CONFIG | {"model_file_base_name": None}))
    message = refused(directory, FileNotFoundError)
    assert "(found another.safetensors, gptq_model-4bit-16g.safetensors; rename the right one)" in message
    weights.unlink()
    assert_identical(checkpoints.load(directory)[1], params)


# Bad input: one line, nothing half-written.


@pytest.fixture
def directory(tmp_path):
    model = language_model()
    checkpoints.save(tmp_path / "model", model, packed_params(model, GRIDS["4 bits"]))
    return tmp_path / "model"


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def make_index(directory, shard):
    names = list(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    content = {"weight_map": {name: shard for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def refused(directory, kind=ValueError):
    with pytest.raises(kind) as error:
        checkpoints.load(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_directory(tmp_path):
    assert "is not a directory; give a model directory, or a hub id" in refused(tmp_path / "none", FileNotFoundError)


def test_file_in_place_of_a_directory(directory):
    assert "is not a directory" in refused(directory / "model.safetensors", FileNotFoundError)


def test_missing_config(directory):
    (directory / "config.json").unlink()
    assert "has no config.json" in refused(directory, FileNotFoundError)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_config(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "config.json is not valid JSON" in refused(directory)


def test_config_that_is_no_object(directory):
    (directory / "config.json").write_text("[]")
    assert "config.json holds a JSON list; it must hold an object" in refused(directory)


def test_unknown_model_type(directory):
    edit_config(directory, model_type="perceptron")
    assert "config.json: model_type='perceptron' is not supported; known are ['llama'" in refused(directory)


def test_config_error_names_the_file(directory):
    edit_config(directory, hidden_act="snake")
    assert "config.json: hidden_act='snake' is not supported" in refused(directory)


def test_unknown_quantization(directory):
    edit_config(directory, quantization_config={"quant_method": "magic"})
    assert "quant_method='magic' is not supported; known are ['gptq'" in refused(directory)


def test_quantization_config_that_is_no_object(directory):
    edit_config(directory, quantization_config="gptq")
    assert "quantization_config is 'gptq'; it must be an object" in refused(directory)


def test_unreadable_quantization_names_the_directory(directory):
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 5})
    assert refused(directory).startswith(f"{directory}: quantization_config: bits=5")


def test_missing_weights(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = refused(directory, FileNotFoundError)
    assert "has neither model.safetensors nor" in message
    assert "found pytorch_model.bin, but only safetensors is read" in message


@pytest.mark.parametrize("kept", [0, 7, 100, 20_000, -1])
def test_truncated_weights(directory, kept):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors is truncated or not a safetensors file" in refused(directory)


def test_missing_shard(directory):
    make_index(directory, "model-00001-of-00001.safetensors")
    assert "names model-00001-of-00001.safetensors, which is missing" in refused(directory, FileNotFoundError)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/x.safetensors", "a\\..\\x.safetensors", "x.bin"])
def test_shard_outside_the_directory(directory, shard):
    make_index(directory, shard)
    assert "a shard must be a .safetensors file beside it" in refused(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_a_map(directory, index):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no weight_map from tensor names to file names" in refused(directory)


def test_missing_and_misshapen_tensors_are_all_listed(directory):
    def damage(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.mlp.up_proj.g_idx"]
        tensors["model.embed_tokens.weight"] = np.zeros((47, 32), np.float32)
        tensors["model.layers.1.mlp.up_proj.scales"] = np.zeros((1, 44), np.float16)
        tensors["lm_head.qweight"] = tensors["lm_head.qweight"].astype(np.int64)

    edit_tensors(directory, damage)
    message = refused(directory)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.mlp.up_proj.g_idx is missing" in message
    assert "model.embed_tokens.weight has shape [47, 32], not [48, 32]" in message
    assert "model.layers.1.mlp.up_proj.scales has shape [1, 44], not [2, 44]" in message
    assert "lm_head.qweight has dtype I64, not I32" in message


def test_damaged_values_name_the_directory_and_the_weight(directory):
    name = "model.layers.0.mlp.up_proj.g_idx"
    edit_tensors(directory, lambda tensors: tensors[name].fill(99))
    assert refused(directory).startswith(f"{directory}: {name}: values 99 .. 99 do not put 16")


def test_unused_tensors_are_named_in_a_warning(directory):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["model.layers.0.extra.weight"] = np.zeros(4, np.float32)

    edit_tensors(directory, add)
    with pytest.warns(UserWarning, match=r"1 tensors are not used by a llama: model.layers.0.extra.weight$"):
        checkpoints.load(directory)


def test_hub_id_is_fetched(directory, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(directory))
    assert checkpoints.load("some-owner/some-model")[0] == language_model()


def test_hub_failure_is_one_line(monkeypatch):
    def fail(name, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused("some-owner/some-model", FileNotFoundError)
    assert message == "some-owner/some-model is not a directory, and fetching it from the hub failed: no route"


def test_existing_output_is_refused(directory):
    model, params = checkpoints.load(directory)
    with pytest.raises(FileExistsError, match="model exists; choose a new name, or remove it first"):
        checkpoints.save(directory, model, params)


def test_unknown_format(tmp_path):
    model = language_model()
    with pytest.raises(ValueError, match=r"format='zip'; choose one of \['gptq'"):
        checkpoints.save(tmp_path / "out", model, float_params(model), format="zip")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_listed(tmp_path):
    model = language_model()
    params = float_params(model)
    params["model"]["norm"] = {"bias": jnp.zeros(32)}
    params["lm_head"]["kernel"] = jnp.zeros((32, 47))
    embedding = from_codes(jnp.zeros((48, 32), jnp.uint32), jnp.ones((1, 32)), None, grid=grid.Grid(symmetric=True))
    params["model"]["embed_tokens"]["embedding"] = embedding
    with pytest.raises(ValueError, match="cannot be saved") as error:
        checkpoints.save(tmp_path / "out", model, params)
    for part in (
        "model.norm.scale is missing",
        "model.norm.bias is no parameter of this model",
        "lm_head.kernel has shape [32, 47], not [32, 48]",
        "model.embed_tokens.embedding is packed, which only (in, out) kernels can be in this format; dequantize it",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    model = language_model()
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path / "out", model, float_params(model), tokenizer_from=tmp_path / "tokenizer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer"]
