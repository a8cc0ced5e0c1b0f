"""Every model against transformers' PyTorch one, on tiny random configs that exercise its switches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jgptq
from jgptq import checkpoints
from jgptq.models import MODELS
from jgptq.tensor import QuantizedTensor

# Float32 sums in another order; logits here are of order 1 to 10.
TOLERANCE = 1e-4
LENGTH = 20

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
SIZES = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
THETA = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = THETA | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
}
LAYER_TYPES = ["sliding_attention", "full_attention"]

# model_type -> what all its variants share, and the variants, the first of which stands for the model.
CASES = {
    "llama": (
        LLAMA,
        {
            "grouped": {},
            "one kv head": {"num_key_value_heads": 1},
            "no grouping": {"num_key_value_heads": 4, "tie_word_embeddings": True},
            "biases": {"attention_bias": True, "mlp_bias": True},
            "wide heads": {"head_dim": 16, "hidden_act": "gelu"},
            "tanh gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
            "theta": {"rope_parameters": THETA},
            "linear": {"rope_parameters": THETA | {"rope_type": "linear", "factor": 2.5}},
            "dynamic": {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}},
            "beyond": {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}
            | {"max_position_embeddings": 12},
            "llama3": {"rope_parameters": LLAMA3},
            "yarn": {"rope_parameters": YARN},
            "yarn options": {"rope_parameters": YARN | {"beta_fast": 8, "beta_slow": 2, "mscale": 1.0}},
            "yarn, not truncated": {"rope_parameters": YARN | {"truncate": False}},
            "yarn scale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
        },
    ),
    "mistral": (
        LLAMA,
        {
            "window": {"sliding_window": 6},
            "no window": {"sliding_window": None, "tie_word_embeddings": True},
            "wide heads": {"head_dim": 16, "rope_parameters": YARN},
        },
    ),
    "mixtral": (
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 48},
        {
            "plain": {"rope_parameters": THETA},
            "window": {"sliding_window": 6, "tie_word_embeddings": True, "num_experts_per_tok": 1, "head_dim": 16},
        },
    ),
    "qwen3_moe": (
        LLAMA | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        {
            "plain": {},
            "normalized": {"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
            "some layers": {"decoder_sparse_step": 2, "num_hidden_layers": 3},
            "some MLPs": {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 6},
        },
    ),
    "qwen2": (
        LLAMA,
        {
            "plain": {"rope_parameters": THETA},
            "windows": {"use_sliding_window": True, "sliding_window": 6, "layer_types": LAYER_TYPES},
            "upper windows": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "tied": {"tie_word_embeddings": True, "rope_parameters": YARN},
        },
    ),
    "qwen3": (
        LLAMA | {"head_dim": 16},
        {
            "plain": {},
            "biases": {"attention_bias": True, "tie_word_embeddings": True},
            "windows": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 1},
        },
    ),
    "gemma": (
        LLAMA | {"head_dim": 16},
        {
            "tied": {},
            "untied": {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1},
        },
    ),
    "gemma2": (
        LLAMA | {"head_dim": 16, "sliding_window": 6},
        {
            "soft caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
            "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
            "other layers": {"layer_types": LAYER_TYPES[::-1], "tie_word_embeddings": False},
        },
    ),
    "gemma3_text": (
        LLAMA | {"head_dim": 16, "sliding_window": 6, "layer_types": LAYER_TYPES},
        {
            "two ropes": {"rope_parameters": {"sliding_attention": THETA, "full_attention": LLAMA3}},
            "pattern": {"layer_types": None, "num_hidden_layers": 3, "sliding_window_pattern": 2},
            "caps": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "attention_bias": True},
        },
    ),
    "phi3": (
        LLAMA | {"original_max_position_embeddings": 8},
        {
            "plain": {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
            "window": {"sliding_window": 6, "tie_word_embeddings": True, "num_key_value_heads": 4},
            "long": {"rope_parameters": LONGROPE},
            "short": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        },
    ),
    "gpt2": (
        GPT2,
        {
            "tied": {},
            "untied": {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 48},
            "unscaled": {"scale_attn_weights": False},
            "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
        },
    ),
    "gpt_neo": (
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 24},
        {
            "local": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
            "untied": {"attention_types": [[["global"], 2]], "tie_word_embeddings": False, "intermediate_size": 48},
        },
    ),
    "gpt_neox": (
        SIZES,
        {
            "parallel": {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
            "sequential": {"use_parallel_residual": False, "tie_word_embeddings": True},
            "plain": {"attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
            "linear": {"rope_parameters": THETA | {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5}},
        },
    ),
    "opt": (
        {name: value for name, value in SIZES.items() if name != "intermediate_size"} | {"ffn_dim": 44},
        {
            "norm before": {},
            "norm after": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
            "no final norm": {"_remove_final_layer_norm": True, "enable_bias": False},
            "plain norms": {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
            "projections": {"word_embed_proj_dim": 24, "activation_function": "gelu"},
        },
    ),
    "bloom": (
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {
            "tied": {},
            "untied": {"tie_word_embeddings": False, "n_head": 12, "hidden_size": 48},
            "post": {"apply_residual_connection_post_layernorm": True},
        },
    ),
    "falcon": (
        {name: value for name, value in SIZES.items() if name != "intermediate_size"},
        {
            "multi-query": {},
            "new": {"new_decoder_architecture": True, "num_kv_heads": 2, "rope_parameters": THETA},
            "new, one norm": {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
            "sequential": {"parallel_attn": False, "multi_query": False, "bias": True},
            "alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 12}
            | {"hidden_size": 48},
            "untied": {"tie_word_embeddings": False, "ffn_hidden_size": 40, "activation": "relu"},
        },
    ),
}
VARIANTS = [(model_type, variant) for model_type, (_, variants) in CASES.items() for variant in variants]
FIRST = [(model_type, next(iter(variants))) for model_type, (_, variants) in CASES.items()]


def torch_config(model_type, variant):
    shared, variants = CASES[model_type]
    kind = type(transformers.AutoConfig.for_model(model_type))
    return kind(**{**shared, **variants[variant]}, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def implementation(config):
    """Eager attention, which alone knows soft caps; but Falcon's adds its linear biases twice."""
    return "sdpa" if getattr(config, "alibi", False) else "eager"


