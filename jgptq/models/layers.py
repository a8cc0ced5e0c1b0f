"""Layers shared by the language models, in Flax NNX. Attribute names mirror the checkpoints'; kernels are (in, out).

A linear kernel may be a QuantizedTensor: `Linear` then multiplies by the packed weight. Arithmetic is in the
activations' dtype, except norms, rotations and softmax, which are in float32.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Integer

from jgptq import tensor
from jgptq.kernels.matmul import matmul
from jgptq.kernels.prepack import Prepacked

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """The packed kernels of several projections of the same inputs as one, in the place of the first; the others' are
    None. widths: their outputs, which lie side by side.
    """

    weight: Any
    widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})


jax.export.register_pytree_node_serialization(
    Joined,
    serialized_name="jgptq.Joined",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: (tuple(json.loads(data)[0]),),
)


PACKED = tensor.QuantizedTensor | Prepacked | tensor.Element


class Linear(nnx.Module):
    """x @ kernel + bias; the kernel is an (in, out) array or a QuantizedTensor of that shape."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        kernel = self.kernel.get_value()
        if isinstance(kernel, PACKED):
            return self.biased(matmul(x, kernel))
        return self.biased(jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype)))

    def biased(self, y: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
        return y if self.bias is None else y + along_last(self.bias.get_value(), y)


def together(x: Float[Array, "*batch in"], *projections: Linear) -> list[Float[Array, "*batch _"]]:
    """Each projection of x; all by one product where their kernels are joined."""
    kernel = projections[0].kernel.get_value()
    if not isinstance(kernel, Joined):
        return [projection(x) for projection in projections]
    ends = list(itertools.accumulate(kernel.widths))[:-1]
    outputs = jnp.split(matmul(x, kernel.weight), ends, axis=-1)
    return [projection.biased(y) for projection, y in zip(projections, outputs, strict=True)]


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
        return table.dequantize() if isinstance(table, tensor.QuantizedTensor | Prepacked) else table


def untied_head(config: Any, features: int, *, rngs: nnx.Rngs) -> Linear | None:
    """The projection to logits, or None where the config ties it to the embedding."""
    if config.tie_word_embeddings:
        return None
    return Linear(features, config.vocab_size, bias=False, std=config.initializer_range, rngs=rngs)


def logits(x: Float[Array, "*batch features"], head: Linear | None, embedding: Embed) -> Float[Array, "*batch vocab"]:
    return embedding.attend(x) if head is None else head(x)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + epsilon) * (offset + scale) over the last axis. [Zhang & Sennrich 2019]

    With an offset, as Gemma has it, the whole product is in float32.
    """

    def __init__(self, features: int, *, epsilon: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(features, 1.0 - offset))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale.get_value()
        if self.offset:
            return (normed * (self.offset + along_last(scale, normed))).astype(x.dtype)
        return normed.astype(x.dtype) * along_last(scale, x)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32. [Ba et al. 2016]"""

    def __init__(self, features: int, *, epsilon: float, affine: bool = True):
        self.scale = nnx.Param(jnp.ones(features)) if affine else None
        self.bias = nnx.Param(jnp.zeros(features)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            normed = normed * along_last(self.scale.get_value(), normed) + along_last(self.bias.get_value(), normed)
        return normed.astype(x.dtype)


class MLP(nnx.Module):
    """down(activation(up(x))); `names` are the checkpoint's for up and down."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        names: tuple[str, str],
        activation: str,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.names, self.activation = names, activation
        setattr(self, names[0], Linear(features, hidden, bias=bias, std=std, rngs=rngs))
        setattr(self, names[1], Linear(hidden, features, bias=bias, std=std, rngs=rngs))

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        up, down = (getattr(self, name) for name in self.names)
        return down(ACTIVATIONS[self.activation](up(x)))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). [Shazeer 2020]

    shared_input: names of the projections that multiply the same inputs.
    """

    def __init__(self, features: int, hidden: int, *, activation: str, bias: bool, std: float, rngs: nnx.Rngs):
        self.activation = activation
        self.shared_input = ("gate_proj", "up_proj")
        self.gate_proj = Linear(features, hidden, bias=bias, std=std, rngs=rngs)
        self.up_proj = Linear(features, hidden, bias=bias, std=std, rngs=rngs)
        self.down_proj = Linear(hidden, features, bias=bias, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class Group(nnx.Module):
    """Modules under a common name, where the checkpoint has one; None for one that a config leaves out."""

    def __init__(self, **modules: nnx.Module | None):
        for name, module in modules.items():
            setattr(self, name, module)
