"""Qwen3-MoE: a Qwen3 with mixtures of experts in place of most MLPs. [Yang et al. 2025]"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from jgptq.models import llama, qwen3
from jgptq.models.config import Config, check_experts
from jgptq.models.experts import SparseMoE
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(llama.DecoderConfig):
    """Every decoder_sparse_step-th layer has experts, but for mlp_only_layers, which have an MLP as the rest.

    num_experts_per_tok: how many of the num_experts a token goes through; norm_topk_prob: their shares sum to 1.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    transformers_class: ClassVar[str] = "Qwen3MoeForCausalLM"

    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.use_sliding_window:
            object.__setattr__(self, "sliding_window", None)
        check_experts(self.num_experts_per_tok, self.num_experts)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """transformers 5 may write num_local_experts."""
        return super().from_dict({"num_experts": config.get("num_local_experts"), **config})

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def build(config: Qwen3MoeConfig, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def mlp(index: int) -> nnx.Module:
        if not config.is_sparse(index):
            return llama.gated_mlp(config, activation=config.hidden_act, bias=False, rngs=rngs)
        return SparseMoE(
            config.hidden_size,
            config.moe_intermediate_size,
            experts=config.num_experts,
            chosen=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            names=("gate_proj", "up_proj", "down_proj"),
            activation=config.hidden_act,
            std=config.initializer_range,
            rngs=rngs,
        )

    def layer(index: int) -> llama.PreNormLayer:
        attention = qwen3.attention(config, window=config.sliding_window, rngs=rngs)
        return llama.PreNormLayer(norm, attention, mlp(index))

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(
    model_type="qwen3_moe", parse_config=Qwen3MoeConfig.from_dict, build=build, unused=llama.UNUSED
)
