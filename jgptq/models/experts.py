"""Sparse mixture of experts: each token goes through the few gated MLPs that a router chooses. [Shazeer et al. 2017]"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jgptq.kernels.grouped import grouped_matmul
from jgptq.models.layers import ACTIVATIONS, PACKED, Group, Linear, precision


class ExpertLinear(nnx.Module):
    """A matrix for each expert: the kernel is an (experts, in, out) array, or a QuantizedTensor of that shape."""

    def __init__(self, experts: int, in_features: int, out_features: int, *, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (experts, in_features, out_features)))

    def __call__(self, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """The first counts[0] rows times the first expert's matrix, the next counts[1] times the second's, and on."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, PACKED):
            return grouped_matmul(x, kernel, counts)
        return lax.ragged_dot(x, kernel.astype(x.dtype), counts, precision=precision(x.dtype))


class SparseMoE(nnx.Module):
    """The sum over the `chosen` likeliest experts of probability times down(activation(gate(x)) * up(x)).

    names: the checkpoint's for gate, up and down. normalize: the probabilities of the chosen ones sum to 1.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        experts: int,
        chosen: int,
        normalize: bool,
        names: tuple[str, str, str],
        activation: str,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.count, self.chosen, self.normalize = experts, chosen, normalize
        self.names, self.activation = names, activation
        self.gate = Linear(features, experts, bias=False, std=std, rngs=rngs)
        shapes = ((features, hidden), (features, hidden), (hidden, features))
        matrices = [ExpertLinear(experts, *shape, std=std, rngs=rngs) for shape in shapes]
        self.experts = Group(**dict(zip(names, matrices, strict=True)))

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = jax.nn.softmax(self.gate(tokens).astype(jnp.float32), axis=-1)
        shares, choices = lax.top_k(probabilities, self.chosen)
        if self.normalize:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        # (token, choice) pairs in order of expert, so that each expert multiplies a run of rows.
        order = jnp.argsort(choices.reshape(-1))
        counts = jnp.bincount(choices.reshape(-1), length=self.count).astype(jnp.int32)
        outputs = self._experts(tokens[order // self.chosen], counts)
        in_token_order = outputs[jnp.argsort(order)].reshape(*shares.shape, -1).astype(jnp.float32)
        return jnp.sum(in_token_order * shares[..., None], axis=1).astype(x.dtype).reshape(x.shape)

    def _experts(
        self, rows: Float[Array, "rows features"], counts: Int[Array, " experts"]
    ) -> Float[Array, "rows features"]:
        gate, up, down = (getattr(self.experts, name) for name in self.names)
        return down(ACTIVATIONS[self.activation](gate(rows, counts)) * up(rows, counts), counts)
