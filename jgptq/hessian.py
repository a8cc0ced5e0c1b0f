"""The layer Hessian: second moment of a layer's inputs, accumulated over calibration, and its damped factor."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jgptq import slices
from jgptq.cholesky import HIGHEST, divisor, factorize
from jgptq.panels import panel_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian:
    """Running sum over tokens of x xᵀ, float32 (in, in), and the token count, int32 scalar.

    A sum rather than a mean, so that no earlier batch is ever rescaled: batches may be split in any way.
    Half the paper's H = 2 X Xᵀ; no solver here depends on the factor. [Frantar et al. 2023, eq. 1 and below]
    """

    total: Any
    tokens: Any

    @property
    def in_features(self) -> int:
        return self.total.shape[-1]

    def mean(self) -> Float[Array, "*stack in in"]:
        """Mean over tokens of x xᵀ; zero when no token was seen."""
        return self.total / jnp.maximum(self.tokens, 1).astype(jnp.float32)[..., None, None]

    @property
    def diagonal(self) -> Float[Array, "*stack in"]:
        """Of the mean: the mean square of each input."""
        return jnp.diagonal(self.total, axis1=-2, axis2=-1) / jnp.maximum(self.tokens, 1).astype(jnp.float32)[..., None]

    def energy(self, d: Float[Array, "in out"]) -> Float[Array, ""]:
        """tr(dᵀ H d) for the mean H: the mean squared output, through d, of the inputs seen, summed over all outputs.

        Reads only the lower blocks of H, which halves the products.
        """
        n = self.in_features
        size = _side(n)

        def slice_d(i):
            # A slice that would end outside is moved back: its first rows were in the one before.
            rows = jnp.minimum(i * size, n - size) + jnp.arange(size)
            return jnp.where((rows >= i * size)[:, None], slices.rows(d, i * size, size), 0.0)

        def block_row(total, i):
            def product(j, sums):
                h_ij = slices.block(self.total, i, j, size)
                return sums + jnp.where(j < i, 2.0, 1.0) * jnp.dot(h_ij, slice_d(j), precision=HIGHEST)

            d_i = slice_d(i)
            sums = lax.fori_loop(0, i + 1, product, jnp.zeros_like(d_i))
            return total + jnp.sum(d_i * sums), None

        sums = lax.scan(block_row, jnp.zeros((), d.dtype), jnp.arange(-(-n // size)))[0]
        return sums / jnp.maximum(self.tokens, 1).astype(jnp.float32)


def init_hessian(in_features: int) -> Hessian:
    """A Hessian that has seen no token, for inputs of `in_features` features."""
    if not isinstance(in_features, int) or isinstance(in_features, bool) or in_features < 1:
        raise ValueError(f"in_features={in_features!r}; give the weight's number of inputs, a positive integer")
    return Hessian(jnp.zeros((in_features, in_features), jnp.float32), jnp.zeros((), jnp.int32))


def update_hessian(hessian: Hessian, x: Float[Array, "*batch in"]) -> Hessian:
    """Adds the tokens of `x` (any leading axes; float32, bfloat16 or float16), summed in float32.

    NaN or infinity in x stays visible as NaN or infinity in the sum.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; give the layer's floating-point inputs")
    if x.ndim < 1 or x.shape[-1] != hessian.in_features:
        raise ValueError(
            f"x has {x.shape[-1] if x.ndim else 0} features in its last axis, but this Hessian was made for "
            f"{hessian.in_features}; reshape x to (..., {hessian.in_features}), or call init_hessian on its width"
        )
    return _update(hessian, x)


@jax.jit
def _update(hessian: Hessian, x: Float[Array, "*batch in"]) -> Hessian:
    return mirrored(add_below(hessian, x))


# Blocks along a side of a triangle. Four leave 10 of 16 products; more would compile longer and save little.
SIDES = 4
# Rows of a block at least: in smaller ones a product loses on a CPU what the triangle saves; elsewhere it is to fill a
# GPU (not measured).
LEAST, LEAST_OF_ACCELERATORS = 128, 2048

# Inputs above which blocks go one by one: of those in one program XLA has all waiting to be added, over half a matrix.
WIDE = 8192


