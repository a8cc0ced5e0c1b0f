"""A model's config as GGUF's metadata, and back: one Dialect for each model_type that llama.cpp runs.

llama.cpp has no key for some choices, and assumes them. A config that does not come back from its own metadata is
therefore one that GGUF cannot say, and is refused with the names of those fields.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jgptq.checkpoints.gguf_file import GGUFFile
from jgptq.models import LanguageModel, language_model, rotary
from jgptq.models.config import ACTIVATION_FIELDS
from jgptq.models.language_model import ParameterPath

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
EXTRA_TENSORS = (ROPE_FREQUENCIES, *ROPE_FACTORS.values())
MAX_PAIRS = 4096
LARGEST = float(np.finfo(np.float32).max)
END_TOKENS = ("eos", "eot", "eom")  # llama.cpp stops at each of them
LLAMA3_CONTEXT = 8192
LENGTHS = ("max_position_embeddings", "seq_length", "sliding_window")  # in tokens, and no tensor's width
# Names of one function.
SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}

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


def dialect_of(model: LanguageModel) -> Dialect:
    """How GGUF speaks of this model; ValueError where it does not."""
    model_type = model.architecture.model_type
    if model_type not in DIALECTS:
        raise ValueError(f"a {model_type} has no architecture in GGUF; those that have are {list(DIALECTS)}")
    return DIALECTS[model_type]


def describe(model: LanguageModel, names: Collection[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model's metadata, without its tokenizer, and the tensors that say something about the config alone.

    names: the tensors that hold the parameters. ValueError names the fields that GGUF cannot say.
    """
    dialect, config = dialect_of(model), model.config
    own = {key: getattr(config, field) for field, key in dialect.keys.items() if getattr(config, field) is not None}
    own |= {**dialect.extra(config), "vocab_size": config.vocab_size}
    tensors: dict[str, np.ndarray] = {}
    if "rope" in vars(config):
        rope, tensors = _describe_rope(dialect, config)
        own |= rope
    # Not general.name: transformers cannot load a file that calls itself "mistral" there.
    metadata: dict[str, Any] = {"general.architecture": dialect.name, "general.basename": dialect.model_type}
    metadata |= {f"{dialect.name}.{key}": value for key, value in own.items()}
    tokens = [*zip(("bos",), _ids(config.bos_token_id), strict=False)]
    tokens += zip(END_TOKENS, _ids(config.eos_token_id), strict=False)
    metadata |= {f"tokenizer.ggml.{name}_token_id": token for name, token in tokens}
    _check_said(config, Said(metadata=metadata, tensors=[*names, *tensors], factors=tensors))
    return metadata, tensors


def _check_said(config: Any, said: Said) -> None:
    """ValueError unless the metadata, read as a file's, is the config again."""
    again = _canonical(language_model({**read_fields(said), "vocab_size": config.vocab_size}).config)
    lost = [f"{name}={value!r}" for name, value in _canonical(config).items() if value != again[name]]
    if lost:
        raise ValueError(
            f"GGUF cannot say {', '.join(lost)} of a {config.model_type}; save the model in another format"
        )


