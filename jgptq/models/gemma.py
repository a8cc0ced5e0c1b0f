"""Gemma: a Llama with wide heads, scaled embeddings and norms that multiply by 1 + scale. [Gemma Team 2024]"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx

from jgptq.models import layers, llama
from jgptq.models.config import Config
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(llama.DecoderConfig):
    model_type: ClassVar[str] = "gemma"
    transformers_class: ClassVar[str] = "GemmaForCausalLM"

    num_key_value_heads: int | None = 16
    head_dim: int | None = 256
    max_position_embeddings: int = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """The first files say "gelu" and mean its approximation."""
        check_causal(config)
        if config.get("hidden_act") == "gelu":
            config = {**config, "hidden_act": "gelu_pytorch_tanh"}
        return super().from_dict(config)


def check_causal(config: Mapping[str, Any]) -> None:
    if config.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported: no token may see a later one")


def rms_norm(config: llama.DecoderConfig, features: int) -> Callable[[], layers.RMSNorm]:
    return functools.partial(layers.RMSNorm, features, epsilon=config.rms_norm_eps, offset=1.0)


def build(config: GemmaConfig, rngs: nnx.Rngs) -> llama.Decoder:
    norm = rms_norm(config, config.hidden_size)

    def layer(index: int) -> llama.PreNormLayer:
        bias = config.attention_bias
        return llama.PreNormLayer(
            norm,
            llama.attention(config, bias=bias, output_bias=bias, rngs=rngs),
            llama.gated_mlp(config, activation=config.hidden_act, bias=False, rngs=rngs),
        )

    return llama.Decoder(config, layer=layer, norm=norm, embedding_scale=config.hidden_size**0.5, rngs=rngs)


ARCHITECTURE = Architecture(model_type="gemma", parse_config=GemmaConfig.from_dict, build=build, unused=llama.UNUSED)
