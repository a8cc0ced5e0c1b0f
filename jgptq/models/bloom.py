"""BLOOM: positions as linear biases on the scores, and a norm on the embedding. [Workshop et al. 2022]"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers
from jgptq.models.attention import Alibi, Attention, Positions, alibi_slopes
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class BloomConfig(Config):
    """seq_length: the context it was trained on; its positions have no limit.

    apply_residual_connection_post_layernorm: attention and MLP add to the norm of what they read.
    """

    model_type: ClassVar[str] = "bloom"
    transformers_class: ClassVar[str] = "BloomForCausalLM"

    hidden_size: int
    n_layer: int
    n_head: int
    seq_length: int = 2048
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "n_head", "hidden_size")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Early files have other names for three sizes."""
        old = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
        return super().from_dict({new: config[name] for name, new in old.items() if name in config} | dict(config))

    @property
    def max_position_embeddings(self) -> int:
        return self.seq_length


class BloomLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BloomConfig, *, rngs: nnx.Rngs):
        features, std = config.hidden_size, config.initializer_range
        self.add_to_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = layers.LayerNorm(features, epsilon=config.layer_norm_epsilon)
        self.self_attention = Attention(
            features,
            heads=config.n_head,
            kv_heads=config.n_head,
            head_dim=features // config.n_head,
            bias=True,
            output_bias=True,
            names=("query_key_value", "dense"),
            interleaved=True,
            alibi=Alibi(slopes=alibi_slopes(config.n_head)),
            std=std,
            rngs=rngs,
        )
        self.post_attention_layernorm = layers.LayerNorm(features, epsilon=config.layer_norm_epsilon)
        self.mlp = layers.MLP(
            features,
            4 * features,
            names=("dense_h_to_4h", "dense_4h_to_h"),
            activation="gelu_pytorch_tanh",
            bias=True,
            std=std,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        normed = self.input_layernorm(x)
        x = (normed if self.add_to_norm else x) + self.self_attention(normed, positions)
        normed = self.post_attention_layernorm(x)
        return (normed if self.add_to_norm else x) + self.mlp(normed)


class Bloom(CausalLM):
    def __init__(self, config: BloomConfig, *, rngs: nnx.Rngs):
        features, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.transformer = layers.Group(
            word_embeddings=layers.Embed(config.vocab_size, features, std=config.initializer_range, rngs=rngs),
            word_embeddings_layernorm=layers.LayerNorm(features, epsilon=epsilon),
            h=nnx.List([BloomLayer(config, rngs=rngs) for _ in range(config.n_layer)]),
            ln_f=layers.LayerNorm(features, epsilon=epsilon),
        )
        self.lm_head = layers.untied_head(config, features, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        return self.transformer.word_embeddings_layernorm(self.transformer.word_embeddings(tokens))

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.transformer.h

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        return layers.logits(self.transformer.ln_f(x), self.lm_head, self.transformer.word_embeddings)


ARCHITECTURE = Architecture(
    model_type="bloom",
    parse_config=BloomConfig.from_dict,
    build=lambda config, rngs: Bloom(config, rngs=rngs),
    prefix="transformer.",
    unused=(r"lm_head\.weight",),
)
