"""Round to nearest: the baseline that looks at no data."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq import grid as grids
from jgptq import tensor
from jgptq.grid import Grid, Levels
from jgptq.hessian import Hessian
from jgptq.solvers.method import Info, check_hessian, check_weight, make_info, pack


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN:
    """The method value; see `rtn`."""

    scale_search: Literal[None, "lp"] = None
    name: str = dataclasses.field(default="rtn", init=False)
    separable = True

    def solve(self, w: Array, hessian: Hessian, grid: Grid) -> tuple[tensor.QuantizedTensor, Info]:
        return rtn(w, grid, hessian=hessian, scale_search=self.scale_search)


def rtn(
    w: Float[Array, "in out"],
    grid: Grid,
    *,
    hessian: Hessian | None = None,
    scale_search: Literal[None, "lp"] = None,
) -> tuple[tensor.QuantizedTensor, Info]:
    """Rounds each weight to the nearest point of its group's grid.

    scale_search: None: the grid spans the group's range. "lp": the best part of it, see `jgptq.grid.search`.
    hessian: only to report the loss and relative output error; without it they are those of white inputs (H = I).
    """
    check_weight(w, grid)
    if hessian is None:
        hessian = Hessian(jnp.eye(w.shape[0], dtype=jnp.float32), jnp.ones((), jnp.int32))
    check_hessian(w, hessian)
    if scale_search not in FITS:
        raise ValueError(f"scale_search={scale_search!r}; choose one of {tuple(FITS)}")
    codes, scales, zeros, info = _rtn(w, hessian, grids.levels(grid), scale_search)
    return pack(codes, scales, zeros, grid=grid, dtype=w.dtype), info


FITS = {None: grids.fit, "lp": grids.search}


def nearest(
    w: Float[Array, "in out"], grid: Grid | Levels, scale_search: Any = None
) -> tuple[Array, Array, Array, Array]:
    """Codes (as floats), scales, zeros, and the values that the codes stand for."""
    scales, zeros = grids.fit_groups(w, grid, FITS[scale_search])
    index = jnp.arange(w.shape[0]) // grid.group_length(w.shape[0])
    codes = grids.encode(w, scales[index], zeros[index], grid.max_code)
    return codes, scales, zeros, grids.decode(codes, scales[index], zeros[index])


@functools.partial(jax.jit, static_argnames="scale_search")
def _rtn(w, hessian, grid, scale_search):
    w = w.astype(jnp.float32)
    codes, scales, zeros, rounded = nearest(w, grid, scale_search)
    error = hessian.energy(w - rounded)
    info = make_info(
        w,
        scales.astype(grid.scale_dtype),
        hessian,
        error=error,
        loss=error,
        damp=jnp.zeros(()),
        failed=jnp.zeros((), bool),
    )
    return codes.astype(jnp.uint8), scales, zeros, info
