"""OBQ: the exact greedy solver GPTQ descends from, for small layers and as an oracle.

Each output feature by itself, repeatedly: quantize the input whose rounding costs least, move the rest to make up.
[Frantar et al. 2022, algorithm 3; the choice and the update are its eq. 7, the removal from H⁻¹ its lemma 1]
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import grid as grids
from jgptq import tensor
from jgptq.grid import Grid
from jgptq.hessian import Hessian, factor
from jgptq.solvers.method import Info, check_damp, check_hessian, check_weight, make_info

# Output features solved at once; each holds an inverse of in² numbers.
ROWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class OBQ:
    """The method value; see `obq`."""

    damp: float = 0.01
    name: str = dataclasses.field(default="obq", init=False)
    separable = True

    def solve(self, w: Array, hessian: Hessian, grid: Grid) -> tuple[tensor.QuantizedTensor, Info]:
        return obq(w, hessian, grid, damp=self.damp)


def obq(
    w: Float[Array, "in out"], hessian: Hessian, grid: Grid, *, damp: float = 0.01
) -> tuple[tensor.QuantizedTensor, Info]:
    """Quantizes greedily, one output feature at a time, on min/max grids fitted to the original weight.

    Takes in³ operations and in² numbers for each output feature: meant for a few hundred inputs. Greedy choices
    between near ties are taken in float32 unless JAX has 64-bit types enabled. damp as in `gptq`.
    """
    check_weight(w, grid)
    check_hessian(w, hessian)
    check_damp(damp)
    return _obq(w, hessian, grid, damp)


@functools.partial(jax.jit, static_argnames="grid")
def _obq(w, hessian, grid, damp):
    dtype, w = w.dtype, w.astype(jnp.float32)
    in_features = w.shape[0]
    factored = factor(hessian, damp)
    damped = hessian.mean() + jnp.diag(factored.added)
    # float64 where 64-bit types are enabled, float32 elsewhere
    inverse = jnp.linalg.inv(damped.astype(jnp.result_type(float)))

    scales, zeros = grids.fit_groups(w, grid)
    index = jnp.arange(in_features) // grid.group_length(in_features)

    def output_feature(row):
        w, scales, zeros = (a.astype(inverse.dtype) for a in row)
        return _greedy(w, inverse, scales[index], zeros[index], grid.max_code)

    codes = lax.map(output_feature, (w.T, scales.T, zeros.T), batch_size=ROWS).T
    weight = tensor.from_codes(codes, scales, zeros, grid=grid, dtype=dtype)
    left = w - grids.decode(codes.astype(jnp.float32), scales[index], zeros[index])
    error = hessian.energy(left)
    info = make_info(
        w,
        weight.scales,
        hessian,
        error=error,
        loss=error + jnp.sum(factored.added * jnp.sum(left**2, axis=1)),
        damp=factored.damp,
        failed=factored.failed,
    )
    return weight, info


def _greedy(
    w: Float[Array, " in"], inverse: Float[Array, "in in"], scales: Array, zeros: Array, max_code: int
) -> Array:
    """Codes of one output feature; scales and zeros (in,) are those of each input's group."""

    def step(_, state):
        w, inverse, codes, left = state
        code = grids.encode(w, scales, zeros, max_code)
        error = w - grids.decode(code, scales, zeros)
        pivots = jnp.where(left, jnp.diagonal(inverse), 1.0)
        p = jnp.argmin(jnp.where(left, error**2 / pivots, jnp.inf))
        column = inverse[:, p]
        w = w - error[p] / pivots[p] * column
        inverse = inverse - jnp.outer(column, column) / pivots[p]
        return w, inverse, codes.at[p].set(code[p].astype(jnp.uint8)), left.at[p].set(False)

    start = (w, inverse, jnp.zeros(w.shape, jnp.uint8), jnp.ones(w.shape, bool))
    return lax.fori_loop(0, w.shape[0], step, start)[2]
