"""What every solver takes and gives: arrays in, a QuantizedTensor and an Info out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jgptq import slices, tensor
from jgptq.grid import Grid, scales_at_limit
from jgptq.hessian import MAX_DAMP, Hessian


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a solve cost, as scalars (arrays, so that it passes through jit and vmap).

    loss: the solver's objective: mean squared output error summed over output features, damping included.
    relative_error: output error energy over output energy, tr(ΔᵀHΔ) / tr(WᵀHW), without damping.
    output: the output energy. Of more than 1024 outputs an estimate (see `energy`), in relative_error too: off by
    about 2 % on trained weights, seldom by 5 %, and by the same factor for every method.
    damp: damping used, in units of the mean diagonal; larger than asked for when the factorization failed there.
    tokens: calibration tokens seen. dead_inputs: inputs that were always zero. failed: no sound factorization; the
    codes mean nothing. scales_at_limit: scales that their dtype could not hold.
    finite: whether weight and Hessian were finite.
    """

    loss: Any
    relative_error: Any
    output: Any
    damp: Any
    tokens: Any
    dead_inputs: Any
    failed: Any
    scales_at_limit: Any
    finite: Any


@runtime_checkable
class Method(Protocol):
    """A quantization method with its options, as a value: one row of METHODS.

    It may also have prepare(hessian, grid): what the solves of several weights on one Hessian share, which `solve` then
    gets in the Hessian's place, with `tokens`, `diagonal` and `energy(d)` as a Hessian has them. The Hessian is not
    kept.
    It may have solve_all(weights, hessian, grid), which solves several such weights at once, for a list of what `solve`
    gives.
    With `separable = True` it says that it solves each output for itself: where there are several devices, each then
    solves some of them.
    """

    name: str

    def solve(self, w: Array, hessian: Hessian, grid: Grid) -> tuple[tensor.QuantizedTensor, Info]:
        """Solves one (in, out) weight; pure and traceable."""
        ...


def solve_all(
    method: Method, weights: Sequence[Array], hessian: Any, grid: Grid
) -> list[tuple[tensor.QuantizedTensor, Info]]:
    """Weights that see the same inputs, at once if the method can; hessian: as `Method.solve` takes it."""
    if hasattr(method, "solve_all"):
        return method.solve_all(weights, hessian, grid)
    return [method.solve(w, hessian, grid) for w in weights]


def check_weight(w: Array, grid: Grid) -> None:
    if not isinstance(grid, Grid):
        raise TypeError(f"grid={grid!r}; give a jgptq.Grid, such as Grid(bits=4, group_size=128)")
    if not hasattr(w, "ndim"):
        raise TypeError(f"w is a {type(w).__name__}; give an array of shape (in, out)")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w has shape {tuple(w.shape)}; give one nonempty (in, out) matrix, or jax.vmap over a stack")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w has dtype {w.dtype}; give a floating-point array")


def check_hessian(w: Array, hessian: Hessian) -> None:
    if not isinstance(hessian, Hessian):
        raise TypeError(
            f"hessian is a {type(hessian).__name__}; give what init_hessian({w.shape[0]}) and update_hessian return"
        )
    if hessian.total.ndim != 2 or hessian.in_features != w.shape[0]:
        raise ValueError(
            f"the Hessian is {tuple(hessian.total.shape)} but w has {w.shape[0]} inputs; "
            f"accumulate inputs of this weight into init_hessian({w.shape[0]})"
        )


def check_damp(damp: Any) -> None:
    """A traced damp passes: only its value could tell."""
    if isinstance(damp, int | float) and not 0 <= damp <= MAX_DAMP:
        raise ValueError(f"damp={damp!r}; give a number from 0 to {MAX_DAMP}, in units of the Hessian's mean diagonal")


# Outputs taken at once on a CPU, at most: more take memory and no less time, but for solves that search for no scales
# and make no sweeps, which are a fifth faster. Elsewhere all are: solvers go through the inputs one by one, and it is
# outputs that fill a GPU.
TILE, TILE_WITHOUT_SEARCH = 256, 1024
# Energies are products alone, which take a tenth longer of 256 outputs.
ENERGY_TILE = 512


def outputs_at_once(out_features: int, tile: int = TILE) -> int:
    """How many outputs `over_outputs` takes: on a CPU all, too, where no number from TILE / 4 to tile divides them."""
    most = min(tile if jax.default_backend() == "cpu" else out_features, out_features)
    size = max(size for size in range(1, most + 1) if out_features % size == 0)
    return size if size >= TILE // 4 else out_features


