"""A model's config as GGUF's metadata, and back; names and layouts of its tensors.

llama.cpp has no key for some choices, and assumes them. A config that does not come back from its own metadata is
therefore one that GGUF cannot say, and is refused with the names of those fields.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jgptq.checkpoints import gguf_rope
from jgptq.checkpoints.gguf_dialects import DIALECTS, SOFT_CAPS, Dialect, Said, decimal
from jgptq.checkpoints.gguf_file import GGUFFile
from jgptq.models import LanguageModel, language_model, rotary
from jgptq.models.config import ACTIVATION_FIELDS
from jgptq.models.language_model import ParameterPath

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MAX_PAIRS = 4096
END_TOKENS = ("eos", "eot", "eom")  # llama.cpp stops at each of them
LENGTHS = ("max_position_embeddings", "seq_length", "sliding_window")  # in tokens, and no tensor's width
OPTIONAL = ("num_key_value_heads", "head_dim", "n_inner", "ffn_hidden_size", "sliding_window", *SOFT_CAPS)
# Names of one function.
SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


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
        rope, tensors = gguf_rope.describe(dialect.name, config)
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
            parts = vars(value) | {"partial": int(gguf_rope.head_dim(config) * value.partial)}
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
    missing = [
        f"{said.name}.{dialect.keys[field]}" for field in config if config[field] is None and field not in OPTIONAL
    ]
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
        config |= gguf_rope.read(said, config)
    return config | {"model_type": model_type, "tie_word_embeddings": HEAD not in said.tensors} | _read_tokens(said)


def _read_tokens(said: Said) -> dict[str, Any]:
    tokens = {name: said.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *END_TOKENS)}
    for name, token in tokens.items():
        if token is not None and type(token) is not int:
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {token!r}; an integer is allowed")
    ends = list(dict.fromkeys(tokens[name] for name in END_TOKENS if tokens[name] is not None))
    end = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": tokens["bos"], "eos_token_id": end}


def said_by(file: GGUFFile) -> Said:
    """What an open file says of its model; of the tensors only factors of rotary frequencies are read."""
    factors = {}
    for name in gguf_rope.TENSORS:
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
        unused = key == "feed_forward_length" and "moe_intermediate_size" in fields
        if field not in LENGTHS and not unused and type(value) is int and value > widest:
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
