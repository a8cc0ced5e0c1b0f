"""Phi-3 and Phi-4: a Llama whose queries, keys and values are one kernel, as are gate and up. [Abdin et al. 2024]"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jgptq.models import layers, llama
from jgptq.models.config import Config
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(llama.DecoderConfig):
    model_type: ClassVar[str] = "phi3"
    transformers_class: ClassVar[str] = "Phi3ForCausalLM"
    partial_rotary: ClassVar[bool] = True

    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    sliding_window: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Early files call "longrope" "su" or "yarn"."""
        config = dict(config)
        for name in ("rope_parameters", "rope_scaling"):
            rope = config.get(name)
            if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):
                config[name] = {**rope, "rope_type": "longrope"}
        return super().from_dict({"original_max_position_embeddings": 4096, **config})


class FusedGatedMLP(nnx.Module):
    """down(activation(gate) * up), with gate and up one product."""

    def __init__(self, config: Phi3Config, *, rngs: nnx.Rngs):
        features, hidden, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.hidden_act
        self.gate_up_proj = layers.Linear(features, 2 * hidden, bias=False, std=std, rngs=rngs)
        self.down_proj = layers.Linear(hidden, features, bias=False, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(layers.ACTIVATIONS[self.activation](gate) * up)


def build(config: Phi3Config, rngs: nnx.Rngs) -> llama.Decoder:
    norm = llama.rms_norm(config)

    def layer(index: int) -> llama.PreNormLayer:
        attention = llama.attention(
            config,
            bias=False,
            output_bias=False,
            names=("qkv_proj", "o_proj"),
            window=config.sliding_window,
            rngs=rngs,
        )
        return llama.PreNormLayer(norm, attention, FusedGatedMLP(config, rngs=rngs))

    return llama.Decoder(config, layer=layer, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(model_type="phi3", parse_config=Phi3Config.from_dict, build=build, unused=llama.UNUSED)
