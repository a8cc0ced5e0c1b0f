"""The rotary part of a config in GGUF: keys, and tensors where each pair has a factor of its own.

llama.cpp divides the frequencies of pairs by the tensors' factors: Llama 3's rule is worked out by whoever writes the
file, and so is found again by trying it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jgptq.checkpoints.gguf_dialects import Said, decimal
from jgptq.models import rotary

FREQUENCIES = "rope_freqs.weight"
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
TENSORS = (FREQUENCIES, *FACTORS.values())
LLAMA3_CONTEXT = 8192
NO_FACTOR = (None, 0.0, 1.0)
# What yarn may have besides, and the value that changes nothing.
YARN_EXTRAS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def describe(name: str, config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys below the architecture's name, and tensors, of a config's rope.

    What they cannot say is not said, and found when they are read again.
    """
    rope = config.rope
    turning = int(head_dim(config) * rope.partial)
    keys: dict[str, Any] = {"rope.dimension_count": turning, "rope.freq_base": float(rope.theta)}
    tensors = {}
    if rope.rope_type in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type in ("yarn", "llama3"):
        keys["rope.scaling.original_context_length"] = rope.original_length
    if rope.rope_type == "yarn":
        keys |= {
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
    if rope.rope_type == "llama3" and name == "llama":  # no other architecture's graph reads the tensor
        tensors[FREQUENCIES] = _divisors(rope, turning)
    if rope.rope_type == "longrope" and name == "phi3":
        _, scale = rotary.ROPE_TYPES["longrope"](rope, turning, 1, config.max_position_embeddings)
        keys["rope.scaling.attn_factor"] = float(scale)
        tensors |= {tensor: np.asarray(getattr(rope, field), np.float32) for field, tensor in FACTORS.items()}
    return keys, tensors


def _divisors(rope: rotary.Rope, turning: int) -> np.ndarray:
    """What llama3's rule divides each pair's frequency by."""
    plain, _ = rotary.ROPE_TYPES["default"](rope, turning, 1, 1)
    scaled, _ = rotary.ROPE_TYPES["llama3"](rope, turning, 1, 1)
    return (plain / scaled).astype(np.float32)


def head_dim(config: Any) -> int:
    if hasattr(config, "head_dim"):
        return config.head_dim
    return config.hidden_size // config.num_attention_heads


def read(said: Said, config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters, and partial_rotary_factor where not all of a head turns."""
    whole = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turning = said.get("rope.dimension_count", whole)
    if type(turning) is not int or not 0 < turning <= whole:
        raise ValueError(f"{said.name}.rope.dimension_count is {turning!r}; 1 to the head's {whole} is allowed")
    for name, factors in said.factors.items():
        if len(factors) != turning // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
            raise ValueError(f"{name} has no {turning // 2} positive numbers, one for each pair that turns")
    if said.factors and said.get("rope.scaling.factor") not in NO_FACTOR:
        raise ValueError(f"it has both {', '.join(said.factors)} and {said.name}.rope.scaling.factor; this is not read")
    theta, original = said.get("rope.freq_base", 10000.0), said.get("rope.scaling.original_context_length")
    parameters: dict[str, Any] = {"rope_theta": theta}
    if FREQUENCIES in said.factors:
        parameters |= _frequency_factors(said.factors[FREQUENCIES], theta, turning, original or LLAMA3_CONTEXT)
    elif set(FACTORS.values()) <= set(said.factors):
        parameters |= _longrope(said, config, turning, original)
    else:
        parameters |= _scaling(said, original)
    partial = {} if turning == whole else {"partial_rotary_factor": turning / whole}
    return {"rope_parameters": parameters | partial, **partial}


def _scaling(said: Said, original: int | None) -> dict[str, Any]:
    """What keys alone say: llama.cpp takes a factor without a type for a linear one."""
    kind, factor = said.get("rope.scaling.type", "linear"), said.get("rope.scaling.factor")
    if kind == "none" or (kind in ("linear", "yarn") and factor in NO_FACTOR):
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    unknown = [name for name in YARN_EXTRAS if said.get(name) not in (None, YARN_EXTRAS[name])]
    if kind != "yarn" or unknown:
        raise ValueError(f"{said.name}.rope.scaling.type is {kind!r} with {unknown or 'no factors'}; this is not read")
    betas = {name: said.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, **betas}


def _frequency_factors(factors: np.ndarray, theta: float, turning: int, original: int) -> dict[str, Any]:
    """Llama 3's rule where it gives these factors; else the factors themselves, as those of any length."""
    factor = decimal(np.max(factors))
    rule = rotary.Rope(rope_type="llama3", theta=theta, factor=factor, original_length=original)
    if np.allclose(_divisors(rule, turning), factors, rtol=1e-5, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": rule.low_freq_factor,
            "high_freq_factor": rule.high_freq_factor,
            "original_max_position_embeddings": original,
        }
    own = [decimal(factor) for factor in factors]
    return {"rope_type": "longrope", "short_factor": own, "long_factor": own, "attention_factor": 1.0}


def _longrope(said: Said, config: Mapping[str, Any], turning: int, original: int | None) -> dict[str, Any]:
    length = original or config["max_position_embeddings"]
    read = {field: [decimal(value) for value in said.factors[tensor]] for field, tensor in FACTORS.items()}
    parameters = {"rope_type": "longrope", "original_max_position_embeddings": length, **read}
    # The prescribed factor is left to the rule.
    rule = rotary.Rope(rope_type="longrope", original_length=length, **{name: tuple(x) for name, x in read.items()})
    try:
        _, prescribed = rotary.ROPE_TYPES["longrope"](rule, turning, 1, config["max_position_embeddings"])
    except ArithmeticError as error:
        raise ValueError(f"an original context of {length} tokens cannot be scaled by longrope") from error
    scale = said.get("rope.scaling.attn_factor", decimal(prescribed))
    return parameters if scale == decimal(prescribed) else parameters | {"attention_factor": scale}
