"""What quantization moves the mean of a layer's outputs by, for its bias to take back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq.hessian import HIGHEST


@jax.jit
def bias_correction(
    w: Float[Array, "in out"],
    quantized: Float[Array, "in out"],
    mean: Float[Array, " in"],
    float_mean: Float[Array, " in"],
) -> Float[Array, " out"]:
    """What to add to a bias so that the mean output over calibration tokens is the float model's.

    mean: of the inputs x that the quantized weight Q sees; float_mean: of the float model's x̂. Gives x̂ᵀW - xᵀQ, of the
    means. [Nagel et al. 2019, section 4.2, with the means measured]
    """
    before = jnp.dot(float_mean.astype(jnp.float32), w.astype(jnp.float32), precision=HIGHEST)
    return before - jnp.dot(mean.astype(jnp.float32), quantized.astype(jnp.float32), precision=HIGHEST)
