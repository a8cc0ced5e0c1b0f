"""Gemma 3, text only: Gemma 2 with norms on queries and keys, and rotary positions of their own in the layers that see
a window. [Gemma Team 2025]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from jgptq.models import gemma, gemma2, llama, rotary
from jgptq.models.config import Config
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(gemma2.Gemma2Config):
    """rope: of the layers that see all tokens; local_rope: of those that see a window."""

    model_type: ClassVar[str] = "gemma3_text"
    transformers_class: ClassVar[str] = "Gemma3ForCausalLM"
    window_pattern: ClassVar[int] = 6

    max_position_embeddings: int = 131072
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope: rotary.Rope = dataclasses.field(default_factory=lambda: rotary.Rope(theta=1e6))
    local_rope: rotary.Rope = dataclasses.field(default_factory=rotary.Rope)

    def __post_init__(self):
        super().__post_init__()
        self.local_rope.check_head(self.head_dim)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Reads rope_parameters by layer type, or rope_theta, rope_scaling and rope_local_base_freq of older files."""
        nested = config.get("rope_parameters") or {}
        plain = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
        full = nested.get("full_attention") or config.get("rope_scaling")
        local = nested.get("sliding_attention")
        local_theta = config.get("rope_local_base_freq") or 10000.0
        read = super().from_dict({"rope_theta": 1e6, **plain, "rope_parameters": full})
        local_rope = rotary.Rope.from_config(
            {"rope_theta": local_theta, "rope_parameters": local}, read.max_position_embeddings
        )
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
        if config.get("layer_types") is None and pattern:
            kinds = gemma2.alternating(read.num_hidden_layers, pattern)
            return dataclasses.replace(read, local_rope=local_rope, layer_types=kinds)
        return dataclasses.replace(read, local_rope=local_rope)

    def to_dict(self) -> dict[str, Any]:
        written = super().to_dict()
        nested = {"full_attention": self.rope.to_config(), "sliding_attention": self.local_rope.to_config()}
        return written | {"rope_parameters": nested, "rope_local_base_freq": self.local_rope.theta}


def build(config: Gemma3Config, rngs: nnx.Rngs) -> llama.Decoder:
    norm = gemma.rms_norm(config, config.hidden_size)

    def layer(index: int) -> gemma2.SandwichLayer:
        attention = llama.attention(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            window=config.window(index),
            rope=config.local_rope if config.layer_types[index] == "sliding_attention" else config.rope,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
            norm=gemma.rms_norm(config, config.head_dim),
            rngs=rngs,
        )
        mlp = llama.gated_mlp(config, activation=config.hidden_activation, bias=False, rngs=rngs)
        return gemma2.SandwichLayer(norm, attention, mlp)

    return llama.Decoder(
        config,
        layer=layer,
        norm=norm,
        embedding_scale=config.hidden_size**0.5,
        soft_cap=config.final_logit_softcapping,
        rngs=rngs,
    )


ARCHITECTURE = Architecture(
    model_type="gemma3_text", parse_config=Gemma3Config.from_dict, build=build, unused=llama.UNUSED
)
