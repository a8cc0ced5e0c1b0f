"""What a weight is solved towards when its inputs are no longer the float model's.

The weights before it are quantized, so it sees inputs x where the float model has x̂. Rather than itself, it should
imitate the float model's output: the best weight for the inputs it sees is W + (H + λI)⁻¹ Σ x (x̂ - x)ᵀ W, the
asymmetric target [Li et al. 2025, GPTAQ]. Where its output is added to a residual stream r, what the stream lacks,
r̂ - r, can be made up for as well, as far as it is linear in x: + (H + λI)⁻¹ Σ x (r̂ - r)ᵀ.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq.hessian import HIGHEST, Hessian, factor
from jgptq.panels import over_columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """How far weights move towards these targets: 0 not at all, 1 all the way.

    inputs: of the asymmetric target. residual: of what the residual stream lacks. ridge: λ, in units of the mean
    diagonal; larger is safer with few calibration tokens.
    """

    inputs: float = 0.75
    residual: float = 0.75
    ridge: float = 0.05

    def __post_init__(self):
        for name in ("inputs", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; give a number from 0 to 1")
        if not 0 < self.ridge <= 10:
            raise ValueError(f"ridge={self.ridge!r}; give a number above 0, up to 10")


class Drift(NamedTuple):
    """Sums over tokens of how two models differ, for weights that share their inputs.

    inputs: Σ x (x̂ - x)ᵀ. residuals: Σ x (r̂ - r)ᵀ for each weight that writes to a residual stream, by its number.
    """

    inputs: Float[Array, "*stack in in"]
    residuals: dict[int, Float[Array, "in out"]]


@functools.partial(jax.jit, donate_argnames="drift")
def corrections(hessian: Hessian, drift: Drift, ridge: Float[Array, ""] | float) -> Drift:
    """(H + λI)⁻¹ times each sum, as a mean: what to multiply a weight by, and what to add to it.

    The drift is donated: the result takes its place.
    """

    def solve(hessian, sums):
        factored = factor(hessian, ridge)
        tokens = jnp.maximum(hessian.tokens, 1).astype(jnp.float32)

        def columns(total):
            return jnp.where(factored.failed, 0.0, factored.solve(total / tokens))

        return [over_columns(columns, total) for total in sums]

    if hessian.total.ndim == 2:
        inputs, *residuals = solve(hessian, [drift.inputs, *drift.residuals.values()])
        return Drift(inputs, dict(zip(drift.residuals, residuals, strict=True)))
    return Drift(jax.lax.map(lambda each: solve(each[0], [each[1]])[0], (hessian, drift.inputs)), {})


@jax.jit
def moved(
    w: Float[Array, "*stack in out"],
    inputs: Float[Array, "*stack in in"],
    residual: Float[Array, "in out"] | None,
    strengths: Float[Array, "2"],
) -> Float[Array, "*stack in out"]:
    """The target of a weight, in float32: `inputs` and `residual` as `corrections` gives them."""
    w = w.astype(jnp.float32)
    target = w + strengths[0] * jnp.matmul(inputs, w, precision=HIGHEST)
    return target if residual is None else target + strengths[1] * residual
