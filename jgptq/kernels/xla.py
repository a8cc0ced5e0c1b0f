"""The product in plain XLA: dequantize once a call, then the library's matrix product. Runs on every platform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import tensor


@functools.partial(jax.checkpoint, static_argnums=2)  # the backward pass dequantizes again rather than hold the weight
def matmul(
    x: Float[Array, "*batch in"], weight: tensor.QuantizedTensor, result_dtype: Any
) -> Float[Array, "*batch out"]:
    """x @ weight with float32 accumulation."""
    if weight.permutation is not None:
        x = jnp.take(x, weight.permutation, axis=-1)
    # A float32 product is exact to float32; narrower ones have nothing to gain from more passes.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jnp.matmul(
        x,
        tensor.stored_matrix(weight, x.dtype),
        precision=precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return product.astype(result_dtype)
