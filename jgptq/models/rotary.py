"""Rotary position embedding and the ways long-context checkpoints rescale it.

Pair (i, i + head_dim / 2) of a head turns by position * frequency_i, frequency_i = theta**(-2 i / head_dim).
[Su et al. 2021; "dynamic" and "yarn": Peng et al. 2023; "llama3": the Llama 3.1 release; "longrope": Ding et al. 2024]
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jgptq.models.json_fields import read_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary part of a model's config, in the config's own words.

    partial: the part of each head, from its start, that turns (partial_rotary_factor).
    original_length: context length before rescaling, in tokens (original_max_position_embeddings).
    attention_factor: multiplies cos and sin; None: what the rope type prescribes.
    short_factor, long_factor: what "longrope" divides each pair's frequency by, up to the original length and beyond.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    partial: float = 1.0
    factor: float | None = None
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported; choose one of {tuple(ROPE_TYPES)}")
        for name in ("theta", "factor", "original_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or value <= 0):
                raise ValueError(f"rope: {name}={value!r}; give a positive number")
        if not 0 < self.partial <= 1:
            raise ValueError(f"rope: partial_rotary_factor={self.partial!r}; give a number above 0 and up to 1")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope: high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
        if missing := [name for name in NEEDED[self.rope_type] if getattr(self, name) in (None, ())]:
            raise ValueError(f"rope: rope_type={self.rope_type!r} needs {missing}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], max_length: int) -> "Rope":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).

        max_length: the model's max_position_embeddings, which stands in for a missing original length.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise ValueError(f"rope parameters are {given!r}; give one flat object with a rope_type for all layers")
        rope_type = given.get("rope_type") or given.get("type") or "default"
        if not isinstance(rope_type, str) or rope_type not in NEEDED:
            raise ValueError(f"rope: rope_type={rope_type!r} is not supported; known are {tuple(NEEDED)}")
        needed = NEEDED[rope_type]
        if missing := [name for name in needed if given.get(name) is None]:
            raise ValueError(f"rope_type {rope_type!r} needs {list(needed)} in config.json; {missing} is missing")
        read = {field: given.get(NAMES.get(field, field)) for field in (*needed, *OPTIONAL.get(rope_type, ()))}
        for field in ("theta", "partial"):
            read[field] = given.get(NAMES[field]) or config.get(NAMES[field])
        if "original_length" in read:
            read["original_length"] = config.get(NAMES["original_length"]) or read["original_length"] or max_length
        return cls(rope_type=rope_type, **read_fields(cls, read, read))

    def check_head(self, head_dim: int) -> None:
        """ValueError if heads of this size cannot be turned."""
        turning = int(head_dim * self.partial)
        if turning % 2:
            raise ValueError(f"head_dim={head_dim} must be even: rotary embedding turns pairs")
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if self.rope_type == "longrope" and count != turning // 2:
                raise ValueError(f"rope: {name} has {count} numbers; give {turning // 2}, one a pair that turns")

    def to_config(self) -> dict[str, Any]:
        """The `rope_parameters` object that `from_config` reads back."""
        kept = ("rope_type", "theta", *NEEDED[self.rope_type], *OPTIONAL[self.rope_type])
        values = {NAMES.get(name, name): getattr(self, name) for name in kept}
        if self.partial != 1:
            values[NAMES["partial"]] = self.partial
        return {name: value for name, value in values.items() if value is not None}

    def to_config_json(self) -> dict[str, Any]:
        """The keys of config.json that transformers 5 and, after them, transformers 4 read."""
        parameters = self.to_config()
        scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", NAMES["partial"])}
        return {
            "rope_parameters": parameters,
            "rope_theta": self.theta,
            "rope_scaling": None if self.rope_type == "default" else scaling,
            **({NAMES["partial"]: self.partial} if self.partial != 1 else {}),
        }


def rotation(
    rope: Rope, positions: Integer[Array, "*tokens"], *, head_dim: int, length: int, max_length: int
) -> tuple[Float[Array, "*tokens half"], Float[Array, "*tokens half"]]:
    """cos and sin of every position's angles, float32, for the part of a head that turns.

    length: of the whole sequence, which "dynamic" and "longrope" look at.
    max_length: the longest sequence the config was trained or scaled for.
    """
    frequencies, scale = ROPE_TYPES[rope.rope_type](rope, int(head_dim * rope.partial), length, max_length)
    frequencies = jnp.asarray(frequencies, jnp.float32).reshape(*(1,) * positions.ndim, -1)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch seq heads head_dim"], cos: Float[Array, "rows seq half"], sin: Float[Array, "rows seq half"]
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns every head's first 2 `half` features by its position's angles, in float32; the result has x's dtype."""
    turning, still = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


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


def _longrope(rope: Rope, head_dim: int, length: int, max_length: int) -> tuple[np.ndarray, float]:
    """Every pair is slowed by a factor of its own, and by another beyond the original context."""
    divisors = np.asarray(rope.long_factor if length > rope.original_length else rope.short_factor)
    factor = rope.factor or max_length / rope.original_length
    scale = rope.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(rope.original_length)) if factor > 1 else 1.0
    return _frequencies(rope.theta, head_dim) / divisors, scale


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
    "longrope": _longrope,
}
# What each type reads, and where config.json has another word for it.
NAMES = {
    "theta": "rope_theta",
    "partial": "partial_rotary_factor",
    "original_length": "original_max_position_embeddings",
}
NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("original_length",),
    "yarn": ("original_length", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("original_length", "factor", "attention_factor"),
}
