"""Llama 1 to 3.x: pre-norm transformer decoder with rotary, grouped-query attention and a gated MLP.

[Touvron et al. 2023; Grattafiori et al. 2024] Its parts serve the models that descend from it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers, rotary
from jgptq.models.attention import Attention, Positions
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture

# Old checkpoints store the rotary frequencies; some with a tied head store it twice.
UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """The sizes of Llama and its descendants, named as in config.json.

    num_key_value_heads: None: as many as query heads. head_dim: None: hidden_size / num_attention_heads.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: rotary.Rope = dataclasses.field(default_factory=rotary.Rope)

    def __post_init__(self):
        super().__post_init__()
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_divides(self, "num_key_value_heads", "num_attention_heads")
        self.rope.check_head(self.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    model_type: ClassVar[str] = "llama"
    transformers_class: ClassVar[str] = "LlamaForCausalLM"

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False


def attention(
    config: DecoderConfig,
    *,
    bias: bool,
    output_bias: bool,
    rngs: nnx.Rngs,
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    rope: rotary.Rope | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    norm: Callable[[], nnx.Module] | None = None,
) -> Attention:
    """Attention of the config's sizes. rope: None: the config's."""
    return Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        bias=bias,
        output_bias=output_bias,
        std=config.initializer_range,
        rngs=rngs,
        names=names,
        scale=scale,
        soft_cap=soft_cap,
        rope=rope or config.rope,
        max_length=config.max_position_embeddings,
        window=window,
        norm=norm,
    )


def gated_mlp(config: DecoderConfig, *, activation: str, bias: bool, rngs: nnx.Rngs) -> layers.GatedMLP:
    return layers.GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        activation=activation,
        bias=bias,
        std=config.initializer_range,
        rngs=rngs,
    )


class PreNormLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, norm: Callable[[], nnx.Module], self_attn: Attention, mlp: nnx.Module):
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(CausalLM):
    """Llama and its descendants: `layer` makes the layer of an index, `norm` the norm before the head.

    embedding_scale: of the embedded tokens. soft_cap: bounds the logits, as soft_cap * tanh(logits / soft_cap).
    With tied embeddings the head is the embedding, transposed.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        layer: Callable[[int], nnx.Module],
        norm: Callable[[], nnx.Module],
        embedding_scale: float | None = None,
        soft_cap: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.embedding_scale, self.soft_cap = embedding_scale, soft_cap
        self.model = layers.Group(
            embed_tokens=layers.Embed(config.vocab_size, config.hidden_size, std=config.initializer_range, rngs=rngs),
            layers=nnx.List([layer(index) for index in range(config.num_hidden_layers)]),
            norm=norm(),
        )
        self.lm_head = layers.untied_head(config, config.hidden_size, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        x = self.model.embed_tokens(tokens)
        return x if self.embedding_scale is None else x * jnp.asarray(self.embedding_scale, x.dtype)

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.model.layers

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        logits = layers.logits(self.model.norm(x), self.lm_head, self.model.embed_tokens)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


def rms_norm(config: DecoderConfig) -> Callable[[], layers.RMSNorm]:
    return functools.partial(layers.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps)


def build(config: LlamaConfig, rngs: nnx.Rngs) -> Decoder:
    norm = rms_norm(config)

    def layer(index: int) -> PreNormLayer:
        bias = config.attention_bias
        return PreNormLayer(
            norm,
            attention(config, bias=bias, output_bias=bias, rngs=rngs),
            gated_mlp(config, activation=config.hidden_act, bias=config.mlp_bias, rngs=rngs),
        )

    return Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(
    model_type=LlamaConfig.model_type, parse_config=LlamaConfig.from_dict, build=build, unused=UNUSED
)
