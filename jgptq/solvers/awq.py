"""AWQ: scale inputs so that the weights which matter most are rounded most finely, then round.

The product is unchanged when an input is divided by s and its row of the weight multiplied by s, but the row's rounding
error is divided by s. [Lin et al. 2024, section 3.2, eq. 4 and 5] Inputs of large activations get a large s; how much
larger is searched. Whatever solver rounds the scaled weight sees the inputs x / s.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jgptq import tensor
from jgptq.grid import Grid, Levels, levels
from jgptq.hessian import Hessian
from jgptq.solvers.method import Info, Method, check_hessian, check_weight, over_outputs, solve_all
from jgptq.solvers.rtn import RTN, nearest

# A scale is at most this much above or below their geometric mean: float16 must hold what it goes into.
MOST = 1024.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ:
    """The method value; see `awq_scales` for the search.

    solver: what quantizes the scaled weight; GPTQ() composes. points: of the grid of exponents.
    judge: a Method value by whose output error exponents are judged; None: by that of rounding, as in the paper.
    input_scales: whether weights keep their scales (`QuantizedTensor.input_scales`) where these cannot go into what the
        inputs are computed from. False: such weights are not scaled, and have the solver's name in the report, with a
        note where that is RTN, which is then all that was done to them; checkpoint formats other than
        Orbax's have no place for the scales.
    """

    solver: Any = dataclasses.field(default_factory=lambda: RTN(scale_search="lp"))
    points: int = 20
    judge: Any = None
    input_scales: bool = True

    def __post_init__(self):
        if not isinstance(self.solver, Method) or isinstance(self.solver, AWQ):
            raise TypeError(f"solver={self.solver!r}; give a Method value that does not scale, such as RTN() or GPTQ()")
        if not isinstance(self.points, int) or self.points < 1:
            raise ValueError(f"points={self.points!r}; give a positive integer")
        if not isinstance(self.judge, Method | None) or isinstance(self.judge, AWQ):
            raise TypeError(f"judge={self.judge!r}; give a Method value that does not scale, or None")

    @property
    def name(self) -> str:
        return "awq" if isinstance(self.solver, RTN) else f"awq+{self.solver.name}"

    @property
    def targets(self) -> Any:
        return getattr(self.solver, "targets", None)

    @property
    def bias_correction(self) -> bool:
        return getattr(self.solver, "bias_correction", False)

    @property
    def act_order(self) -> Any:
        return getattr(self.solver, "act_order", False)

    @property
    def separable(self) -> bool:
        return getattr(self.solver, "separable", False)

    @property
    def damp(self) -> float:
        return getattr(self.solver, "damp", 0.0)

    def scales(self, weights: Iterable[Array], hessian: Hessian, grid: Grid | Iterable[Grid]) -> Float[Array, " in"]:
        """The scales of inputs that these weights share."""
        if self.judge is not None:
            judged = dataclasses.replace(self, solver=self.judge)
            return judged._best_solved(list(weights), hessian, grid)
        search = "lp" if getattr(self.solver, "scale_search", None) else None
        return awq_scales(weights, hessian, grid, points=self.points, scale_search=search)

    def _best_solved(self, weights: list[Array], hessian: Hessian, grid: Grid | Iterable[Grid]) -> Float[Array, " in"]:
        """The candidate with the least output error of all weights, each solved with each."""
        grids = [grid] * len(weights) if isinstance(grid, Grid) else list(grid)
        candidates = _candidates(hessian, self.points)
        errors = []
        for scales in candidates:
            shared = {own: self.prepare(hessian, own, scales) for own in set(grids)}
            infos = [self.solve(w, shared[own], own)[1] for w, own in zip(weights, grids, strict=True)]
            errors.append(sum(info.relative_error * info.output for info in infos))
        return candidates[jnp.argmin(jnp.stack(errors))]

    def prepare(self, hessian: Hessian, grid: Grid, scales: Float[Array, " in"]) -> "Scaled":
        """What `solve` takes in the Hessian's place to solve several weights on the same scaled inputs."""
        shared = scale_hessian(hessian, scales)
        if hasattr(self.solver, "prepare"):
            shared = self.solver.prepare(shared, grid)
        return Scaled(scales, shared)

    def solve(self, w: Array, hessian: "Hessian | Scaled", grid: Grid) -> tuple[tensor.QuantizedTensor, Info]:
        (solved,) = self.solve_all([w], hessian, grid)
        return solved

    def solve_all(
        self, weights: Sequence[Array], hessian: "Hessian | Scaled", grid: Grid
    ) -> list[tuple[tensor.QuantizedTensor, Info]]:
        """Solves weights that see the same inputs on the same scales, at once if the solver can."""
        for w in weights:
            check_weight(w, grid)
        if not isinstance(hessian, Scaled):
            check_hessian(weights[0], hessian)
            hessian = self.prepare(hessian, grid, self.scales(weights, hessian, grid))
        scaled = [hessian.scales[:, None] * w.astype(jnp.float32) for w in weights]
        return [
            (dataclasses.replace(weight, input_scales=hessian.scales, dtype=jnp.dtype(w.dtype)), info)
            for w, (weight, info) in zip(weights, solve_all(self.solver, scaled, hessian.shared, grid), strict=True)
        ]


