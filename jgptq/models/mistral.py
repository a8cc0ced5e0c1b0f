"""Mistral: a Llama whose queries see a window of tokens. [Jiang et al. 2023]"""

import dataclasses
from typing import ClassVar

from flax import nnx

from jgptq.models import llama
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(llama.DecoderConfig):
    """sliding_window: how many tokens a query sees; None: all."""

    model_type: ClassVar[str] = "mistral"
    transformers_class: ClassVar[str] = "MistralForCausalLM"

    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    hidden_act: str = "silu"
    sliding_window: int | None = 4096


def build(config: MistralConfig, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def layer(index: int) -> llama.PreNormLayer:
        return llama.PreNormLayer(
            norm,
            llama.attention(config, bias=False, output_bias=False, window=config.sliding_window, rngs=rngs),
            llama.gated_mlp(config, activation=config.hidden_act, bias=False, rngs=rngs),
        )

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(
    model_type="mistral", parse_config=MistralConfig.from_dict, build=build, unused=llama.UNUSED
)
