"""Falcon: attention and MLP side by side, few heads of keys and values, rotary or linear positions.

[Almazrouei et al. 2023]
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers, rotary
from jgptq.models.attention import Alibi, Attention, Positions, alibi_slopes
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig(Config):
    """new_decoder_architecture: num_kv_heads heads of keys and values; else one if multi_query, else all.

    num_ln_in_parallel_attn: norms of a parallel layer, 1 or 2; None: 2 in the new architecture, 1 in the old.
    ffn_hidden_size: None: 4 hidden_size.
    """

    model_type: ClassVar[str] = "falcon"
    transformers_class: ClassVar[str] = "FalconForCausalLM"

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int | None = None
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    num_ln_in_parallel_attn: int | None = None
    ffn_hidden_size: int | None = None
    alibi: bool = False
    bias: bool = False
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 2048
    rope: rotary.Rope = dataclasses.field(default_factory=rotary.Rope)
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "num_attention_heads", "hidden_size")
        self.rope.check_head(self.hidden_size // self.num_attention_heads)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_attention_heads)
        if self.ffn_hidden_size is None:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        check_divides(self, "num_kv_heads", "num_attention_heads")
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("parallel_attn=False is not supported with new_decoder_architecture=True")
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            raise ValueError("num_ln_in_parallel_attn=2 needs new_decoder_architecture=True")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Early files have other names for three sizes."""
        old = {"n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
        return super().from_dict({new: config[name] for name, new in old.items() if name in config} | dict(config))

    @property
    def two_norms(self) -> bool:
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn in (None, 2)

    @property
    def key_heads(self) -> int:
        if self.new_decoder_architecture:
            return self.num_kv_heads
        return 1 if self.multi_query else self.num_attention_heads


def attention(config: FalconConfig, *, rngs: nnx.Rngs) -> Attention:
    head_dim = config.hidden_size // config.num_attention_heads
    # The biases are bfloat16 whatever the model, and scaled as the scores are.
    alibi = Alibi(slopes=alibi_slopes(config.num_attention_heads), dtype="bfloat16", scale=head_dim**-0.5)
    return Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.key_heads,
        head_dim=head_dim,
        bias=config.bias,
        output_bias=config.bias,
        names=("query_key_value", "dense"),
        interleaved=True,
        rope=None if config.alibi else config.rope,
        max_length=config.max_position_embeddings,
        alibi=alibi if config.alibi else None,
        std=config.initializer_range,
        rngs=rngs,
    )


class FalconLayer(nnx.Module):
    """x + attention(norm(x)) + mlp(norm(x)) with one norm or two, or one after the other."""

    def __init__(self, config: FalconConfig, *, rngs: nnx.Rngs):
        self.parallel, self.two_norms = config.parallel_attn, config.two_norms
        norm = functools.partial(layers.LayerNorm, config.hidden_size, epsilon=config.layer_norm_epsilon)
        if self.two_norms:
            self.ln_attn, self.ln_mlp = norm(), norm()
        else:
            self.input_layernorm = norm()
            self.post_attention_layernorm = None if self.parallel else norm()
        self.self_attention = attention(config, rngs=rngs)
        self.mlp = layers.MLP(
            config.hidden_size,
            config.ffn_hidden_size,
            names=("dense_h_to_4h", "dense_4h_to_h"),
            activation=config.activation,
            bias=config.bias,
            std=config.initializer_range,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        normed = self.ln_attn(x) if self.two_norms else self.input_layernorm(x)
        attended = x + self.self_attention(normed, positions)
        if self.two_norms:
            normed = self.ln_mlp(x)
        elif not self.parallel:
            normed = self.post_attention_layernorm(attended)
        return attended + self.mlp(normed)


class Falcon(CausalLM):
    def __init__(self, config: FalconConfig, *, rngs: nnx.Rngs):
        features = config.hidden_size
        self.transformer = layers.Group(
            word_embeddings=layers.Embed(config.vocab_size, features, std=config.initializer_range, rngs=rngs),
            h=nnx.List([FalconLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]),
            ln_f=layers.LayerNorm(features, epsilon=config.layer_norm_epsilon),
        )
        self.lm_head = layers.untied_head(config, features, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        return self.transformer.word_embeddings(tokens)

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.transformer.h

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        return layers.logits(self.transformer.ln_f(x), self.lm_head, self.transformer.word_embeddings)


ARCHITECTURE = Architecture(
    model_type="falcon",
    parse_config=FalconConfig.from_dict,
    build=lambda config, rngs: Falcon(config, rngs=rngs),
    prefix="transformer.",
    unused=(r"lm_head\.weight",),
)
