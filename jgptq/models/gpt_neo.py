"""GPT-Neo: a GPT-2 with separate projections, unscaled scores, and windows in some layers. [Black et al. 2021]"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jgptq.models import layers
from jgptq.models.attention import Attention, Positions
from jgptq.models.config import Config, check_divides
from jgptq.models.gpt2 import GPT2, GPT2Layer
from jgptq.models.language_model import Architecture

KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoConfig(Config):
    """attention_layers: "global" or "local" for each layer; a local one sees `window_size` tokens.

    intermediate_size: width of the MLP; None: 4 hidden_size.
    """

    model_type: ClassVar[str] = "gpt_neo"
    transformers_class: ClassVar[str] = "GPTNeoForCausalLM"

    hidden_size: int
    num_layers: int
    num_heads: int
    attention_layers: tuple[str, ...]
    window_size: int = 256
    max_position_embeddings: int = 2048
    intermediate_size: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "num_heads", "hidden_size")
        if len(self.attention_layers) != self.num_layers or not set(self.attention_layers) <= set(KINDS):
            raise ValueError(
                f"attention_layers={self.attention_layers!r}; give {self.num_layers}, one a layer, each one of {KINDS}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """attention_types, (kinds, how often) pairs, spell attention_layers out."""
        types = config.get("attention_types") or [[list(KINDS), 12]]
        try:
            layers = config.get("num_layers")
            fits = type(layers) is int and sum(len(kinds) * count for kinds, count in types) <= layers
            spelled = [kind for kinds, count in types for _ in range(count) for kind in kinds] if fits else []
        except (TypeError, ValueError) as error:
            raise ValueError(f"attention_types={types!r}; give pairs such as [['global', 'local'], 12]") from error
        return super().from_dict({**config, "attention_layers": spelled})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "attention_types": [[list(self.attention_layers), 1]]}


class Wrapped(nnx.Module):
    """The checkpoint has the attention one level deeper than GPT-2's."""

    def __init__(self, attention: Attention):
        self.attention = attention

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        return self.attention(x, positions)


def build(config: GPTNeoConfig, rngs: nnx.Rngs) -> GPT2:
    features, std = config.hidden_size, config.initializer_range
    norm = functools.partial(layers.LayerNorm, features, epsilon=config.layer_norm_epsilon)

    def layer(index: int) -> GPT2Layer:
        attention = Attention(
            features,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=features // config.num_heads,
            bias=False,
            output_bias=True,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            scale=1.0,
            window=config.window_size if config.attention_layers[index] == "local" else None,
            std=std,
            rngs=rngs,
        )
        mlp = layers.MLP(
            features,
            config.intermediate_size or 4 * features,
            names=("c_fc", "c_proj"),
            activation=config.activation_function,
            bias=True,
            std=std,
            rngs=rngs,
        )
        return GPT2Layer(norm, Wrapped(attention), mlp)

    decoder_layers = [layer(index) for index in range(config.num_layers)]
    return GPT2(config, features, decoder_layers=decoder_layers, norm=norm, rngs=rngs)


ARCHITECTURE = Architecture(
    model_type="gpt_neo",
    parse_config=GPTNeoConfig.from_dict,
    build=build,
    prefix="transformer.",
    # Old checkpoints store the causal mask.
    unused=(r"(transformer\.)?h\.\d+\.attn\.attention\.(masked_)?bias", r"lm_head\.weight"),
)