def torch_model(model_type, variant, seed=0):
    """A PyTorch model whose every parameter, norms and biases too, is far from its initial value."""
    torch.manual_seed(seed)
    config = torch_config(model_type, variant)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name or ".ln_" in name else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + around * (parameter.mean() != 0))
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def random_tokens(batch=2, length=LENGTH, vocab=64):
    return np.random.default_rng(1).integers(0, vocab, (batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """(model_type, variant, dtype) -> a directory with the PyTorch model in it, and that model; made once."""
    made = {}

    def make(model_type, variant, dtype=torch.float32):
        key = (model_type, variant, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("model") / model_type
            model = torch_model(model_type, variant).to(dtype)
            model.save_pretrained(path)
            made[key] = path, model
        return made[key]

    return make


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_logits_equal_transformers(model_type, variant, directory):
    path, reference = directory(model_type, variant)
    # Warnings are errors: a tensor of the checkpoint that went unused would be one.
    model, params = checkpoints.load(path)
    tokens = random_tokens()
    expected = torch_logits(reference, tokens)
    assert np.abs(expected).max() > 0.5
    logits = model.apply(params, jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(logits), expected, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_narrow_weights_are_kept_and_computed_with(model_type, variant, dtype, directory):
    path, reference = directory(model_type, variant, getattr(torch, dtype))
    model, params = checkpoints.load(path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    tokens = random_tokens()
    wide = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    # The same rounded weights in float32 are exact in both libraries.
    expected = torch_logits(wide.eval(), tokens)
    widened = checkpoints.load(path, dtype="float32")[1]
    np.testing.assert_allclose(model.apply(widened, jnp.asarray(tokens)), expected, atol=TOLERANCE)
    logits = np.asarray(model.apply(params, jnp.asarray(tokens)))
    # No further from the exact logits than PyTorch is in this dtype, but for chance. The median, since rounding sends
    # a few tokens to other experts, in both libraries.
    theirs = np.median(np.abs(torch_logits(reference, tokens) - expected))
    assert np.median(np.abs(logits - expected)) < 1.5 * theirs


def agrees(given, wanted):
    """Equal, but that an object may say more: rope options at their defaults."""
    if isinstance(wanted, dict):
        return all(agrees(given[name], value) for name, value in wanted.items())
    return given == wanted


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_config_survives_its_own_json_and_transformers_reads_it(model_type, variant):
    original = torch_config(model_type, variant)
    config = MODELS[model_type].parse_config(json.loads(original.to_json_string()))
    written = json.loads(json.dumps(config.to_dict()))
    assert MODELS[model_type].parse_config(written) == config
    read = type(original).from_dict(written).to_dict()
    for name, value in original.to_dict().items():
        # Its attention_layers are what attention_types says.
        if name in written and name not in ("architectures", "rope_theta", "rope_scaling", "attention_types"):
            assert agrees(read[name], value), name


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_missing_and_misshapen_tensors_are_all_listed(model_type, variant, directory, tmp_path):
    path, _ = directory(model_type, variant)
    tensors = load_file(path / "model.safetensors")
    first, second = list(tensors)[:2]
    del tensors[first]
    tensors[second] = tensors[second][..., :-1].copy()
    tensors["stray"] = np.zeros(3, np.float32)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit its config") as error:
        checkpoints.load(tmp_path)
    assert f"{first} is missing" in str(error.value)
    assert f"{second} has shape" in str(error.value)


# On so few tokens the report warns; rounding to nearest needs none.
@pytest.mark.filterwarnings("ignore::jgptq.quantize.QuantizationWarning")
@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_every_kernel_is_quantized_and_multiplied_packed(model_type, variant, directory):
    path, _ = directory(model_type, variant)
    model, params = checkpoints.load(path)
    tokens = jnp.asarray(random_tokens())
    grid = jgptq.Grid(bits=4, group_size=16)
    params_q, _ = jgptq.quantize(model.apply, params, [tokens], grid=grid, method="rtn")

    def is_packed(leaf):
        return isinstance(leaf, QuantizedTensor)

    leaves = jax.tree_util.tree_leaves_with_path(params_q, is_leaf=is_packed)
    kernels = {jax.tree_util.keystr(keys): is_packed(leaf) for keys, leaf in leaves if keys[-1].key == "kernel"}
    assert kernels
    assert all(kernels.values()), kernels
    dense = jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params_q, is_leaf=is_packed)
    expected = np.asarray(model.apply(dense, tokens))
    assert np.abs(expected - np.asarray(model.apply(params, tokens))).max() > 1e-2
    np.testing.assert_allclose(model.apply(params_q, tokens), expected, atol=TOLERANCE)