def _ids(tokens: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Tokens of a config, where -1 stands for none."""
    given = tokens if isinstance(tokens, tuple) else () if tokens is None else (tokens,)
    return tuple(dict.fromkeys(token for token in given if token >= 0))


def _canonical(config: Any) -> dict[str, Any]:
    """A config's fields but for those that change nothing, equal wherever two spellings mean the same."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, rotary.Rope):
            parts = vars(value) | {"partial": int(_head_dim(config) * value.partial)}
            fields |= {f"{name}.{part}": _rounded(parts[part]) for part in parts}
        elif name != "initializer_range":
            fields[name] = _rounded(value)
    for name in ACTIVATION_FIELDS:
        if name in fields:
            fields[name] = SAME_ACTIVATION.get(fields[name], fields[name])
    for name in ("bos_token_id", "eos_token_id"):
        fields[name] = _ids(fields[name])
    if config.model_type == "gpt2":
        fields["n_inner"] = config.n_inner or 4 * config.n_embd
    if config.model_type == "falcon":
        fields |= {"key_heads": config.key_heads, "two_norms": config.two_norms}
        for name in ("multi_query", "new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn"):
            del fields[name]
    return fields


def _rounded(value: Any) -> Any:
    """Numbers as float32 holds them."""
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return value


def model_type_of(said: Said) -> str:
    """The model_type a file is of; ValueError if it is none that is known."""
    name = said.name
    known = [dialect.model_type for dialect in DIALECTS.values() if dialect.name == name]
    if not known:
        names = sorted({dialect.name for dialect in DIALECTS.values()})
        raise ValueError(f"general.architecture is {name!r}; this reads {names}")
    if name != "llama":
        return known[0]
    # Three models share the name. With neither window nor experts a Mistral is a Llama in all but name.
    if said.get("expert_count", 0):
        return "mixtral"
    title = said.metadata.get("general.basename")
    windowed = said.get("attention.sliding_window") is not None
    return "mistral" if windowed or (isinstance(title, str) and title.lower() == "mistral") else "llama"


def read_fields(said: Said) -> dict[str, Any]:
    """What would stand in config.json, but for vocab_size; ValueError for what is missing or not supported."""
    model_type = model_type_of(said)
    dialect = DIALECTS[model_type]
    config = {field: said.get(key) for field, key in dialect.keys.items()}
    missing = [f"{said.name}.{dialect.keys[field]}" for field in config if config[field] is None and _needed(field)]
    if missing:
        raise ValueError(f"its metadata lacks {', '.join(missing)}")
    for field, value in config.items():
        if isinstance(value, str) or (type(value) in (int, float) and value <= 0):
            raise ValueError(f"{said.name}.{dialect.keys[field]} is {value!r}; a positive number is allowed")
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if "head_dim" in config and config["head_dim"] is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    config |= dialect.implied(config, said)
    if model_type not in ("gpt2", "bloom"):
        config |= _read_rope(said, config)
    return config | {"model_type": model_type, "tie_word_embeddings": HEAD not in said.tensors} | _read_tokens(said)


def _needed(field: str) -> bool:
    optional = ("num_key_value_heads", "head_dim", "n_inner", "ffn_hidden_size", "sliding_window", *SOFT_CAPS)
    return field not in optional


def _read_tokens(said: Said) -> dict[str, Any]:
    tokens = {name: said.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *END_TOKENS)}
    for name, token in tokens.items():
        if token is not None and type(token) is not int:
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {token!r}; an integer is allowed")
    ends = list(dict.fromkeys(tokens[name] for name in END_TOKENS if tokens[name] is not None))
    end = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": tokens["bos"], "eos_token_id": end}


