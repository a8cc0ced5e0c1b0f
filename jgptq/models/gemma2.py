"""Gemma 2: norms on both sides of attention and MLP, windows in every other layer, soft caps. [Gemma Team 2024]"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jgptq.models import gemma, llama
from jgptq.models.attention import Attention, Positions
from jgptq.models.config import Config, check_layer_types
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(llama.DecoderConfig):
    """query_pre_attn_scalar: attention's scores are divided by its root. layer_types: None: the model's own pattern.

    attn_logit_softcapping, final_logit_softcapping: bounds of scores and of logits; None: there is none.
    """

    model_type: ClassVar[str] = "gemma2"
    transformers_class: ClassVar[str] = "Gemma2ForCausalLM"
    window_pattern: ClassVar[int] = 2

    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 8192
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: int | float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", alternating(self.num_hidden_layers, self.window_pattern))
        check_layer_types(self.layer_types, self.num_hidden_layers)
        if self.query_pre_attn_scalar <= 0:
            raise ValueError(f"query_pre_attn_scalar={self.query_pre_attn_scalar}; give a positive number")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        gemma.check_causal(config)
        return super().from_dict(config)

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


def alternating(count: int, pattern: int) -> tuple[str, ...]:
    """Every `pattern`-th layer sees all tokens, those between a window of them."""
    kinds = ("full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(count))
    return tuple(kinds)


class SandwichLayer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, norm: Callable[[], nnx.Module], self_attn: Attention, mlp: nnx.Module):
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = mlp
        self.post_feedforward_layernorm = norm()

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def build(config: Gemma2Config, rngs: nnx.Rngs) -> llama.Decoder:
    norm = gemma.rms_norm(config, config.hidden_size)

    def layer(index: int) -> SandwichLayer:
        attention = llama.attention(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            window=config.window(index),
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
            rngs=rngs,
        )
        mlp = llama.gated_mlp(config, activation=config.hidden_activation, bias=False, rngs=rngs)
        return SandwichLayer(norm, attention, mlp)

    return llama.Decoder(
        config,
        layer=layer,
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        soft_cap=config.final_logit_softcapping,
        rngs=rngs,
    )


ARCHITECTURE = Architecture(model_type="gemma2", parse_config=Gemma2Config.from_dict, build=build, unused=llama.UNUSED)
