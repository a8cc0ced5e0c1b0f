"""CausalLM: the way from tokens to logits that all models here share."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from jgptq.models.attention import Cache, Positions


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
        return self.head(self._features(tokens, positions)).astype(jnp.float32)

    def prefill(
        self, tokens: Integer[Array, "batch seq"], lengths: Integer[Array, " batch"], capacity: int
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after the first `lengths` tokens of each row, what follows being padding, and a cache of them."""
        positions = Positions.of_sequence(tokens.shape[1], capacity)
        x = self._features(tokens, positions)
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
        return self.head(last)[:, 0].astype(jnp.float32), positions.cache

    def step(
        self, tokens: Integer[Array, " batch"], places: Integer[Array, " batch"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Logits after one more token of each row, at its own position, and the cache with it."""
        positions = Positions.of_tokens(places, cache)
        x = self._features(tokens[:, None], positions)
        return self.head(x)[:, 0].astype(jnp.float32), positions.cache

    def _features(
        self, tokens: Integer[Array, "batch seq"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        """What leaves the last layer."""
        x = self.embed(tokens, positions)
        # Layers of one kind differ in nothing but their weights, so their traces have equal text and share a program.
        for layer in self.decoder_layers():
            x = layer(x, positions)
        return x
