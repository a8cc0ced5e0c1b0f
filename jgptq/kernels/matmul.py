"""The one door to the dequantize-matmul: checks the arguments and chooses an implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq import tensor
from jgptq.kernels import xla

IMPLEMENTATIONS = {"xla": xla.matmul}


def matmul(
    x: Float[Array, "*batch in"],
    weight: tensor.QuantizedTensor,
    *,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """x @ W for a packed W seen as an (in, out) matrix; products are summed in float32.

    preferred_element_type: dtype of the result, as in jnp.matmul; None: x's dtype.
    implementation: a name in IMPLEMENTATIONS forces that one; None chooses (today "xla" on every platform).
    Differentiable with respect to x, in forward and reverse mode.
    """
    if not isinstance(weight, tensor.QuantizedTensor):
        raise TypeError(f"weight is a {type(weight).__name__}; give a QuantizedTensor, or use x @ weight for an array")
    if weight.codes.ndim != 2:
        raise ValueError(
            f"weight is a stack or batch of matrices (codes {tuple(weight.codes.shape)}); "
            "matmul takes one: use jax.vmap over x and weight"
        )
    if x.ndim < 1 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the weight takes {weight.in_features} features; "
            f"reshape x to (..., {weight.in_features})"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; give a floating-point array")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose one of {tuple(IMPLEMENTATIONS)}, or None")
    return IMPLEMENTATIONS[implementation or "xla"](x, weight, preferred_element_type or x.dtype)
