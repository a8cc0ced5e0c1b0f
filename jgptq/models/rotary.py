"""Rotary position embedding and the ways long-context checkpoints rescale it.

Pair (i, i + head_dim / 2) of a head turns by position * frequency_i, frequency_i = theta**(-2 i / head_dim).
[Su et al. 2021; "dynamic" and "yarn": Peng et al. 2023; "llama3": the Llama 3.1 release]
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jgptq.models.json_fields import read_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary part of a model's config, in the config's own words.

    original_length: context length before rescaling, in tokens (original_max_position_embeddings).
    attention_factor: multiplies cos and sin; None: what the rope type prescribes.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported; choose one of {tuple(ROPE_TYPES)}")
        for name in ("theta", "factor", "original_length"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"rope: {name}={value!r}; give a positive number")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope: high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], max_length: int) -> "Rope":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).

        max_length: the model's max_position_embeddings, which stands in for a missing original length.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"rope parameters are {given!r}; give one flat object with a rope_type for all layers")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor is not supported here; only heads rotated in full are")
        rope_type = given.get("rope_type") or given.get("type") or "default"
        needed = NEEDED.get(rope_type, ())
        if missing := [name for name in needed if given.get(name) is None]:
            raise ValueError(f"rope_type {rope_type!r} needs {list(needed)} in config.json; {missing} is missing")
        read = {field: given.get(NAMES.get(field, field)) for field in (*needed, *OPTIONAL.get(rope_type, ()))}
        read["theta"] = given.get("rope_theta") or config.get("rope_theta")
        if "original_length" in read:
            read["original_length"] = read["original_length"] or max_length
        return cls(rope_type=rope_type, **read_fields(cls, read, read))

    def to_config(self) -> dict[str, Any]:
        """The `rope_parameters` object that `from_config` reads back."""
        kept = ("rope_type", "theta", *NEEDED[self.rope_type], *OPTIONAL[self.rope_type])
        values = {NAMES.get(name, name): getattr(self, name) for name in kept}
        return {name: value for name, value in values.items() if value is not None}


def rotation(
    rope: Rope, *, head_dim: int, length: int, max_length: int
) -> tuple[Float[Array, "length half"], Float[Array, "length half"]]:
    """cos and sin of every position's angles, float32.

    max_length: the longest sequence the config was trained or scaled for; only "dynamic" looks at it.
    """
    frequencies, scale = ROPE_TYPES[rope.rope_type](rope, head_dim, length, max_length)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch seq heads head_dim"], cos: Float[Array, "seq half"], sin: Float[Array, "seq half"]
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns every head by its position's angles, in float32; the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def _default(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    return _frequencies(rope.theta, head_dim), 1.0


def _linear(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    return _frequencies(rope.theta, head_dim) / rope.factor, 1.0


def _dynamic(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    """Beyond max_length the base grows, so that the slowest pair turns as far as it did in training."""
    growth = rope.factor * max(length, max_length) / max_length - (rope.factor - 1)
    return _frequencies(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim), 1.0


def _llama3(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    """Slow pairs are stretched by `factor`, fast ones kept, those between blended by turns per original context."""
    frequencies = _frequencies(rope.theta, head_dim)
    turns = rope.original_length * frequencies / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor), 1.0


def _yarn(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    """As llama3, but the blend is linear in the pair's index, and attention is sharpened by log(factor)."""

    def pair_turning(turns: float) -> float:
        """The (fractional) index of the pair that makes so many turns in the original context."""
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001)
    stretched = np.clip(ramp, 0, 1)
    frequencies = _frequencies(rope.theta, head_dim)
    return frequencies * (1 - stretched + stretched / rope.factor), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: Rope) -> float:
    def sharpening(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        return sharpening(rope.mscale) / sharpening(rope.mscale_all_dim)
    return sharpening(1.0)


# name -> (rope, head_dim, length, max_length) -> frequencies (head_dim / 2), and the factor on cos and sin
ROPE_TYPES: dict[str, Callable[[Rope, int, int, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
# What each type reads, and where config.json has another word for it.
NAMES = {"theta": "rope_theta", "original_length": "original_max_position_embeddings"}
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("original_length",),
    "yarn": ("original_length", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
