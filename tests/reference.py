"""Float64 NumPy oracles: each algorithm as its paper states it, with no blocking and no thought of speed.

Nothing here imports jgptq or shares a formula with it: GPTQ inverts the Hessian and takes the Cholesky factor of the
inverse, as algorithm 1 of Frantar et al. 2023 does; packing goes through a string of bits.
"""

import dataclasses

import numpy as np

# Packing: one little-endian bit string for each output feature.


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(length, out) codes as (words, out) uint32; the last word is filled up with zero bits."""
    length, out = codes.shape
    words = -(-length * bits // 32)
    packed = np.zeros((words, out), np.uint32)
    for o in range(out):
        # Lowest bit first, so that character n of the string is bit n of the stream.
        stream = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes[:, o]).ljust(words * 32, "0")
        packed[:, o] = [int(stream[32 * n : 32 * n + 32][::-1], 2) for n in range(words)]
    return packed


def unpack(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """The first `length` codes of (words, out) uint32, (length, out)."""
    codes = np.zeros((length, words.shape[1]), np.int64)
    for o in range(words.shape[1]):
        stream = "".join(format(int(word), "032b")[::-1] for word in words[:, o])
        codes[:, o] = [int(stream[bits * k : bits * k + bits][::-1], 2) for k in range(length)]
    return codes


def dequantize(words, scales, zeros, permutation, *, bits: int, group_size: int, in_features: int) -> np.ndarray:
    """The (in, out) weight from a packed tensor's raw fields; zeros None: 2**(bits - 1)."""
    codes = unpack(np.asarray(words), bits, in_features)
    scales = np.asarray(scales).astype(np.float64)
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if zeros is None else np.asarray(zeros).astype(np.int64)
    weight = np.zeros(codes.shape)
    for k in range(in_features):
        row = k if permutation is None else int(np.asarray(permutation)[k])
        weight[row] = scales[k // group_size] * (codes[k] - zeros[k // group_size])
    return weight


# Grids.


@dataclasses.dataclass
class Fit:
    """A group's grid, and how far scale (in units of its last place) and zero (in codes) are from a tie."""

    scale: np.ndarray
    zero: np.ndarray
    scale_margin: np.ndarray
    zero_margin: np.ndarray


def fit(w: np.ndarray, bits: int, symmetric: bool, scale_dtype=np.float16) -> Fit:
    """Min/max grid of one (group, out) block. An all-zero group gets the range -1 .. 1."""
    levels = 2**bits - 1
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if symmetric:
        high = np.maximum(abs(low), high)
        low = -high
    low, high = np.where(high - low == 0, -1.0, low), np.where(high - low == 0, 1.0, high)
    exact = (high - low) / levels
    if symmetric:
        zero, zero_margin = np.full(exact.shape, float(2 ** (bits - 1))), np.full(exact.shape, 0.5)
    else:
        zero, zero_margin = np.round(-low / exact), tie_margin(-low / exact, levels)
    scale = exact.astype(scale_dtype)
    ulp = np.spacing(scale).astype(np.float64)
    scale = scale.astype(np.float64)
    return Fit(scale, zero, 0.5 - abs(exact - scale) / ulp, zero_margin)


def tie_margin(position: np.ndarray, levels: int) -> np.ndarray:
    """Distance of a position on the grid (in codes) from the nearest point where rounding changes."""
    position = np.clip(position, 0, levels)
    return abs(position - np.floor(position) - 0.5)


def nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.round(w / scale + zero), 0, 2**bits - 1)


# Solvers.


