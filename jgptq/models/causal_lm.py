"""CausalLM: the way from tokens to logits that all models here share."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models.attention import Positions


class CausalLM(nnx.Module):
    """A language model as embedding, layers and head. A layer maps (features, positions) to features."""

    def embed(self, tokens: Integer[Array, "batch seq"], positions: Positions) -> Float[Array, "batch seq features"]:
        """What enters the first layer."""
        raise NotImplementedError

    def decoder_layers(self) -> Sequence[nnx.Module]:
        raise NotImplementedError

    def head(self, x: Float[Array, "batch seq features"]) -> Float[Array, "batch seq vocab"]:
        """Logits from what leaves the last layer."""
        raise NotImplementedError

    def __call__(self, tokens: Integer[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Logits, float32."""
        positions = Positions.of_sequence(tokens.shape[1])
        x = self.embed(tokens, positions)
        # Layers of one kind differ in nothing but their weights, so their traces have equal text and share a program.
        for layer in self.decoder_layers():
            x = layer(x, positions)
        return self.head(x).astype(jnp.float32)
