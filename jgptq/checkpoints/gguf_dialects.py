"""How GGUF speaks of a model: one Dialect for each model_type that llama.cpp runs."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

LARGEST = float(np.finfo(np.float32).max)

DECODER = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
WINDOW = {"sliding_window": "attention.sliding_window"}
SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GPT2 = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
GPT_NEOX = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "use_parallel_residual": "use_parallel_residual",
}
BLOOM = {
    "seq_length": "context_length",
    "hidden_size": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
FALCON = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What a file says of its model: metadata, the names of its tensors, and the factors of rotary frequencies."""

    metadata: Mapping[str, Any]
    tensors: Collection[str]
    factors: Mapping[str, np.ndarray]

    @property
    def name(self) -> str | None:
        name = self.metadata.get("general.architecture")
        return name if isinstance(name, str) else None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of "<architecture>.<key>": a number, boolean or string; floats as they read in decimal."""
        value = self.metadata.get(f"{self.name}.{key}", default)
        if not isinstance(value, int | float | str | None):
            raise ValueError(f"{self.name}.{key} has a value for each layer; a model with one for all is read")
        if isinstance(value, float) and not abs(value) <= LARGEST:
            raise ValueError(f"{self.name}.{key} is {value}; a finite float32 is allowed")
        return decimal(value) if isinstance(value, float) else value


def decimal(value: float | np.floating) -> float:
    """The shortest number that rounds to the same float32: 1e-6 where the file has 9.99999997e-7."""
    return float(str(np.float32(value)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How GGUF speaks of one model_type.

    name: its general.architecture. keys: config field -> key after "<name>.", of numbers that are the same in both.
    implied: (config so far, what the file says) -> fields that no key, or not only a key, tells.
    extra: config -> keys that follow from the config and that llama.cpp wants.
    interleaved: whether the pairs that turn together are (0, 1), (2, 3)… in the file, for the queries and keys.
    fused: whether the one kernel of queries, keys and values has all queries first in the file, and not one head's.
    norm_offset: what the file adds to the scales of norms.
    """

    model_type: str
    name: str
    keys: Mapping[str, str]
    implied: Callable[[Mapping[str, Any], Said], Mapping[str, Any]] = lambda config, said: {}
    extra: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    interleaved: bool = False
    fused: bool = False
    norm_offset: float = 0.0


def _llama(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in said.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in said.tensors,
    }


def _gemma2(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    """What llama.cpp takes for granted where there is no key."""
    defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps = {field: default if config[field] is None else config[field] for field, default in defaults.items()}
    return {**caps, **_gemma(config, 46)}


def _gemma3(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    return {**_gemma(config, 62), "rope_local_base_freq": said.get("rope.freq_base_swa", 10000.0)}


def _gemma(config: Mapping[str, Any], most_layers: int) -> Mapping[str, Any]:
    """llama.cpp scales scores by the head's size, and in the model of most layers by the features of a head."""
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == most_layers:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scalar, "sliding_window": config["sliding_window"] or 4096}


def _phi3(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    length = said.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {"original_max_position_embeddings": length, "sliding_window": said.get("attention.sliding_window") or None}


def _gpt2(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    return {"n_inner": None} if config["n_inner"] == 4 * config["n_embd"] else {}


def _falcon(config: Mapping[str, Any], said: Said) -> Mapping[str, Any]:
    """One head of keys and values is the old architecture's, unless there are two norms."""
    heads = said.get("attention.head_count_kv", config["num_attention_heads"])
    two_norms = "blk.0.attn_norm_2.weight" in said.tensors
    if heads == 1 and not two_norms:
        return {"multi_query": True}
    return {
        "new_decoder_architecture": True,
        "num_kv_heads": heads,
        "num_ln_in_parallel_attn": None if two_norms else 1,
    }


def _head_lengths(config: Any) -> dict[str, Any]:
    return {"attention.value_length": config.head_dim}


def _experts(count: str, chosen: str) -> dict[str, str]:
    return {count: "expert_count", chosen: "expert_used_count"}


DIALECTS = {
    dialect.model_type: dialect
    for dialect in (
        Dialect(model_type="llama", name="llama", keys=DECODER, implied=_llama, extra=_head_lengths, interleaved=True),
        Dialect(
            model_type="mistral",
            name="llama",
            keys=DECODER | WINDOW,
            extra=_head_lengths,
            interleaved=True,
        ),
        Dialect(
            model_type="mixtral",
            name="llama",
            keys=DECODER | WINDOW | _experts("num_local_experts", "num_experts_per_tok"),
            extra=_head_lengths,
            interleaved=True,
        ),
        Dialect(model_type="qwen2", name="qwen2", keys=DECODER, extra=_head_lengths),
        Dialect(model_type="qwen3", name="qwen3", keys=DECODER, extra=_head_lengths),
        Dialect(
            model_type="qwen3_moe",
            name="qwen3moe",
            keys=DECODER
            | _experts("num_experts", "num_experts_per_tok")
            | {"moe_intermediate_size": "expert_feed_forward_length"},
            implied=lambda config, said: {"norm_topk_prob": True},
            extra=_head_lengths,
        ),
        Dialect(model_type="gemma", name="gemma", keys=DECODER, extra=_head_lengths, norm_offset=1.0),
        Dialect(
            model_type="gemma2",
            name="gemma2",
            keys=DECODER | WINDOW | SOFT_CAPS,
            implied=_gemma2,
            extra=_head_lengths,
            norm_offset=1.0,
        ),
        Dialect(
            model_type="gemma3_text",
            name="gemma3",
            keys=DECODER | WINDOW,
            implied=_gemma3,
            extra=lambda config: _head_lengths(config) | {"rope.freq_base_swa": float(config.local_rope.theta)},
            norm_offset=1.0,
        ),
        Dialect(
            model_type="phi3",
            name="phi3",
            keys={field: key for field, key in DECODER.items() if field != "head_dim"},
            implied=_phi3,
            # No window is said by 0: llama.cpp takes a file without the key for a model that has one.
            extra=lambda config: {
                "attention.sliding_window": config.sliding_window or 0,
                "rope.scaling.original_context_length": config.original_max_position_embeddings,
            },
        ),
        Dialect(
            model_type="gpt2",
            name="gpt2",
            keys=GPT2,
            implied=_gpt2,
            extra=lambda config: {"feed_forward_length": config.n_inner or 4 * config.n_embd},
        ),
        Dialect(model_type="gpt_neox", name="gptneox", keys=GPT_NEOX, fused=True),
        Dialect(
            model_type="bloom",
            name="bloom",
            keys=BLOOM,
            extra=lambda config: {
                "feed_forward_length": 4 * config.hidden_size,
                "attention.head_count_kv": config.n_head,
            },
            fused=True,
        ),
        Dialect(
            model_type="falcon",
            name="falcon",
            keys=FALCON,
            implied=_falcon,
            extra=lambda config: {"attention.head_count_kv": config.key_heads, "tensor_data_layout": "jploski"},
            fused=True,
        ),
    )
}