class Scaled(NamedTuple):
    """Scales s, and the Hessian of x / s or what a solver prepared of it."""

    scales: Float[Array, " in"]
    shared: Any

    @property
    def tokens(self) -> Array:
        return self.shared.tokens

    @property
    def diagonal(self) -> Float[Array, " in"]:
        """Of the Hessian of the inputs before scaling."""
        return self.scales**2 * self.shared.diagonal

    def energy(self, d: Float[Array, "in out"]) -> Float[Array, ""]:
        """tr(dᵀ H d) of the inputs before scaling, as `Hessian.energy` gives it."""
        return self.shared.energy(self.scales[:, None] * d)


@jax.jit
def scale_hessian(hessian: Hessian, scales: Float[Array, " in"]) -> Hessian:
    """The Hessian of x / s: diag(1/s) H diag(1/s)."""
    return Hessian(hessian.total / scales[:, None] / scales[None, :], hessian.tokens)


def awq_scales(
    weights: Iterable[Float[Array, "in _"]],
    hessian: Hessian,
    grid: Grid | Iterable[Grid],
    *,
    points: int = 20,
    scale_search: Literal[None, "lp"] = None,
) -> Float[Array, " in"]:
    """The scales s by which to divide the inputs that these weights share, and to multiply the weights' rows.

    s = r^α over its geometric mean, with r the root mean square of each input and α the one of k / points, k = 0 ..
    points - 1, for which Σ tr(Eᵀ H E) is least, summed over the weights, E = W - Q(diag(s) W) / s and Q rounding to
    nearest. Dead inputs have s = 1. The paper takes the mean of |x| for r; the Hessian's diagonal has the root mean
    square at no further pass over the data, and of the whole Hessian the error is exact where the paper's search
    computes it on samples. [Lin et al. 2024, eq. 4 and 5]

    grid: of all weights, or one for each. scale_search: of Q, as in `rtn`. Weights are taken one after another.
    """
    candidates = _candidates(hessian, points)
    grids = None if isinstance(grid, Grid) else iter(grid)
    total = jnp.zeros(points, jnp.float32)
    for w in weights:
        own = grid if grids is None else next(grids)
        check_weight(w, own)
        check_hessian(w, hessian)
        total = total + _errors(w, hessian, candidates, levels(own), scale_search)
    return candidates[jnp.argmin(total)]


@functools.partial(jax.jit, static_argnames="points")
def _candidates(hessian: Hessian, points: int) -> Float[Array, "points in"]:
    diagonal = jnp.diagonal(hessian.total)
    live = diagonal > 0
    logs = 0.5 * jnp.log(jnp.where(live, diagonal, 1.0))
    logs = jnp.where(live, logs - jnp.sum(logs) / jnp.maximum(jnp.sum(live), 1), 0.0)
    exponents = jnp.arange(points, dtype=jnp.float32) / points
    return jnp.clip(jnp.exp(exponents[:, None] * logs[None, :]), 1 / MOST, MOST)


@functools.partial(jax.jit, static_argnames="scale_search")
def _errors(
    w: Float[Array, "in out"], hessian: Hessian, candidates: Float[Array, "points in"], grid: Levels, scale_search: Any
) -> Float[Array, " points"]:
    def errors(tile):
        def error(scales):
            rounded = nearest(scales[:, None] * tile, grid, scale_search)[-1] / scales[:, None]
            return hessian.energy(tile - rounded)

        return lax.map(error, candidates)

    return jnp.sum(over_outputs(errors, w.astype(jnp.float32)), axis=0)
