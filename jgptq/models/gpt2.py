"""GPT-2: pre-norm transformer decoder with learned positions. [Radford et al. 2019]

Its checkpoints store kernels as (in, out), which is what they call Conv1D; queries, keys and values are one kernel.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models import layers
from jgptq.models.attention import Attention, Positions
from jgptq.models.causal_lm import CausalLM
from jgptq.models.config import Config, check_divides
from jgptq.models.language_model import Architecture, ParameterPath, tensor_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """n_inner: width of the MLP; None: 4 n_embd."""

    model_type: ClassVar[str] = "gpt2"
    transformers_class: ClassVar[str] = "GPT2LMHeadModel"

    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int = 1024
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_divides(self, "n_head", "n_embd")

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions


class GPT2Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, norm: Callable[[], nnx.Module], attn: nnx.Module, mlp: nnx.Module):
        self.ln_1 = norm()
        self.attn = attn
        self.ln_2 = norm()
        self.mlp = mlp

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        x = x + self.attn(self.ln_1(x), positions)
        return x + self.mlp(self.ln_2(x))


class GPT2(CausalLM):
    """Tokens and positions are embedded and added; a tied head is the tokens' embedding, transposed."""

    def __init__(
        self,
        config: Config,
        features: int,
        *,
        decoder_layers: Sequence[nnx.Module],
        norm: Callable[[], nnx.Module],
        rngs: nnx.Rngs,
    ):
        std = config.initializer_range
        self.transformer = layers.Group(
            wte=layers.Embed(config.vocab_size, features, std=std, rngs=rngs),
            wpe=layers.Embed(config.max_position_embeddings, features, std=std, rngs=rngs),
            h=nnx.List(decoder_layers),
            ln_f=norm(),
        )
        self.lm_head = layers.untied_head(config, features, rngs=rngs)

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        """A position beyond those learned gives NaN."""
        return self.transformer.wte(tokens) + self.transformer.wpe(positions.queries)

    def decoder_layers(self) -> Sequence[nnx.Module]:
        return self.transformer.h

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        return layers.logits(self.transformer.ln_f(x), self.lm_head, self.transformer.wte)


def build(config: GPT2Config, rngs: nnx.Rngs) -> GPT2:
    norm = functools.partial(layers.LayerNorm, config.n_embd, epsilon=config.layer_norm_epsilon)
    std, head_dim = config.initializer_range, config.n_embd // config.n_head

    def layer(index: int) -> GPT2Layer:
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        attention = Attention(
            config.n_embd,
            heads=config.n_head,
            kv_heads=config.n_head,
            head_dim=head_dim,
            bias=True,
            output_bias=True,
            names=("c_attn", "c_proj"),
            scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
            std=std,
            rngs=rngs,
        )
        mlp = layers.MLP(
            config.n_embd,
            config.n_inner or 4 * config.n_embd,
            names=("c_fc", "c_proj"),
            activation=config.activation_function,
            bias=True,
            std=std,
            rngs=rngs,
        )
        return GPT2Layer(norm, attention, mlp)

    decoder_layers = [layer(index) for index in range(config.n_layer)]
    return GPT2(config, config.n_embd, decoder_layers=decoder_layers, norm=norm, rngs=rngs)


def conv1d_name(path: ParameterPath) -> tuple[str, bool]:
    """As usual, but only the head is stored transposed."""
    name, transposed = tensor_name(path)
    return name, transposed and path[0] == "lm_head"


ARCHITECTURE = Architecture(
    model_type="gpt2",
    parse_config=GPT2Config.from_dict,
    build=build,
    tensor_name=conv1d_name,
    prefix="transformer.",
    # Old checkpoints store the causal mask.
    unused=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight"),
)