def over_outputs(f: Callable, w: Float[Array, "in out"], tile: int = TILE) -> Any:
    """f of some outputs of w, for one part of them after another; its results are stacked."""
    out_features = w.shape[1]
    size = outputs_at_once(out_features, tile)
    starts = jnp.arange(0, out_features, size)
    return lax.map(lambda start: f(slices.rows(w, start, size, axis=1)), starts)


# Outputs of which energies are computed, at most, and sums of outputs where there are more.
EXACT, SUMS = 1024, 256


def _itself(w: Array) -> Array:
    return w


def energy(
    shared: Any, arrays: tuple[Array, ...], difference: Callable[..., Array] = _itself, *others: Any
) -> Float[Array, ""]:
    """tr(dᵀ H d) for d = difference(*arrays, *others), which takes outputs of the (in, out) arrays for themselves;
    exact up to 1024.

    Of more it takes 256 sums of every 256th output, with random signs, which cancel products of two outputs on the
    average; times Σ H_kk d_k² of d over that of the sums. A standard deviation of 9 % is the most there could be,
    √(2/256), were all outputs alike; weights of three small trained models have 2 % (the worst 5 %), their rounding
    errors 1 %. The product with H costs as much as a whole solve, and this 256 / out of it.

    The product compiles by itself, once for all differences. difference: a function of a module, or it compiles anew.
    """
    return _product_energy(shared, *_signed_sums(shared, arrays, others, difference))


@functools.partial(jax.jit, static_argnames="difference")
def _signed_sums(shared, arrays, others, difference) -> tuple[Float[Array, "in sums"], Float[Array, ""] | None]:
    """d itself, or the sums of its outputs with Σ H_kk d_k² of all of them."""
    in_features, out_features = arrays[0].shape
    if out_features <= EXACT:
        return difference(*arrays, *others).astype(jnp.float32), None
    diagonal, count = shared.diagonal, -(-out_features // SUMS)
    signs = jnp.asarray(np.random.default_rng(0).choice(np.float32([-1, 1]), (count, SUMS)))

    def add(i, state):
        # A slice that would end outside is moved back: its first outputs were in the one before.
        first = jnp.minimum(i * SUMS, out_features - SUMS)
        d = difference(*(slices.rows(array, first, SUMS, axis=1) for array in arrays), *others)
        d = jnp.where((first + jnp.arange(SUMS) >= i * SUMS)[None], d.astype(jnp.float32), 0.0)
        sums, squares = state
        return sums + signs[i][None] * d, squares + _weighted_squares(diagonal, d)

    return lax.fori_loop(0, count, add, (jnp.zeros((in_features, SUMS), jnp.float32), jnp.zeros((), jnp.float32)))


@jax.jit
def _product_energy(shared, sums, squares):
    total = jnp.sum(over_outputs(shared.energy, sums, ENERGY_TILE))
    if squares is None:
        return total
    of_sums = _weighted_squares(shared.diagonal, sums)
    return total * squares / jnp.where(of_sums == 0, 1.0, of_sums)


def _weighted_squares(weights: Float[Array, " in"], d: Float[Array, "in out"]) -> Float[Array, ""]:
    return jnp.sum(weights * jnp.sum(d**2, axis=1))


# Packing compiles by itself, for each width; solves compile once for all of them.
pack = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def make_info(
    w: Float[Array, "in out"],
    scales: Float[Array, "groups out"],
    hessian: Hessian,
    *,
    error: Array,
    loss: Array,
    damp: Array,
    failed: Array,
) -> Info:
    """Completes an Info; scales in the dtype they are stored in; `error` is tr(ΔᵀHΔ) for the undamped mean Hessian."""
    output = energy(hessian, (w,))
    return Info(
        loss=loss,
        relative_error=relative(error, output),
        output=output,
        damp=damp,
        tokens=hessian.tokens,
        dead_inputs=jnp.sum(jnp.diagonal(hessian.total) <= 0),
        failed=failed,
        scales_at_limit=scales_at_limit(scales),
        finite=jnp.all(jnp.isfinite(w)) & jnp.all(jnp.isfinite(hessian.total)),
    )


@jax.jit
def relative(error: Float[Array, ""], output: Float[Array, ""]) -> Float[Array, ""]:
    """Error over output energy. A weight of zeros, or inputs of zeros: no output to be wrong about. NaN stays NaN."""
    return jnp.where(output == 0, 0.0, jnp.maximum(error, 0.0) / jnp.where(output == 0, 1.0, output))
