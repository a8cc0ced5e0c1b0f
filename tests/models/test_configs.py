"""config.json of every model: older spellings, and what is refused."""

import json

import pytest
import transformers

from jgptq.models import MODELS

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QWEN = LLAMA | {"num_key_value_heads": 2}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}

# model_type -> keys as files before transformers 5 have them
OLD = [
    ("llama", LLAMA | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mistral", QWEN | {"sliding_window": None, "rope_theta": 1e5}),
    ("mixtral", QWEN | {"rms_norm_eps": 1e-6}),
    ("qwen2", QWEN | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3", QWEN | {"use_sliding_window": False, "sliding_window": 8, "rope_theta": 1e6}),
    ("qwen3_moe", QWEN | {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]}),
    ("gemma", LLAMA | {"num_key_value_heads": 1, "hidden_act": "gelu"}),
    ("gemma2", QWEN | {"attn_logit_softcapping": None, "sliding_window": 8}),
    ("gemma3_text", QWEN | {"sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 500.0}),
    ("gemma3_text", QWEN | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("phi3", QWEN | {"rope_theta": 1e5, "partial_rotary_factor": 0.5, "sliding_window": 8}),
    ("phi3", QWEN | {"rope_scaling": LONGROPE, "max_position_embeddings": 8192}),
    ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": None}),
    ("gpt_neo", {"vocab_size": 64, "hidden_size": 32, "num_layers": 24, "num_heads": 4}),
    ("gpt_neox", LLAMA | {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
    ("gpt_neox", LLAMA),
    ("opt", {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 44, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ("bloom", {"vocab_size": 64, "n_embed": 32, "n_layer": 2, "num_attention_heads": 4}),
    ("falcon", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
]


@pytest.mark.parametrize(("model_type", "old"), OLD)
def test_older_spellings_read_as_what_transformers_5_makes_of_them(model_type, old):
    kind = type(transformers.AutoConfig.for_model(model_type))
    new = json.loads(kind.from_dict(json.loads(json.dumps(old))).to_json_string())
    # Files say nothing of these where they are the class's own.
    tokens = {name: new.get(name) for name in ("bos_token_id", "eos_token_id")}
    config = MODELS[model_type].parse_config(old | tokens)
    assert config == MODELS[model_type].parse_config(new)
    for name, value in tokens.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_the_first_names_of_longrope_are_read(name):
    parse = MODELS["phi3"].parse_config
    assert parse(QWEN | {"rope_scaling": LONGROPE | {"type": name}}) == parse(QWEN | {"rope_scaling": LONGROPE})


@pytest.mark.parametrize("model_type", MODELS)
def test_every_missing_size_is_named(model_type):
    with pytest.raises(ValueError, match=rf"config.json of a {model_type} needs \['vocab_size'.* is missing"):
        MODELS[model_type].parse_config({})


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("qwen2", QWEN | {"layer_types": ["full_attention"]}, "layer_types=.*; give 4, one a layer, each one of"),
        ("gemma2", QWEN | {"layer_types": ["chunked_attention"] * 4}, "each one of .*'sliding_attention'"),
        ("gemma3_text", QWEN | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0; give a positive number"),
        ("gemma", QWEN | {"use_bidirectional_attention": True}, "no token may see a later one"),
        ("mixtral", QWEN | {"num_experts_per_tok": 9}, "num_experts_per_tok=9; give at most the number of experts, 8"),
        ("mistral", QWEN | {"sliding_window": 0}, "sliding_window=0; give a positive integer"),
        ("mistral", QWEN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported in a mistral"),
        ("phi3", QWEN | {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5; give a number above 0 and up to 1"),
        ("phi3", QWEN | {"rope_scaling": {"type": "longrope"}}, "'long_factor'] is missing"),
        ("phi3", QWEN | {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "long_factor has 1 numbers; give 4"),
        (
            "gpt2",
            {"vocab_size": 64, "n_embd": 30, "n_layer": 2, "n_head": 4},
            "n_embd=30 must be a multiple of n_head=4",
        ),
        (
            "gpt_neo",
            {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [["all", 2]]},
            "attention_layers=.* each one of .*'local'",
        ),
        (
            "gpt_neo",
            {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": ["all"]},
            "attention_types=.*; give pairs such as",
        ),
        (
            "falcon",
            {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
            | {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False is not supported",
        ),
    ],
)
def test_config_errors_say_what_is_allowed(model_type, config, message):
    with pytest.raises(ValueError, match=message):
        MODELS[model_type].parse_config(config)