@dataclasses.dataclass
class Solution:
    """codes, code_margin (in, out) and group (in,) in natural input order; the rest (groups, out)."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray
    order: np.ndarray
    code_margin: np.ndarray
    scale_margin: np.ndarray
    zero_margin: np.ndarray
    loss: float

    @property
    def weight(self) -> np.ndarray:
        return self.scales[self.group] * (self.codes - self.zeros[self.group])


def damped(h: np.ndarray, damp: float) -> np.ndarray:
    """H with dead inputs given the mean diagonal of the live ones, and damp times that mean added."""
    h = np.array(h, np.float64)
    diagonal = np.diagonal(h)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    return h + np.diag(np.where(live, 0.0, mean) + damp * mean)


def quantization_order(diagonal: np.ndarray, group_size: int, act_order) -> np.ndarray:
    inputs = range(len(diagonal))
    if act_order is False:
        return np.array(inputs)
    if act_order == "group":
        groups = [list(inputs)[start : start + group_size] for start in range(0, len(diagonal), group_size)]
        groups = [sorted(group, key=lambda i: -diagonal[i]) for group in groups]
        groups = sorted(groups, key=lambda group: -diagonal[group[0]])
        return np.array([i for group in groups for i in group])
    return np.array(sorted(inputs, key=lambda i: -diagonal[i]))


def gptq(
    w, h, *, bits, group_size, symmetric, act_order=False, damp=0.01, scale_dtype=np.float16, order_weights=1.0
) -> Solution:
    """Algorithm 1 of Frantar et al. 2023, one input at a time, every remaining input updated at once.

    w (in, out); h (in, in), the mean of x xᵀ. order_weights multiply the diagonal by which inputs are ordered. A
    group's grid is fitted to the current weights when the first of its inputs is reached; with static groups, to the
    original weights. loss is that of the damped Hessian.
    """
    w = np.array(w, np.float64)
    n, out = w.shape
    group_size = n if group_size is None else min(group_size, n)
    groups = -(-n // group_size)
    order = quantization_order(np.diagonal(h) * order_weights, group_size, act_order)
    if act_order is True:
        group = np.zeros(n, int)
        group[order] = np.arange(n) // group_size
    else:
        group = np.arange(n) // group_size

    upper = np.linalg.cholesky(np.linalg.inv(damped(h, damp)[order][:, order])).T
    fits = {g: fit(w[group == g], bits, symmetric, scale_dtype) for g in range(groups)} if act_order == "static" else {}
    codes, margin, loss = np.zeros((n, out)), np.zeros((n, out)), 0.0
    for j, i in enumerate(order):
        g = group[i]
        if g not in fits:
            fits[g] = fit(w[group == g], bits, symmetric, scale_dtype)
        scale, zero = fits[g].scale, fits[g].zero
        codes[i] = nearest(w[i], scale, zero, bits)
        margin[i] = tie_margin(w[i] / scale + zero, 2**bits - 1)
        error = (w[i] - scale * (codes[i] - zero)) / upper[j, j]
        loss += float(np.sum(error**2))
        w[order[j + 1 :]] -= np.outer(upper[j, j + 1 :], error)
    scales, zeros, scale_margin, zero_margin = (
        np.stack([getattr(fits[g], field.name) for g in range(groups)]) for field in dataclasses.fields(Fit)
    )
    return Solution(codes, scales, zeros, group, order, margin, scale_margin, zero_margin, loss)


def rtn(w, *, bits, group_size, symmetric, scale_dtype=np.float16) -> Solution:
    """Round to nearest; loss is that of white inputs."""
    n = len(w)
    return dataclasses.replace(
        gptq(
            w,
            np.eye(n),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            act_order="static",
            damp=0.0,
            scale_dtype=scale_dtype,
        ),
        order=np.arange(n),
    )


def obq(w, h, *, bits, group_size, symmetric, damp=0.01, scale_dtype=np.float16) -> tuple[np.ndarray, float]:
    """Greedy quantization of each output feature by itself, and the damped loss [Frantar et al. 2022, section 4].

    Brute force: at every step the Hessian of the inputs still real is inverted anew, each candidate's least-squares
    loss (w - q)² / [H⁻¹]_pp is computed, and the others move by the least-squares answer.
    """
    w = np.array(w, np.float64)
    n, out = w.shape
    group_size = n if group_size is None else min(group_size, n)
    fits = [fit(w[start : start + group_size], bits, symmetric, scale_dtype) for start in range(0, n, group_size)]
    h = damped(h, damp)
    codes, loss = np.zeros((n, out)), 0.0
    for o in range(out):
        scale = np.array([fits[i // group_size].scale[o] for i in range(n)])
        zero = np.array([fits[i // group_size].zero[o] for i in range(n)])
        current, left = w[:, o].copy(), list(range(n))
        while left:
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            code = nearest(current[left], scale[left], zero[left], bits)
            error = current[left] - scale[left] * (code - zero[left])
            p = int(np.argmin(error**2 / np.diagonal(inverse)))
            codes[left[p], o] = code[p]
            current[left] -= error[p] / inverse[p, p] * inverse[:, p]
            left.pop(p)
        delta = w[:, o] - scale * (codes[:, o] - zero)
        loss += float(delta @ h @ delta)
    return codes, loss


def relative_error(w, approx, h) -> float:
    """tr(ΔᵀHΔ) / tr(WᵀHW)."""
    w, approx, h = (np.asarray(a, np.float64) for a in (w, approx, h))
    delta = w - approx
    return float(np.trace(delta.T @ h @ delta) / np.trace(w.T @ h @ w))


# Agreement with a float32 solver.


@dataclasses.dataclass
class Agreement:
    """equal: share of codes that agree. ties: output features that part from the oracle at a near-tie. unexplained:
    output features that part from it anywhere else."""

    equal: float
    ties: int
    unexplained: int


# Float32 errors of about 1e-6, as shares of a code (grown by the number of levels) and of a float16's last place.
CODE_TIE = {2: 1e-4, 3: 1e-4, 4: 2e-4, 8: 2e-3}
SCALE_TIE = 5e-3


def agreement(codes, scales, zeros, oracle: Solution, *, bits: int) -> Agreement:
    """Compares codes (natural order), scales and zeros with the oracle's.

    One rounding the other way moves every later input of its output feature, so only the first difference in the
    order of quantization says anything: it must lie near a rounding boundary.
    """
    codes, scales, zeros = (np.asarray(a).astype(np.float64) for a in (codes, scales, zeros))
    ties = unexplained = 0
    for o in np.flatnonzero(
        (codes != oracle.codes).any(0) | (scales != oracle.scales).any(0) | (zeros != oracle.zeros).any(0)
    ):
        for i in oracle.order:
            g = oracle.group[i]
            compared = (
                (scales[g, o] != oracle.scales[g, o], oracle.scale_margin[g, o], SCALE_TIE),
                (zeros[g, o] != oracle.zeros[g, o], oracle.zero_margin[g, o], CODE_TIE[bits]),
                (codes[i, o] != oracle.codes[i, o], oracle.code_margin[i, o], CODE_TIE[bits]),
            )
            first = next(((margin, tie) for differs, margin, tie in compared if differs), None)
            if first is not None:
                ties, unexplained = ties + (first[0] < first[1]), unexplained + (first[0] >= first[1])
                break
    return Agreement(float(np.mean(codes == oracle.codes)), int(ties), int(unexplained))


# Problems.


def problem(in_features: int, out_features: int, *, tokens: int = 1024, seed: int = 0, decay: float = 0.75):
    """A weight (in, out) and correlated inputs (tokens, in) whose covariance has the spectrum i^-decay, in float32."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(in_features, in_features)))[0]
    spectrum = np.sqrt(np.arange(1, in_features + 1) ** -decay)
    x = rng.normal(size=(tokens, in_features)) @ (spectrum[:, None] * basis.T)
    return rng.normal(size=(in_features, out_features)).astype(np.float32), x.astype(np.float32)