def add_below(hessian: Hessian, x: Float[Array, "*batch in"]) -> Hessian:
    """`update_hessian` of the lower triangle; above it sums mean nothing until all batches are in and they are
    `mirrored`, which takes a tenth of what adding 1024 tokens does (on a CPU)."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        rows = rows.astype(jnp.float32)
    (tokens, n), total = rows.shape, hessian.total
    size = _side_of_sums(n)
    if n > WIDE and size < n:
        return Hessian(_add_one_by_one(total, rows, size), hessian.tokens + tokens)
    # Slices are made once; slabs of rows up to the diagonal would be fewer products, and copy the batch twice over.
    columns = [rows[:, start : start + size] for start in range(0, n, size)]
    for i, here in enumerate(columns):
        for j, there in enumerate(columns[: i + 1]):
            block = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            total = total.at[block].add(_gram(here, there))
    return Hessian(total, hessian.tokens + tokens)


def _side_of_sums(n: int) -> int:
    if n > WIDE:
        return panel_size(n)
    least = LEAST if jax.default_backend() == "cpu" else LEAST_OF_ACCELERATORS
    return n // next(count for count in range(SIDES, 0, -1) if n % count == 0 and (n >= least * count or count == 1))


def waiting_numbers(n: int) -> int:
    """How many products of two inputs wait to be added to a sum over n inputs."""
    size = _side_of_sums(n)
    return size * size if n > WIDE else n * (n + size) // 2


def mirrored(hessian: Hessian) -> Hessian:
    """With the lower triangle of the sum above its diagonal as well; in place, but for widths without divisors."""
    n = hessian.in_features
    size = divisor(n, MIRROR) if jax.default_backend() == "cpu" else panel_size(n)
    size = size if size >= min(n, MIRROR // 8) else panel_size(n)

    def block(total, place):
        i, j = place
        below = slices.block(total, i, j, size)
        above = jnp.where(i == j, jnp.tril(below) + jnp.tril(below, -1).T, below.T)
        return slices.with_block(total, j, i, above), None

    places = tuple(map(jnp.asarray, np.tril_indices(n // size)))
    return Hessian(lax.scan(block, hessian.total, places)[0], hessian.tokens)


# Rows of a block that a CPU turns around, at most: 64 to 128 take half the time of 256 (2048 inputs).
MIRROR = 128


def _gram(a: Float[Array, "tokens a"], b: Float[Array, "tokens b"]) -> Float[Array, "a b"]:
    # Products of two bf16 or fp16 numbers are exact in float32, so narrow inputs need no widening first.
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=HIGHEST, preferred_element_type=jnp.float32)


def _add_one_by_one(total: Float[Array, "in in"], rows: Float[Array, "tokens in"], size: int) -> Float[Array, "in in"]:
    def columns(i):
        return slices.rows(rows, i * size, size, axis=1)

    def block_row(i, total):
        def block(j, total):
            added = slices.block(total, i, j, size) + _gram(columns(i), columns(j))
            return slices.with_block(total, i, j, added)

        return lax.fori_loop(0, i + 1, block, total)

    return lax.fori_loop(0, rows.shape[1] // size, block_row, total)


def merge_hessians(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of both sets of tokens."""
    if a.in_features != b.in_features:
        raise ValueError(f"Hessians of {a.in_features} and {b.in_features} features; merge two of one width")
    return Hessian(a.total + b.total, a.tokens + b.tokens)


def _side(n: int) -> int:
    """Rows of the blocks in which energies go through a triangle: a divisor of n from 256 to 512, if there is one."""
    size = divisor(n, 512)
    return size if size >= 256 else min(512, n)


