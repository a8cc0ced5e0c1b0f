"""Mixtral: a Mistral whose MLPs are mixtures of experts. [Jiang et al. 2024]"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jgptq.models import llama
from jgptq.models.attention import Attention, Positions
from jgptq.models.config import Config, check_experts
from jgptq.models.experts import SparseMoE
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(llama.DecoderConfig):
    """num_experts_per_tok: how many of the num_local_experts a token goes through."""

    model_type: ClassVar[str] = "mixtral"
    transformers_class: ClassVar[str] = "MixtralForCausalLM"

    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_experts(self.num_experts_per_tok, self.num_local_experts)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        return super().from_dict({"rope_theta": 1e6, **config})


class MixtralLayer(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, norm: Callable[[], nnx.Module], self_attn: Attention, experts: SparseMoE):
        self.input_layernorm = norm()
        self.self_attn = self_attn
        self.post_attention_layernorm = norm()
        self.block_sparse_moe = experts

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


def build(config: MixtralConfig, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def layer(index: int) -> MixtralLayer:
        attention = llama.attention(config, bias=False, output_bias=False, window=config.sliding_window, rngs=rngs)
        experts = SparseMoE(
            config.hidden_size,
            config.intermediate_size,
            experts=config.num_local_experts,
            chosen=config.num_experts_per_tok,
            normalize=True,
            names=("w1", "w3", "w2"),
            activation=config.hidden_act,
            std=config.initializer_range,
            rngs=rngs,
        )
        return MixtralLayer(norm, attention, experts)

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(
    model_type="mixtral", parse_config=MixtralConfig.from_dict, build=build, unused=llama.UNUSED
)
