"""GPT-NeoX and Pythia: attention and MLP side by side, heads rotated in part. [Black et al. 2022]"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers, rotary
from jgptq.models.attention import Attention, Positions
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(Config):
    """use_parallel_residual: attention and MLP both read the layer's input; else the MLP reads attention's sum."""

    model_type: ClassVar[str] = "gpt_neox"
    transformers_class: ClassVar[str] = "GPTNeoXForCausalLM"
    partial_rotary: ClassVar[bool] = True

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    rope: rotary.Rope = dataclasses.field(default_factory=lambda: rotary.Rope(partial=0.25))
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "num_attention_heads", "hidden_size")
        self.rope.check_head(self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """transformers 4 wrote rotary_emb_base and rotary_pct."""
        own = {
            "rope_theta": config.get("rotary_emb_base"),
            "partial_rotary_factor": config.get("rotary_pct") or 0.25,
        }
        return super().from_dict(own | {name: value for name, value in config.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rotary_emb_base": self.rope.theta, "rotary_pct": self.rope.partial}


class GPTNeoXLayer(nnx.Module):
    """x + attention(norm(x)) + mlp(norm(x)), or one after the other."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs):
        features, std = config.hidden_size, config.initializer_range
        self.parallel = config.use_parallel_residual
        self.input_layernorm = layers.LayerNorm(features, epsilon=config.layer_norm_eps)
        self.post_attention_layernorm = layers.LayerNorm(features, epsilon=config.layer_norm_eps)
        self.attention = Attention(
            features,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=features // config.num_attention_heads,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            names=("query_key_value", "dense"),
            interleaved=True,
            rope=config.rope,
            max_length=config.max_position_embeddings,
            std=std,
            rngs=rngs,
        )
        self.mlp = layers.MLP(
            features,
            config.intermediate_size,
            names=("dense_h_to_4h", "dense_4h_to_h"),
            activation=config.hidden_act,
            bias=True,
            std=std,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        attended = x + self.attention(self.input_layernorm(x), positions)
        return attended + self.mlp(self.post_attention_layernorm(x if self.parallel else attended))


class GPTNeoX(CausalLM):
    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs):
        std = config.initializer_range
        self.gpt_neox = layers.Group(
            embed_in=layers.Embed(config.vocab_size, config.hidden_size, std=std, rngs=rngs),
            layers=nnx.List([GPTNeoXLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]),
            final_layer_norm=layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps),
        )
        self.embed_out = layers.untied_head(config, config.hidden_size, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        return self.gpt_neox.embed_in(tokens)

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.gpt_neox.layers

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        return layers.logits(self.gpt_neox.final_layer_norm(x), self.embed_out, self.gpt_neox.embed_in)


ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    parse_config=GPTNeoXConfig.from_dict,
    build=lambda config, rngs: GPTNeoX(config, rngs=rngs),
    prefix="gpt_neox.",
    # Old checkpoints store the causal mask and the rotary frequencies.
    unused=(
        r"(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
        r"(embed_out|lm_head)\.weight",
    ),
)
