"""OPT: transformer decoder with learned positions, norms before or after attention and MLP. [Zhang et al. 2022]"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers
from jgptq.models.attention import Attention, Positions
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture

FIRST_POSITION = 2  # the row of the table that position 0 has
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    """do_layer_norm_before: norms before attention and MLP, and one before the head; else after the sums.

    word_embed_proj_dim: width of the embedding; None: hidden_size. Another is projected in and, for the head, out.
    _remove_final_layer_norm: an old fault that some checkpoints are trained with.
    """

    model_type: ClassVar[str] = "opt"
    transformers_class: ClassVar[str] = "OPTForCausalLM"

    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    init_std: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "num_attention_heads", "hidden_size")
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)


class OPTLayer(nnx.Module):
    """As a Llama's or GPT-2's layer, or with each norm after the sum instead."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        self.norm_before, self.activation = config.do_layer_norm_before, config.activation_function
        features, std, bias = config.hidden_size, config.init_std, config.enable_bias
        norm = functools.partial(
            layers.LayerNorm, features, epsilon=EPSILON, affine=config.layer_norm_elementwise_affine
        )
        self.self_attn = Attention(
            features,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=features // config.num_attention_heads,
            bias=bias,
            output_bias=bias,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            std=std,
            rngs=rngs,
        )
        self.self_attn_layer_norm = norm()
        self.fc1 = layers.Linear(features, config.ffn_dim, bias=bias, std=std, rngs=rngs)
        self.fc2 = layers.Linear(config.ffn_dim, features, bias=bias, std=std, rngs=rngs)
        self.final_layer_norm = norm()

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        if self.norm_before:
            x = x + self.self_attn(self.self_attn_layer_norm(x), positions)
            return x + self._mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions))
        return self.final_layer_norm(x + self._mlp(x))

    def _mlp(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq features"]:
        return self.fc2(layers.ACTIVATIONS[self.activation](self.fc1(x)))


class OPT(CausalLM):
    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs):
        features, width, std = config.hidden_size, config.word_embed_proj_dim, config.init_std
        last_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        affine = config.layer_norm_elementwise_affine

        def projection(inputs: int, outputs: int) -> layers.Linear | None:
            return None if inputs == outputs else layers.Linear(inputs, outputs, bias=False, std=std, rngs=rngs)

        self.model = layers.Group(
            decoder=layers.Group(
                embed_tokens=layers.Embed(config.vocab_size, width, std=std, rngs=rngs),
                embed_positions=layers.Embed(
                    config.max_position_embeddings + FIRST_POSITION, features, std=std, rngs=rngs
                ),
                project_in=projection(width, features),
                layers=nnx.List([OPTLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]),
                final_layer_norm=layers.LayerNorm(features, epsilon=EPSILON, affine=affine) if last_norm else None,
                project_out=projection(features, width),
            )
        )
        self.lm_head = layers.untied_head(config, width, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        decoder = self.model.decoder
        x = decoder.embed_tokens(tokens)
        x = x if decoder.project_in is None else decoder.project_in(x)
        return x + decoder.embed_positions(positions.queries + FIRST_POSITION)

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.model.decoder.layers

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        decoder = self.model.decoder
        for module in (decoder.final_layer_norm, decoder.project_out):
            x = x if module is None else module(x)
        return layers.logits(x, self.lm_head, decoder.embed_tokens)


ARCHITECTURE = Architecture(
    model_type="opt",
    parse_config=OPTConfig.from_dict,
    build=lambda config, rngs: OPT(config, rngs=rngs),
    unused=(r"lm_head\.weight",),
)
