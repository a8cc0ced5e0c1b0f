"""Uniform affine grids: which real values the codes of a group can stand for.

A group of weights shares one scale and one zero; code q stands for scale * (q - zero), q in 0 .. 2**bits - 1.
[Frantar et al. 2023, section 4, "Experiments: setup"; the min/max rule is theirs]
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a weight is rounded to.

    bits: width of a code: 2, 3, 4 or 8.
    group_size: consecutive inputs that share a scale; None: one group spans all inputs of an output feature.
        Where it does not divide the inputs, the last group is short.
    symmetric: zero fixed at 2**(bits - 1) rather than fitted.
    scale_dtype: what scales are rounded to before any code is chosen. float16 is what checkpoints store;
        choose "float32" for weights whose magnitude float16 cannot hold.
    positive_scales: keep symmetric scales positive. A negative one turns the grid round, so that its extra level
        lies on the side that needs it; formats hold both, but one runtime's kernel is known to misread a sign.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    scale_dtype: str = "float16"
    positive_scales: bool = False

    def __post_init__(self):
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}; choose one of {BITS}")
        whole = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if self.group_size is not None and (not whole or self.group_size < 1):
            raise ValueError(
                f"group_size={self.group_size!r}; give a positive integer, or None for one group an output feature"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r}; choose True or False")
        if not isinstance(self.positive_scales, bool):
            raise ValueError(f"positive_scales={self.positive_scales!r}; choose True or False")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r}; choose one of {SCALE_DTYPES}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def group_length(self, in_features: int) -> int:
        """Inputs in a full group of a weight with `in_features` inputs."""
        return in_features if self.group_size is None else min(self.group_size, in_features)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """A Grid as a compiled solve sees it: what depends on the width is a value, so one program serves every width."""

    max_code: Any
    midpoint: Any
    group_size: int | None = dataclasses.field(metadata={"static": True})
    symmetric: bool = dataclasses.field(metadata={"static": True})
    scale_dtype: str = dataclasses.field(metadata={"static": True})
    positive_scales: bool = dataclasses.field(metadata={"static": True})

    group_length = Grid.group_length


def levels(grid: Grid) -> Levels:
    return Levels(
        max_code=jnp.float32(grid.max_code),
        midpoint=jnp.float32(grid.midpoint),
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        scale_dtype=grid.scale_dtype,
        positive_scales=grid.positive_scales,
    )


def round_scales(scales: Float[Array, "*shape"], scale_dtype: str) -> Float[Array, "*shape"]:
    """Scales as they will be stored, in float32: rounded to `scale_dtype`, kept inside its normal range.

    A scale at either end of that range (see `scales_at_limit`) represents its group badly.
    """
    info = jnp.finfo(scale_dtype)
    sign = jnp.where(scales < 0, -1.0, 1.0).astype(scales.dtype)
    magnitude = jnp.clip(jnp.abs(scales), float(info.tiny), float(info.max))
    return (sign * magnitude).astype(scale_dtype).astype(jnp.float32)


def scales_at_limit(scales: Float[Array, "*shape"]) -> Array:
    """How many stored scales lie at the end of their dtype's normal range, and so stand for a value beyond it."""
    info = jnp.finfo(scales.dtype)
    magnitude = jnp.abs(scales)
    return jnp.sum((magnitude <= info.tiny) | (magnitude >= info.max))


def fit(w: Float[Array, "group out"], grid: Grid | Levels) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
    """Scale and zero of one group by the min/max rule, for each output feature.

    The range always includes 0, so that a weight of 0 (and padding) is represented. A group of zeros alone gets
    the range -1 .. 1. Scales come back rounded to `grid.scale_dtype`, both in float32.
    """
    low = jnp.minimum(jnp.min(w, axis=0), 0.0)
    high = jnp.maximum(jnp.max(w, axis=0), 0.0)
    if grid.symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
    # Divide each end before the difference: high - low may overflow.
    scale = high / grid.max_code - low / grid.max_code
    if grid.symmetric:
        zero = jnp.full_like(scale, grid.midpoint)
    else:
        zero = jnp.clip(jnp.round(-low / scale), 0, grid.max_code)
    return round_scales(scale, grid.scale_dtype), zero


# Shrink factors that `search` tries. Less than a third of the range is never best, more than all of it rarely.
SHRINKS = tuple(1.0 - 0.02 * k for k in range(35))


def search(w: Float[Array, "group out"], grid: Grid | Levels) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
    """As `fit`, with the range shrunk by the factor that minimizes the sum of |error|^2.5 over the group.

    Clipping the few largest weights lets all others be rounded more finely; an exponent above 2 keeps the largest
    from being given up. [Frantar et al. 2023's reference implementation searches likewise with exponent 2.4; 2.5
    needs only a square root]
    """
    full, zero = fit(w, grid)

    def try_shrink(best, shrink):
        scale = round_scales(full * shrink, grid.scale_dtype)
        error = jnp.abs(decode(encode(w, scale[None], zero[None], grid.max_code), scale[None], zero[None]) - w)
        loss = jnp.sum(error * error * jnp.sqrt(error), axis=0)
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, scale, best[1])), None

    start = (jnp.full_like(full, jnp.inf), full)
    (_, scale), _ = lax.scan(try_shrink, start, jnp.array(SHRINKS, w.dtype))
    return scale, zero


def fit_groups(
    w: Float[Array, "in out"], grid: Grid | Levels, fit: Callable = fit
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """`fit` (or `search`) for every group of a whole weight, inputs in natural order."""
    length = grid.group_length(w.shape[0])
    # Zeros that fill a short last group up never widen its range, which includes 0 anyway.
    padded = jnp.pad(w, ((0, -w.shape[0] % length), (0, 0)))
    return jax.vmap(lambda group: fit(group, grid))(padded.reshape(-1, length, w.shape[1]))


def encode(w: Array, scales: Array, zeros: Array, max_code: int | Array) -> Array:
    """Nearest codes (as floats, ties to even) of `w`; scales and zeros broadcast against it."""
    return jnp.clip(jnp.round(w / scales) + zeros, 0, max_code)


def decode(codes: Array, scales: Array, zeros: Array) -> Array:
    """The values that codes stand for; scales and zeros broadcast against them."""
    return scales * (codes - zeros)
