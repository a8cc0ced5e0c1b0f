"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, and windows in some layers. [Yang et al. 2024]"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from jgptq.models import llama
from jgptq.models.config import Config, check_layer_types
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(llama.DecoderConfig):
    """Sizes of the Qwens. layer_types: of each layer; None: full attention in all of them.

    sliding_window: how many tokens the queries of a "sliding_attention" layer see.
    """

    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.use_sliding_window:
            object.__setattr__(self, "sliding_window", None)
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        check_layer_types(self.layer_types, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Older files have no layer_types: the layers from max_window_layers on have windows."""
        read = super().from_dict(config)
        if config.get("layer_types") is None and read.sliding_window is not None:
            full, count = config.get("max_window_layers", 28), read.num_hidden_layers
            kinds = ["sliding_attention" if index >= full else "full_attention" for index in range(count)]
            return dataclasses.replace(read, layer_types=tuple(kinds))
        return read

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    model_type: ClassVar[str] = "qwen2"
    transformers_class: ClassVar[str] = "Qwen2ForCausalLM"


def build(config: Qwen2Config, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def layer(index: int) -> llama.PreNormLayer:
        return llama.PreNormLayer(
            norm,
            llama.attention(config, bias=True, output_bias=False, window=config.window(index), rngs=rngs),
            llama.gated_mlp(config, activation=config.hidden_act, bias=False, rngs=rngs),
        )

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(model_type="qwen2", parse_config=Qwen2Config.from_dict, build=build, unused=llama.UNUSED)
