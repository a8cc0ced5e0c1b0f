"""Layers shared by the language models, in Flax NNX. Attribute names mirror the checkpoints'; kernels are (in, out).

A linear kernel may be a QuantizedTensor: `Linear` then multiplies by the packed weight. Arithmetic is in the
activations' dtype, except norms, rotations and softmax, which are in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jgptq import tensor
from jgptq.kernels.matmul import matmul
from jgptq.models import rotary

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Float32 products in float32, which accelerators do not do unasked; narrower ones as the platform does them."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def along_last(vector: Float[Array, " features"], like: Array) -> Array:
    """`vector` in the dtype of `like`, with axes of size 1 before its own, so that it broadcasts over `like`."""
    return jnp.expand_dims(vector.astype(like.dtype), tuple(range(like.ndim - 1)))


class Linear(nnx.Module):
    """x @ kernel + bias; the kernel is an (in, out) array or a QuantizedTensor of that shape."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        kernel = self.kernel.get_value()
        if isinstance(kernel, tensor.QuantizedTensor):
            y = matmul(x, kernel)
        else:
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype))
        return y if self.bias is None else y + along_last(self.bias.get_value(), y)


class Embed(nnx.Module):
    """A table of one row a token; as a tied head it is used transposed."""

    def __init__(self, vocab_size: int, features: int, *, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (vocab_size, features)))

    def __call__(self, tokens: Integer[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """A token outside the vocabulary gives NaN."""
        return jnp.take(self._table(), tokens, axis=0)

    def attend(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch vocab"]:
        return jnp.matmul(x, self._table().astype(x.dtype).T, precision=precision(x.dtype))

    def _table(self) -> Float[Array, "vocab features"]:
        table = self.embedding.get_value()
        return table.dequantize() if isinstance(table, tensor.QuantizedTensor) else table


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) * scale over the last axis. [Zhang & Sennrich 2019]"""

    def __init__(self, features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * along_last(self.scale.get_value(), x)


class Attention(nnx.Module):
    """Causal attention with rotary positions; `kv_heads` heads of keys and values serve equal runs of query heads."""

    def __init__(
        self, features: int, *, heads: int, kv_heads: int, head_dim: int, bias: bool, std: float, rngs: nnx.Rngs
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = Linear(features, heads * head_dim, bias=bias, std=std, rngs=rngs)
        self.k_proj = Linear(features, kv_heads * head_dim, bias=bias, std=std, rngs=rngs)
        self.v_proj = Linear(features, kv_heads * head_dim, bias=bias, std=std, rngs=rngs)
        self.o_proj = Linear(heads * head_dim, features, bias=bias, std=std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq features"],
        cos: Float[Array, "seq half"],
        sin: Float[Array, "seq half"],
        mask: Bool[Array, "seq seq"],
    ) -> Float[Array, "batch seq features"]:
        """mask: (query, key), True where the query sees the key."""
        batch, seq, _ = x.shape
        queries = rotary.rotate(self.q_proj(x).reshape(batch, seq, self.heads, self.head_dim), cos, sin)
        keys = rotary.rotate(self.k_proj(x).reshape(batch, seq, self.kv_heads, self.head_dim), cos, sin)
        values = self.v_proj(x).reshape(batch, seq, self.kv_heads, self.head_dim)
        queries = queries.reshape(batch, seq, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        scores = jnp.einsum(
            "bqhgd,bkhd->bhgqk", queries, keys, precision=precision(x.dtype), preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[None, None, None], scores * self.head_dim**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, values, precision=precision(x.dtype))
        return self.o_proj(mixed.reshape(batch, seq, self.heads * self.head_dim))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). [Shazeer 2020]"""

    def __init__(self, features: int, hidden: int, *, activation: str, bias: bool, std: float, rngs: nnx.Rngs):
        self.activation = activation
        self.gate_proj = Linear(features, hidden, bias=bias, std=std, rngs=rngs)
        self.up_proj = Linear(features, hidden, bias=bias, std=std, rngs=rngs)
        self.down_proj = Linear(hidden, features, bias=bias, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))