class Factor(NamedTuple):
    """H + diag(added) = Lᵀ · diag(pivots) · L with L unit lower triangular.

    lower: L, zeros above its diagonal. added: what damping and dead inputs added to the diagonal of H. live: which
    inputs are not dead. damp: the damping used, at least the one asked for. failed: no damping made the matrix positive
    definite.
    """

    lower: Float[Array, "in in"]
    pivots: Float[Array, " in"]
    added: Float[Array, " in"]
    live: Bool[Array, " in"]
    damp: Float[Array, ""]
    failed: Bool[Array, ""]

    def energy(self, d: Float[Array, "in out"]) -> Float[Array, ""]:
        """tr(dᵀ H d), d in the factor's order, with no H at hand: the squares of D^½ L d, less what was added."""
        d = jnp.where(self.live[:, None], d, 0.0)
        return jnp.sum(self.pivots * jnp.sum(self.times(d) ** 2, axis=1) - self.added * jnp.sum(d**2, axis=1))

    def times(self, d: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """L d. Reads only the lower blocks, which halves the products."""
        n = self.pivots.shape[0]
        size = _side(n)

        def rows(i, product):
            # A slice that would end outside is moved back: its first rows were in the one before.
            row = jnp.minimum(i * size, n - size)

            def add(j, sums):
                column = jnp.minimum(j * size, n - size)
                new = (column + jnp.arange(size) >= j * size)[:, None]
                block = slices.corner(self.lower, (row, column), (size, size))
                d_j = jnp.where(new, slices.rows(d, column, size), 0.0)
                return sums + jnp.dot(block, d_j, precision=HIGHEST)

            sums = lax.fori_loop(0, i + 1, add, jnp.zeros((size, d.shape[1]), d.dtype))
            return slices.with_rows(product, row, sums)

        return lax.fori_loop(0, -(-n // size), rows, jnp.zeros_like(d))

    def solve(self, b: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The x for which (H + diag(added)) x = b, both in the factor's order."""
        half = lax.linalg.triangular_solve(
            self.lower, b, left_side=True, lower=True, transpose_a=True, unit_diagonal=True
        )
        half /= self.pivots[:, None]
        return lax.linalg.triangular_solve(self.lower, half, left_side=True, lower=True, unit_diagonal=True)


# The largest damping tried: past this multiple of the mean diagonal the factor is of the damping, not of the data.
MAX_DAMP = 10.0


def factor(hessian: Hessian, damp: Float[Array, ""] | float, order: Int[Array, " slots"] | None = None) -> Factor:
    """Factors a damped mean Hessian once, with no inverse; damping grows tenfold until the factor is sound.

    order: the input in each row of the factor, or `in_features` where there is none; None: as they come.
    Dead inputs (zero diagonal) are decoupled from the rest: their diagonal becomes the mean of the live ones.
    A factor is unsound when it is not finite or when a pivot falls below half the damping added: every pivot is at
    least the smallest eigenvalue, so exact arithmetic would keep it above.
    """
    order = jnp.arange(hessian.in_features) if order is None else order
    tokens = jnp.maximum(hessian.tokens, 1).astype(jnp.float32)
    diagonal = _taken(jnp.diagonal(hessian.total), order, 0) / tokens
    live = diagonal > 0
    scale = jnp.sum(jnp.where(live, diagonal, 0.0)) / jnp.maximum(jnp.sum(live), 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    revived = jnp.where(live, 0.0, scale)

    def attempt(state):
        damp, lower, *_ = state
        lower, pivots, _ = factorize(_damped(lower, hessian.total, tokens, order, revived + damp * scale))
        # What is not finite in a column makes its pivot so.
        sound = jnp.all(jnp.isfinite(pivots) & (pivots > 0.5 * damp * scale) & (pivots > 0))
        return jnp.where(sound, damp, jnp.maximum(10.0 * damp, 1e-4)), lower, pivots, sound

    def unsound(state):
        damp, *_, sound = state
        return ~sound & (damp <= MAX_DAMP)

    slots = order.shape[0]
    start = (
        jnp.asarray(damp, jnp.float32),
        jnp.zeros((slots, slots), jnp.float32),
        jnp.zeros(slots, jnp.float32),
        jnp.zeros((), bool),
    )
    damp, lower, pivots, sound = lax.while_loop(unsound, attempt, start)
    damp = jnp.where(sound, damp, 0.1 * damp)  # the last one tried
    return Factor(lower, pivots, revived + damp * scale, live, damp, ~sound)


def _taken(array: Array, indices: Array, axis: int) -> Array:
    """Zeros where an index is past the end."""
    return jnp.take(array, indices, axis=axis, mode="fill", fill_value=0)


def _damped(out: Array, total: Array, tokens: Array, order: Array, added: Array) -> Float[Array, "slots slots"]:
    """The lower triangle of the mean Hessian plus `added` on its diagonal.

    Goes into `out`, whose values do not matter, some rows at a time: a loop works in place, the whole would be copied.
    """
    slots = order.shape[0]
    size = divisor(slots, 128)

    def rows(block, out):
        here = (block * size + jnp.arange(size))[:, None]
        taken = _taken(_taken(total, order[here[:, 0]], 0), order, 1) / tokens
        taken += jnp.where(here == jnp.arange(slots)[None, :], added[None, :], 0.0)
        taken = jnp.where(here >= jnp.arange(slots)[None, :], taken, 0.0)
        return slices.with_rows(out, block * size, taken)

    return lax.fori_loop(0, slots // size, rows, out)
