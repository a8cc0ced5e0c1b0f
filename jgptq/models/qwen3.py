"""Qwen3: a Llama that normalizes each head's queries and keys. [Yang et al. 2025]"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx

from jgptq.models import layers, llama, qwen2
from jgptq.models.attention import Attention
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(qwen2.WindowedConfig):
    model_type: ClassVar[str] = "qwen3"
    transformers_class: ClassVar[str] = "Qwen3ForCausalLM"

    head_dim: int | None = 128
    attention_bias: bool = False


def attention(config: llama.DecoderConfig, *, window: int | None, rngs: nnx.Rngs) -> Attention:
    return llama.attention(
        config,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        window=window,
        norm=functools.partial(layers.RMSNorm, config.head_dim, epsilon=config.rms_norm_eps),
        rngs=rngs,
    )


def build(config: Qwen3Config, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def layer(index: int) -> llama.PreNormLayer:
        return llama.PreNormLayer(
            norm,
            attention(config, window=config.window(index), rngs=rngs),
            llama.gated_mlp(config, activation=config.hidden_act, bias=False, rngs=rngs),
        )

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(model_type="qwen3", parse_config=Qwen3Config.from_dict, build=build, unused=llama.UNUSED)
