"""Llama 1 to 3.x: pre-norm transformer decoder with rotary, grouped-query attention and a gated MLP.

[Touvron et al. 2023; Grattafiori et al. 2024]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers, rotary
from jgptq.models.json_fields import read_fields
from jgptq.models.language_model import Architecture, ParameterPath

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and choices of a Llama, named as in its config.json.

    num_key_value_heads: None: as many as query heads. head_dim: None: hidden_size / num_attention_heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: rotary.Rope = dataclasses.field(default_factory=rotary.Rope)
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
            self._check_size(name)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        self._check_size("head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.hidden_act not in layers.ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported; choose one of {tuple(layers.ACTIVATIONS)}"
            )

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; give a positive integer")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face config.json; keys that change nothing here are ignored."""
        if missing := [name for name in SIZES if config.get(name) is None]:
            raise ValueError(f"config.json of a llama needs {list(SIZES)}; {missing} is missing")
        plain = [field.name for field in dataclasses.fields(cls) if field.name != "rope"]
        options = read_fields(cls, config, plain)
        max_length = options.get("max_position_embeddings", cls.max_position_embeddings)
        return cls(**options, rope=rotary.Rope.from_config(config, max_length))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 read, and `from_dict` reads back to an equal config."""
        rope_parameters = self.rope.to_config()
        scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rope"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **options,
            "rope_parameters": rope_parameters,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.rope_type == "default" else scaling,
        }


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        std = config.initializer_range
        self.input_layernorm = layers.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.self_attn = layers.Attention(
            config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            std=std,
            rngs=rngs,
        )
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        self.mlp = layers.GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            bias=config.mlp_bias,
            std=std,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch seq features"], cos: Array, sin: Array, mask: Array
    ) -> Float[Array, "batch seq features"]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaDecoder(nnx.Module):
    """Tokens to normalized features."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = layers.Embed(config.vocab_size, config.hidden_size, std=config.initializer_range, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = layers.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)

    def __call__(self, tokens: Integer[Array, "batch seq"]) -> Float[Array, "batch seq features"]:
        length = tokens.shape[1]
        cos, sin = rotary.rotation(
            self.config.rope,
            head_dim=self.config.head_dim,
            length=length,
            max_length=self.config.max_position_embeddings,
        )
        mask = jnp.tril(jnp.ones((length, length), bool))
        x = self.embed_tokens(tokens)
        # Layers differ in nothing but their weights, so their traces have equal text and share one compilation.
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class Llama(nnx.Module):
    """A Llama with its language-model head; with tied embeddings the head is the embedding, transposed."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.model = LlamaDecoder(config, rngs=rngs)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = layers.Linear(
                config.hidden_size, config.vocab_size, bias=False, std=config.initializer_range, rngs=rngs
            )

    def __call__(self, tokens: Integer[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Logits, float32."""
        x = self.model(tokens)
        logits = self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)
        return logits.astype(jnp.float32)


def tensor_name(path: ParameterPath) -> tuple[str, bool]:
    """("model", "layers", 0, "mlp", "up_proj", "kernel") -> ("model.layers.0.mlp.up_proj.weight", True)."""
    *module, leaf = path
    name = "bias" if leaf == "bias" else "weight"
    return ".".join([*map(str, module), name]), leaf == "kernel"


ARCHITECTURE = Architecture(
    model_type="llama",
    parse_config=LlamaConfig.from_dict,
    build=lambda config, rngs: Llama(config, rngs=rngs),
    tensor_name=tensor_name,
    # Old checkpoints store the rotary frequencies; some with a tied head store it twice.
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
