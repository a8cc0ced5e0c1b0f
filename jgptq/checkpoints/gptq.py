"""The GPTQ checkpoint layout of AutoGPTQ, GPTQModel, transformers and vLLM.

A linear module P has, in place of P.weight, four tensors (b bits, I inputs, O outputs, G groups):
    P.qweight int32 (I b / 32, O)   codes packed down the inputs, in their natural order
    P.qzeros  int32 (G, O b / 32)   zeros packed across the outputs; less one in the first version of the format
    P.scales  float (G, O)
    P.g_idx   int32 (I,)            the group of each input
"""

import dataclasses
import importlib.metadata
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import grid as grids
from jgptq import packing, tensor
from jgptq.checkpoints.layout import (
    FLOATS,
    ExpectedTensor,
    Format,
    check_holds,
    logical_dtypes,
    meta_of,
    pack,
    pack_rows,
    permutation_of,
    unpack,
    unpack_rows,
)
from jgptq.checkpoints.patterns import FirstMatch

VERSIONS = ("gptq", "gptq_v2")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CODES_AT_ONCE = 1 << 24  # codes of a weight that are unpacked at once to be put in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """How one module is packed; group_size None: one group spans all inputs."""

    bits: int
    group_size: int | None
    symmetric: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "WeightSettings":
        bits, group_size, symmetric = config.get("bits"), config.get("group_size", -1), config.get("sym", True)
        if type(bits) is not int or bits not in grids.BITS:
            raise ValueError(f"quantization_config: bits={bits!r}; this reads {grids.BITS}")
        if group_size is not None and (type(group_size) is not int or group_size < -1 or group_size == 0):
            raise ValueError(
                f"quantization_config: group_size={group_size!r}; a positive integer is allowed, "
                "or -1 for one group an output feature"
            )
        if type(symmetric) is not bool:
            raise ValueError(f"quantization_config: sym={symmetric!r}; true or false is allowed")
        return cls(bits=bits, group_size=None if group_size in (-1, None) else group_size, symmetric=symmetric)

    def group_length(self, in_features: int) -> int:
        return in_features if self.group_size is None else min(self.group_size, in_features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A quantization_config, parsed. overrides: of the modules that `patterns` finds, by the pattern's number."""

    version: str
    weights: WeightSettings
    patterns: FirstMatch
    overrides: tuple[WeightSettings, ...]
    written_by_gptqmodel: bool
    dtypes: Mapping[str, str]

    def of(self, module: str) -> WeightSettings:
        found = self.patterns(module)
        return self.weights if found is None else self.overrides[found]


def parse(config: Mapping[str, Any]) -> Settings:
    """Reads a quantization_config; ValueError for what this reader does not know."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in VERSIONS:
        raise ValueError(f"quantization_config: checkpoint_format={version!r}; this reads {VERSIONS}")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"quantization_config: pack_dtype={config['pack_dtype']!r}; this reads int32")
    dynamic, meta = config.get("dynamic") or {}, config.get("meta") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(part, dict) for part in (meta, *dynamic.values())):
        raise ValueError("quantization_config: dynamic, each of its values, and meta must be objects")
    overrides = {key.removeprefix("+:"): values for key, values in dynamic.items() if not key.startswith("-:")}
    try:
        patterns = FirstMatch(list(overrides))
    except ValueError as error:
        raise ValueError(f"quantization_config: dynamic: {error}") from error
    return Settings(
        version=version,
        weights=WeightSettings.from_config(config),
        patterns=patterns,
        overrides=tuple(WeightSettings.from_config({**config, **values}) for values in overrides.values()),
        written_by_gptqmodel="gptqmodel" in str(meta.get("quantizer", "")).lower(),
        dtypes=logical_dtypes(config),
    )


def expected(settings: Settings, module: str, in_features: int, out_features: int) -> dict[str, ExpectedTensor]:
    """The tensors of one packed module, by the last part of their names."""
    own = settings.of(module)
    groups = -(-in_features // own.group_length(in_features))
    return {
        "qweight": ExpectedTensor(shape=(packing.word_count(in_features, own.bits), out_features), dtypes=("I32",)),
        "qzeros": ExpectedTensor(shape=(groups, packing.word_count(out_features, own.bits)), dtypes=("I32",)),
        "scales": ExpectedTensor(shape=(groups, out_features), dtypes=FLOATS),
        "g_idx": ExpectedTensor(shape=(in_features,), dtypes=("I32",)),
    }


def decode(
    settings: Settings,
    module: str,
    shape: tuple[int, int],
    tensors: Mapping[str, np.ndarray],
    dtype: Any | None,
) -> tensor.QuantizedTensor:
    """One module's tensors, checked against `expected`, as a QuantizedTensor.

    dtype: of the logical array, where the config's meta does not say; None: that of the scales.
    """
    own = settings.of(module)
    scales, (in_features, out_features) = tensors["scales"], shape
    group_size = own.group_length(in_features)
    words = jnp.asarray(tensors["qweight"].view(np.uint32))
    permutation = permutation_of(f"{module}.g_idx", tensors["g_idx"], group_size)
    if permutation is not None:
        words = _reorder(words, permutation, own.bits)
    zeros = _zeros(settings, module, tensors["qzeros"].view(np.uint32), out_features)
    return tensor.QuantizedTensor(
        codes=words,
        scales=jnp.asarray(scales),
        zeros=None if zeros is None else jnp.asarray(zeros),
        permutation=None if permutation is None else jnp.asarray(permutation),
        bits=own.bits,
        group_size=group_size,
        dtype=jnp.dtype(settings.dtypes.get(module) or dtype or scales.dtype),
        layout=tensor.Layout.dense(in_features, out_features),
    )


def describe(weights: Mapping[str, tensor.QuantizedTensor], left: Sequence[str], dtype: Any) -> dict[str, Any]:
    """The quantization_config of packed `weights` by module name, with the modules `left` as they are.

    The commonest bits, group size and symmetry stand for the model; modules that differ are in "dynamic".
    Zeros are stored plainly ("gptq_v2") if any weight is asymmetric, since readers of the older version disagree
    about a zero of 0; less one ("gptq", which every reader knows) otherwise.
    """
    check_holds("gptq", weights, lambda weight: None)
    every = list(weights.values())
    base = {
        "bits": _commonest(weight.bits for weight in every),
        "group_size": _common_group_size(every),
        "sym": _commonest(weight.symmetric for weight in every),
    }
    overrides = {}
    for module, weight in weights.items():
        group_size = -1 if weight.group_size == weight.in_features else weight.group_size
        own = {"bits": weight.bits, "group_size": group_size, "sym": weight.symmetric}
        fits = WeightSettings.from_config(base).group_length(weight.in_features) == weight.group_size
        if not fits or (own["bits"], own["sym"]) != (base["bits"], base["sym"]):
            overrides[module] = own
    dynamic = {f"+:^{re.escape(module)}$": own for module, own in (overrides | _fused(overrides)).items()}
    dynamic |= {f"-:^{re.escape(module)}$": {} for module in left if module != "lm_head"}
    version = "gptq" if all(weight.symmetric for weight in every) else "gptq_v2"
    meta = {"quantizer": [f"jgptq:{importlib.metadata.version('jgptq')}"]}
    return {
        "quant_method": "gptq",
        **base,
        "desc_act": any(weight.permutation is not None for weight in every),
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in weights,
        **({"dynamic": dynamic} if dynamic else {}),
        **_modules_in_block(weights, left),
        "meta": meta | meta_of(weights, dtype),
    }


def encode(settings: Settings, weight: tensor.QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of one module, as `decode` reads them; rows go back to the inputs' natural order."""
    words, groups = weight.codes, np.arange(weight.in_features, dtype=np.int32) // weight.group_size
    if weight.permutation is not None:
        inverse = np.argsort(np.asarray(weight.permutation))
        words, groups = _reorder(words, inverse, weight.bits), groups[inverse]
    midpoint = 2 ** (weight.bits - 1)
    zeros = jnp.full(weight.scales.shape, midpoint, jnp.uint8) if weight.zeros is None else weight.zeros
    fields = zeros - 1 if settings.version == "gptq" else zeros
    return {
        "qweight": np.asarray(words).view(np.int32),
        "qzeros": pack_rows(fields, weight.bits),
        "scales": np.asarray(weight.scales),
        "g_idx": groups,
    }


def _reorder(words: Any, order: np.ndarray, bits: int) -> jax.Array:
    """Packed rows in another order: row k of the result is row order[k]. Some columns at a time."""
    columns = max(1, CODES_AT_ONCE // len(order))
    parts = [
        pack(unpack(words[:, start : start + columns], bits=bits, length=len(order))[order], bits=bits)
        for start in range(0, words.shape[1], columns)
    ]
    return jnp.concatenate(parts, axis=1)


def _zeros(settings: Settings, module: str, words: np.ndarray, out_features: int) -> np.ndarray | None:
    """The (groups, out) zeros, uint8; None for a symmetric weight.

    A symmetric weight's fields tell by themselves which version they are; files exist with the wrong label.
    """
    own = settings.of(module)
    fields = unpack_rows(words, own.bits, out_features)
    midpoint, largest = 2 ** (own.bits - 1), 2**own.bits - 1
    if own.symmetric and ((fields == midpoint).all() or (fields == midpoint - 1).all()):
        return None
    if settings.version == "gptq_v2":
        return fields
    if (fields != largest).all():
        return fields + np.uint8(1)
    # A zero of 0 cannot be stored less one. GPTQModel subtracts from whole words (so a field borrows from the next;
    # adding to whole words undoes it), for 3 bits from each field modulo 8; other writers damage the fields above.
    if not settings.written_by_gptqmodel:
        raise ValueError(
            f"{module}.qzeros holds a zero of 0, which checkpoint_format 'gptq' cannot tell from damage; "
            "convert the checkpoint to 'gptq_v2' with the library that wrote it"
        )
    if own.bits == 3:
        return (fields + np.uint8(1)) & np.uint8(largest)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, own.bits)))
    return unpack_rows(words + ones, own.bits, out_features)


