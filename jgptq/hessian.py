"""The layer Hessian: second moment of a layer's inputs, accumulated over calibration, and its damped factor."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

HIGHEST = lax.Precision.HIGHEST


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
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        rows = rows.astype(jnp.float32)
    # Products of two bf16 or fp16 numbers are exact in float32, so narrow inputs need no widening first.
    gram = lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.float32)
    return Hessian(hessian.total + gram, hessian.tokens + rows.shape[0])


def merge_hessians(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of both sets of tokens."""
    if a.in_features != b.in_features:
        raise ValueError(f"Hessians of {a.in_features} and {b.in_features} features; merge two of one width")
    return Hessian(a.total + b.total, a.tokens + b.tokens)


class Factor(NamedTuple):
    """H + damp·mean(diag H)·I = upper · diag(pivots) · upperᵀ with `upper` unit upper triangular.

    added: what damping and dead inputs added to the diagonal of H. damp: the damping used, at least the one asked
    for. failed: no damping made the matrix positive definite.
    """

    upper: Float[Array, "in in"]
    pivots: Float[Array, " in"]
    added: Float[Array, " in"]
    damp: Float[Array, ""]
    failed: Bool[Array, ""]


# The largest damping tried: past this multiple of the mean diagonal the factor is of the damping, not of the data.
MAX_DAMP = 10.0


def factor(h: Float[Array, "in in"], damp: Float[Array, ""] | float) -> Factor:
    """Factors a damped Hessian once, with no inverse; damping grows tenfold until the factor is sound.

    Dead inputs (zero diagonal) are decoupled from the rest: their diagonal becomes the mean of the live ones.
    A factor is unsound when it is not finite or when a pivot falls below half the damping added: every pivot is at
    least the smallest eigenvalue, so exact arithmetic would keep it above.
    """
    diagonal = jnp.diagonal(h)
    live = diagonal > 0
    scale = jnp.sum(jnp.where(live, diagonal, 0.0)) / jnp.maximum(jnp.sum(live), 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    revived = jnp.where(live, 0.0, scale)
    inputs = jnp.arange(h.shape[0])
    on_diagonal = inputs[:, None] == inputs[None, :]

    def attempt(state):
        damp, *_ = state
        # The Cholesky factor of the matrix read backwards is the upper-triangular factor of the matrix itself.
        damped = h + jnp.where(on_diagonal, (revived + damp * scale)[None, :], 0.0)
        lower = lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        upper = lower[::-1, ::-1]
        root = jnp.diagonal(upper)
        pivots = root * root
        sound = jnp.all(jnp.isfinite(upper)) & jnp.all(pivots > 0.5 * damp * scale) & jnp.all(pivots > 0)
        return jnp.where(sound, damp, jnp.maximum(10.0 * damp, 1e-4)), upper / root[None, :], pivots, sound

    def unsound(state):
        damp, *_, sound = state
        return ~sound & (damp <= MAX_DAMP)

    start = (jnp.asarray(damp, jnp.float32), jnp.zeros_like(h), jnp.zeros_like(diagonal), jnp.zeros((), bool))
    damp, upper, pivots, sound = lax.while_loop(unsound, attempt, start)
    damp = jnp.where(sound, damp, 0.1 * damp)  # the last one tried
    return Factor(upper, pivots, revived + damp * scale, damp, ~sound)


def energy(h: Float[Array, "in in"], d: Float[Array, "in out"]) -> Float[Array, ""]:
    """tr(dᵀ H d) for symmetric H: the mean squared output of inputs with second moment H through d, over all outputs.

    Reads only the lower blocks of H, which halves the products.
    """
    rows = min(512, h.shape[0])
    blocks = -(-h.shape[0] // rows)
    padding = blocks * rows - h.shape[0]
    h, d = jnp.pad(h, ((0, padding), (0, padding))), jnp.pad(d, ((0, padding), (0, 0)))

    def block_row(total, i):
        d_i = lax.dynamic_slice_in_dim(d, i * rows, rows)

        def product(j, sums):
            h_ij = lax.dynamic_slice(h, (i * rows, j * rows), (rows, rows))
            d_j = lax.dynamic_slice_in_dim(d, j * rows, rows)
            return sums + jnp.where(j < i, 2.0, 1.0) * jnp.dot(h_ij, d_j, precision=HIGHEST)

        sums = lax.fori_loop(0, i + 1, product, jnp.zeros_like(d_i))
        return total + jnp.sum(d_i * sums), None

    return lax.scan(block_row, jnp.zeros((), d.dtype), jnp.arange(blocks))[0]