def _describe_rope(dialect: Dialect, config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of the rotary part; what they cannot say is found when they are read again."""
    rope = config.rope
    turning = int(_head_dim(config) * rope.partial)
    keys: dict[str, Any] = {"rope.dimension_count": turning, "rope.freq_base": float(rope.theta)}
    tensors = {}
    if rope.rope_type in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type in ("yarn", "llama3"):
        keys["rope.scaling.original_context_length"] = rope.original_length
    if rope.rope_type == "yarn":
        keys |= {
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
    if rope.rope_type == "llama3" and dialect.name == "llama":  # no other architecture's graph reads the tensor
        tensors[ROPE_FREQUENCIES] = _divisors(rope, turning)
    if rope.rope_type == "longrope" and dialect.name == "phi3":
        _, scale = rotary.ROPE_TYPES["longrope"](rope, turning, 1, config.max_position_embeddings)
        keys["rope.scaling.attn_factor"] = float(scale)
        tensors |= {tensor: np.asarray(getattr(rope, field), np.float32) for field, tensor in ROPE_FACTORS.items()}
    return keys, tensors


def _divisors(rope: rotary.Rope, turning: int) -> np.ndarray:
    """What llama3's rule divides each pair's frequency by."""
    plain, _ = rotary.ROPE_TYPES["default"](rope, turning, 1, 1)
    scaled, _ = rotary.ROPE_TYPES["llama3"](rope, turning, 1, 1)
    return (plain / scaled).astype(np.float32)


def _head_dim(config: Any) -> int:
    if hasattr(config, "head_dim"):
        return config.head_dim
    return config.hidden_size // config.num_attention_heads


def _read_rope(said: Said, config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters, and partial_rotary_factor where not all of a head turns."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turning = said.get("rope.dimension_count", head_dim)
    if type(turning) is not int or not 0 < turning <= head_dim:
        raise ValueError(f"{said.name}.rope.dimension_count is {turning!r}; 1 to the head's {head_dim} is allowed")
    theta, kind = said.get("rope.freq_base", 10000.0), said.get("rope.scaling.type", "none")
    parameters: dict[str, Any] = {"rope_theta": theta}
    original = said.get("rope.scaling.original_context_length")
    if ROPE_FREQUENCIES in said.factors:
        parameters |= _frequency_factors(said.factors[ROPE_FREQUENCIES], theta, turning, original or LLAMA3_CONTEXT)
    elif set(ROPE_FACTORS.values()) <= set(said.factors):
        parameters |= _longrope(said, config, turning, original)
    elif said.get("rope.scaling.factor") not in (None, 0.0, 1.0) and kind in ("linear", "yarn", "none"):
        # llama.cpp takes a factor without a type for a linear one.
        parameters |= {"rope_type": "linear" if kind == "none" else kind, "factor": said.get("rope.scaling.factor")}
        if kind == "yarn":
            betas = {name: said.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
            parameters |= {"original_max_position_embeddings": original, **betas}
    elif kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{said.name}.rope.scaling.type is {kind!r} without its factors; this cannot be read")
    partial = {} if turning == head_dim else {"partial_rotary_factor": turning / head_dim}
    return {"rope_parameters": parameters | partial, **partial}


def _frequency_factors(factors: np.ndarray, theta: float, turning: int, original: int) -> dict[str, Any]:
    """Llama 3's rule where it gives these factors; else the factors themselves, as those of any length."""
    if len(factors) != turning // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
        raise ValueError(f"{ROPE_FREQUENCIES} has no {turning // 2} positive numbers, one for each pair that turns")
    factor = decimal(np.max(factors))
    rule = rotary.Rope(rope_type="llama3", theta=theta, factor=factor, original_length=original)
    if np.allclose(_divisors(rule, turning), factors, rtol=1e-5, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": rule.low_freq_factor,
            "high_freq_factor": rule.high_freq_factor,
            "original_max_position_embeddings": original,
        }
    own = [decimal(factor) for factor in factors]
    return {"rope_type": "longrope", "short_factor": own, "long_factor": own, "attention_factor": 1.0}


def _longrope(said: Said, config: Mapping[str, Any], turning: int, original: int | None) -> dict[str, Any]:
    factors = {field: said.factors[tensor] for field, tensor in ROPE_FACTORS.items()}
    for field, tensor in ROPE_FACTORS.items():
        if len(factors[field]) != turning // 2:
            raise ValueError(f"{tensor} has {len(factors[field])} numbers; {turning // 2} pairs turn")
    length = original or config["max_position_embeddings"]
    read = {field: [decimal(value) for value in array] for field, array in factors.items()}
    parameters = {"rope_type": "longrope", "original_max_position_embeddings": length, **read}
    # The prescribed factor is left to the rule.
    rule = rotary.Rope(rope_type="longrope", original_length=length, **{name: tuple(x) for name, x in read.items()})
    try:
        _, prescribed = rotary.ROPE_TYPES["longrope"](rule, turning, 1, config["max_position_embeddings"])
    except ArithmeticError as error:
        raise ValueError(f"an original context of {length} tokens cannot be scaled by longrope") from error
    scale = said.get("rope.scaling.attn_factor", decimal(prescribed))
    return parameters if scale == decimal(prescribed) else parameters | {"attention_factor": scale}


def said_by(file: GGUFFile) -> Said:
    """What an open file says of its model; of the tensors only factors of rotary frequencies are read."""
    factors = {}
    for name in EXTRA_TENSORS:
        if name in file.tensors:
            stored = file.tensors[name]
            if len(stored.shape) != 1 or stored.kind != "F32" or stored.shape[0] > MAX_PAIRS:
                raise ValueError(f"{name} is {stored.kind}{list(stored.shape)}; a short row of F32 is allowed")
            factors[name] = stored.read(0, 1)[0]
    return Said(metadata=file.metadata, tensors=file.tensors, factors=factors)


def read_model(file: GGUFFile) -> LanguageModel:
    """The model a file is of. ValueError, in one line, for what it lacks or what is not supported.

    Sizes are compared with those of the tensors before anything is built by them.
    """
    parts = file.metadata.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise ValueError("it is a part of a split model; join the parts with llama.cpp's llama-gguf-split --merge")
    said = said_by(file)
    fields = read_fields(said)
    if EMBEDDING not in file.tensors or len(file.tensors[EMBEDDING].shape) != 2:
        raise ValueError(f"it has no matrix {EMBEDDING}")
    fields["vocab_size"] = file.tensors[EMBEDDING].shape[0]
    _check_sizes(file, fields)
    return language_model(fields, file.path)


def _check_sizes(file: GGUFFile, fields: Mapping[str, Any]) -> None:
    """ValueError for a size that no tensor has."""
    widest = max(max(tensor.shape) for tensor in file.tensors.values())
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    for field, key in DIALECTS[fields["model_type"]].keys.items():
        value = fields[field]
        if key == "block_count" and type(value) is int and value > len(blocks):
            raise ValueError(f"{key} is {value}, but it has tensors of {len(blocks)} blocks")
        if field not in LENGTHS and type(value) is int and value > widest:
            raise ValueError(f"{key} is {value}, but no tensor is wider than {widest}")
    heads, head_dim = fields.get("num_attention_heads"), fields.get("head_dim")
    if type(heads) is int and type(head_dim) is int and heads * head_dim > widest:
        raise ValueError(f"{heads} heads of {head_dim} are wider than any tensor, {widest}")


def tensor_names(model: LanguageModel, paths: Iterable[ParameterPath]) -> dict[ParameterPath, str | None]:
    """GGUF's names of parameters by their paths; None for one that GGUF has no place for."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == dialect_of(model).name)
    fields = DIALECTS[model.architecture.model_type].keys
    count = next(getattr(model.config, field) for field, key in fields.items() if key == "block_count")
    known = gguf.get_tensor_name_map(arch, count)

    def name(path: ParameterPath) -> str | None:
        module, _, suffix = model.architecture.tensor_name(path)[0].replace(".*", "").rpartition(".")
        # Some names stand in gguf's table without the prefix.
        found = known.get_name(module) or known.get_name(module.removeprefix(model.architecture.prefix))
        return None if found is None else f"{found}.{suffix}"

    return {path: name(path) for path in paths}


def row_order(model: LanguageModel, path: ParameterPath, rows: int) -> np.ndarray | None:
    """For each output feature as GGUF has them, its number in the parameter; None where they are in one order."""
    dialect, config, module = dialect_of(model), model.config, path[-2]
    if dialect.interleaved and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    if dialect.fused and module == "query_key_value":
        heads = config.n_head if config.model_type == "bloom" else config.num_attention_heads
        size = config.hidden_size // heads
        keys = config.key_heads if config.model_type == "falcon" else heads
        parts = np.arange(rows).reshape(keys, -1, size)
        return np.concatenate([parts[:, :-2].reshape(-1), parts[:, -2].reshape(-1), parts[:, -1].reshape(-1)])
    return None


def norm_offset(model: LanguageModel, path: ParameterPath) -> float:
    """What GGUF's scales of norms have more than the parameter."""
    return dialect_of(model).norm_offset if path[-1] == "scale" else 0.0
