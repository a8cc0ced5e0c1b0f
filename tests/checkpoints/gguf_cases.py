"""Tiny models for the tests of GGUF: one of every model_type that has an architecture there."""

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import grid, packing, tensor
from jgptq.models import language_model

DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW_HEADS = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 5.0, 7.0],
    "partial_rotary_factor": 0.5,
}
CASES = {
    "llama": DECODER | {"model_type": "llama", "rope_theta": 500.0, "rms_norm_eps": 1e-5},
    "llama with biases": DECODER | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama tied, rope of llama3": DECODER
    | {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3, "eos_token_id": [2, 3, 4]},
    "llama with linear rope": DECODER
    | {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "mistral": DECODER | {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": DECODER | {"model_type": "mistral", "sliding_window": 4096},
    "mixtral": DECODER | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6},
    "qwen2": DECODER | {"model_type": "qwen2", "rope_parameters": YARN | {"beta_fast": 16.0}},
    "qwen3": DECODER | {"model_type": "qwen3", "head_dim": 128},
    "qwen3_moe": DECODER
    | {
        "model_type": "qwen3_moe",
        "intermediate_size": 4096,  # which no tensor has, if all layers have experts
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gemma": DECODER | {"model_type": "gemma", "head_dim": 32},
    "gemma2": DECODER | {"model_type": "gemma2", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 32},
    "gemma3_text": DECODER
    | {"model_type": "gemma3_text", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 32},
    "phi3": DECODER | {"model_type": "phi3", "pad_token_id": 0},
    "phi3 with longrope": DECODER
    | {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "tie_word_embeddings": False,
    },
    "gpt2 tied": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 96},
    "gpt_neox": FEW_HEADS | {"model_type": "gpt_neox", "rotary_pct": 0.25},
    "bloom": {"model_type": "bloom", "vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": FEW_HEADS | {"model_type": "falcon"},
    "falcon with many heads": FEW_HEADS | {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
}
GRID = grid.Grid(bits=4, group_size=32, symmetric=True)
# Of 7 significant bits, so that float16 holds their multiples by 0 .. 15.
SHORT_SCALES = np.array([0.03125, 0.046875, 0.05517578125, 0.06201171875], np.float16)

pack = jax.jit(packing.pack, static_argnames="bits")


def model_of(name):
    return language_model(CASES[name])


def packed(random, shape, own, *, permutation=None, dtype=jnp.float32, scales=SHORT_SCALES):
    """Random codes, scales and zeros for an (in, out) kernel or a stack of them."""
    *stack, in_features, out_features = shape
    length = own.group_length(in_features)
    groups = (*stack, -(-in_features // length), out_features)
    zeros = jnp.asarray(random.integers(0, 2**own.bits, groups), jnp.uint8)
    return tensor.QuantizedTensor(
        codes=pack(jnp.asarray(random.integers(0, 2**own.bits, shape), jnp.uint32), bits=own.bits),
        scales=jnp.asarray(random.choice(scales, groups)),
        zeros=None if own.symmetric else zeros,
        permutation=permutation,
        bits=own.bits,
        group_size=length,
        dtype=jnp.dtype(dtype),
        layout=tensor.Layout.dense(in_features, out_features),
    )


def params_of(model, own=GRID, *, leave=(), dtype=jnp.float32):
    """Random parameters whose kernels are packed on one grid, but for those of modules in `leave`."""
    random = np.random.default_rng(0)

    def leaf(keys, spec):
        path = [key.key for key in keys]
        if path[-1] == "kernel" and own is not None and not set(path) & set(leave):
            return packed(random, spec.shape, own, dtype=dtype)
        # Of few bits, so that a Gemma's 1 + scale is exact.
        return jnp.asarray(np.round(random.normal(0, 0.2, spec.shape) * 256) / 256, dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.parameter_shapes)


def assert_identical(given, wanted):
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
