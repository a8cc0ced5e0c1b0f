"""How parameters are found in checkpoints: experts stored one by one, and names without the model's prefix."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jgptq import checkpoints, grid, tensor
from jgptq.checkpoints import gptq
from jgptq.models import MODELS, LanguageModel

MIXTRAL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
EXPERTS = "model.layers.0.block_sparse_moe.experts"

from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def language_model(model_type, sizes):
    architecture = MODELS[model_type]
    return LanguageModel(architecture=architecture, config=architecture.parse_config(sizes))


def write(directory, model, tensors, **config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict() | config))
    save_file(tensors, directory / "model.safetensors")


def mixtral_tensors(model):
    """Random tensors under the names and in the shapes that Mixtral's checkpoints have."""
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (48, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (48, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.block_sparse_moe.gate.weight": (3, 32),
    }
    for number in range(3):
        shapes |= {f"{EXPERTS}.{number}.{name}.weight": (16, 32) for name in ("w1", "w3")}
        shapes[f"{EXPERTS}.{number}.w2.weight"] = (32, 16)
    return {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("lazy", [False, True])
def test_an_experts_kernel_is_the_stack_of_its_tensors(lazy, tmp_path):
    model = language_model("mixtral", MIXTRAL)
    tensors = mixtral_tensors(model)
    write(tmp_path, model, tensors)
    params = checkpoints.load(tmp_path, lazy=lazy)[1]
    leaf = params["model"]["layers"][0]["block_sparse_moe"]["experts"]["w2"]["kernel"]
    wanted = np.stack([tensors[f"{EXPERTS}.{number}.w2.weight"].T for number in range(3)])
    assert (leaf.shape, leaf.ndim, leaf.dtype, leaf.nbytes) == (wanted.shape, 3, np.float32, wanted.nbytes)
    np.testing.assert_array_equal(leaf[...], wanted)
    np.testing.assert_array_equal(leaf[1], wanted[1])


def test_every_missing_expert_is_named(tmp_path):
    model = language_model("mixtral", MIXTRAL)
    tensors = mixtral_tensors(model)
    del tensors[f"{EXPERTS}.1.w1.weight"]
    tensors[f"{EXPERTS}.2.w2.weight"] = np.zeros((16, 32), np.float32)
    write(tmp_path, model, tensors)
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoints.load(tmp_path)
    assert f"{EXPERTS}.1.w1.weight is missing" in str(error.value)
    assert f"{EXPERTS}.2.w2.weight has shape [16, 32], not [32, 16]" in str(error.value)


def packed(seed, group_size):
    random = np.random.default_rng(seed)
    return from_codes(
        jnp.asarray(random.integers(0, 16, (32, 16)), jnp.uint32),
        jnp.asarray(random.uniform(0.01, 0.1, (32 // group_size, 16)), jnp.float32),
        jnp.asarray(random.integers(0, 16, (32 // group_size, 16)), jnp.uint8),
        grid=grid.Grid(bits=4, group_size=group_size),
        dtype=jnp.float32,
    )


def write_packed(directory, weights):
    """A Mixtral whose w1 are packed, the rest of it in float."""
    model = language_model("mixtral", MIXTRAL)
    modules = {f"{EXPERTS}.{number}.w1": weight for number, weight in enumerate(weights)}
    config = gptq.FORMAT.describe(modules, [], jnp.dtype("float32"))
    tensors = mixtral_tensors(model)
    for module, weight in modules.items():
        del tensors[f"{module}.weight"]
        parts = gptq.FORMAT.encode(gptq.FORMAT.parse(config), weight)
        tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    write(directory, model, tensors, quantization_config=config, torch_dtype="float32")


def test_packed_experts_are_stacked(tmp_path):
    weights = [packed(seed, 16) for seed in range(3)]
    write_packed(tmp_path, weights)
    model, params = checkpoints.load(tmp_path)
    leaf = params["model"]["layers"][0]["block_sparse_moe"]["experts"]["w1"]["kernel"]
    assert (leaf.shape, leaf.layout) == ((3, 32, 16), weights[0].layout)
    dense = np.stack([np.asarray(weight.dequantize()) for weight in weights])
    np.testing.assert_array_equal(leaf.dequantize(), dense)
    tokens = jnp.arange(8)[None]
    logits = model.apply(params, tokens)
    params["model"]["layers"][0]["block_sparse_moe"]["experts"]["w1"]["kernel"] = jnp.asarray(dense)
    # The same products, summed in another order.
    np.testing.assert_allclose(logits, model.apply(params, tokens), rtol=1e-4, atol=1e-5)


def test_experts_packed_in_different_ways_are_refused(tmp_path):
    write_packed(tmp_path, [packed(0, 16), packed(1, 16), packed(2, 32)])
    with pytest.raises(ValueError, match=r"experts\.0\.w1 to .*experts\.2\.w1 are packed in different ways"):
        checkpoints.load(tmp_path)


def test_names_without_the_prefix_are_read(tmp_path):
    model = language_model("gpt2", GPT2)
    params = model.init(jax.random.key(0))
    checkpoints.save(tmp_path / "named", model, params)
    tensors = load_file(tmp_path / "named" / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    assert "h.0.attn.c_attn.weight" in bare
    # The causal mask, as old files have it.
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
    write(tmp_path / "bare", model, bare)
    again = checkpoints.load(tmp_path / "bare")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