def _fused(overrides: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same overrides for modules that vLLM and SGLang run as one, and look up by a name of their own."""
    found = {}
    for module, own in overrides.items():
        block, _, name = module.rpartition(".")
        for fused, parts in FUSED.items():
            if name == parts[0] and all(overrides.get(f"{block}.{part}") == own for part in parts):
                found[f"{block}.{fused}"] = own
    return found


def _modules_in_block(weights: Mapping[str, Any], left: Sequence[str]) -> dict[str, list[list[str]]]:
    """What transformers goes by in place of "dynamic": the packed modules of a block, where a block has others too.

    By the ends of their names below the block's number; by their whole names where blocks differ, or outside of them.
    """
    packed, floats = ({name: re.sub(r"^.*?\.\d+\.", "", name) for name in names} for names in (weights, left))
    if all(name == end for name, end in floats.items()):
        return {}
    differ = set(packed.values()) & set(floats.values())
    return {"modules_in_block_to_quantize": [list(packed if differ else dict.fromkeys(packed.values()))]}


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _common_group_size(weights: Sequence[tensor.QuantizedTensor]) -> int:
    """The group size that most weights can be read with; -1 if every weight is one group."""
    if all(weight.group_size == weight.in_features for weight in weights):
        return -1
    sizes = {weight.group_size for weight in weights}
    return max(sizes, key=lambda size: (sum(w.group_size == min(size, w.in_features) for w in weights), size))


FORMAT = Format(
    name="gptq",
    marker="qweight",
    parse=parse,
    expected=expected,
    decode=decode,
    describe=describe,
    encode=encode,
)
