"""The "pack-quantized" layout of compressed-tensors, as llm-compressor writes it and transformers and vLLM read it.

A linear module P has, in place of P.weight, (b bits, I inputs, O outputs, G groups):
    P.weight_packed     int32 (O, I b / 32)   codes packed along the inputs
    P.weight_scale      float (O, G)
    P.weight_shape      int64 (2,)            O, I
    P.weight_zero_point int32 (O b / 32, G)   asymmetric only: zeros packed along the outputs; once int8 (O, G), signed
    P.weight_g_idx      int32 (I,)            only where actorder is "group": the group of each input
Codes and zeros are signed in its documents and stored plus 2^(b-1), which makes them the codes and zeros of GPTQ.
"""

import dataclasses
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
    permutation_of,
    unpack,
    with_head,
)
from jgptq.checkpoints.patterns import FirstMatch

FORMAT_NAME = "pack-quantized"
PATTERN = "re:"  # in front of a target that is one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the modules of one config group are packed; group_size None: one group spans all inputs."""

    bits: int
    group_size: int | None
    symmetric: bool
    has_g_idx: bool

    @classmethod
    def from_config(cls, name: str, group: Any) -> "Scheme":
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"quantization_config: {name} has no weights; it must be an object that says how they are")
        bits, strategy, group_size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        if weights.get("type", "int") != "int" or type(bits) is not int or bits not in grids.BITS:
            raise ValueError(
                f"quantization_config: {name} has {bits!r} bits of type {weights.get('type')!r}; this reads integers "
                f"of {grids.BITS} bits"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(f"quantization_config: {name} quantizes activations; this reads quantized weights alone")
        if (own := group.get("format")) not in (None, FORMAT_NAME):
            raise ValueError(f"quantization_config: {name} has format={own!r}; this reads {FORMAT_NAME!r}")
        if type(symmetric := weights.get("symmetric", True)) is not bool:
            raise ValueError(f"quantization_config: {name} has symmetric={symmetric!r}; true or false is allowed")
        strategy = strategy or ("channel" if group_size in (None, -1) else "group")
        if strategy not in ("group", "channel"):
            raise ValueError(f"quantization_config: {name} has strategy={strategy!r}; this reads 'group' and 'channel'")
        if strategy == "group" and (type(group_size) is not int or group_size < 1):
            raise ValueError(f"quantization_config: {name} has group_size={group_size!r}; give a positive integer")
        return cls(
            bits=bits,
            group_size=group_size if strategy == "group" else None,
            symmetric=symmetric,
            has_g_idx=weights.get("actorder") in ("group", "dynamic", True),
        )

    def group_length(self, in_features: int) -> int:
        return in_features if self.group_size is None else min(self.group_size, in_features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A quantization_config, parsed: schemes by modules' names, by patterns of them, and of all other linear modules.

    The order is that of compressed-tensors: names before patterns, these in the order of the alphabet.
    """

    names: Mapping[str, Scheme]
    patterns: FirstMatch
    pattern_schemes: tuple[Scheme, ...]
    linear: Scheme | None
    dtypes: Mapping[str, str]

    def of(self, module: str) -> Scheme:
        if module in self.names:
            return self.names[module]
        found = self.patterns(module)
        scheme = self.linear if found is None else self.pattern_schemes[found]
        if scheme is None:
            raise ValueError(f"{module} is packed, but no config group of the quantization_config targets it")
        return scheme


def parse(config: Mapping[str, Any]) -> Settings:
    """Reads a quantization_config; ValueError for what this reader does not know."""
    groups = config.get("config_groups")
    if config.get("format") != FORMAT_NAME:
        raise ValueError(f"quantization_config: format={config.get('format')!r}; this reads {FORMAT_NAME!r}")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("quantization_config: config_groups must be an object with at least one group")
    _check_plain(config)
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        scheme = Scheme.from_config(name, group)
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"quantization_config: {name} has targets={targets!r}; they must be a list of names")
        schemes |= dict.fromkeys(targets, scheme)
    patterns = sorted(target for target in schemes if target.startswith(PATTERN))
    try:
        first_match = FirstMatch([pattern.removeprefix(PATTERN) for pattern in patterns])
    except ValueError as error:
        raise ValueError(f"quantization_config: targets of config_groups: {error}") from error
    return Settings(
        names={target: scheme for target, scheme in schemes.items() if not target.startswith(PATTERN)},
        patterns=first_match,
        pattern_schemes=tuple(schemes[pattern] for pattern in patterns),
        linear=schemes.get("Linear"),
        dtypes=logical_dtypes(config),
    )


def _check_plain(config: Mapping[str, Any]) -> None:
    """ValueError for what else is done to the weights, or to what they are multiplied with."""
    sparsity = config.get("sparsity_config") or {}
    kind = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if kind not in (None, "dense"):
        raise ValueError(f"quantization_config: sparsity_config has format={kind!r}; this reads weights that are dense")
    if config.get("transform_config"):
        raise ValueError("quantization_config: transform_config has rotations of activations, which this does not know")


def expected(settings: Settings, module: str, in_features: int, out_features: int) -> dict[str, ExpectedTensor]:
    """The tensors of one packed module, by the last part of their names."""
    own = settings.of(module)
    groups = -(-in_features // own.group_length(in_features))
    words = packing.word_count(in_features, own.bits)
    tensors = {
        "weight_packed": ExpectedTensor(shape=(out_features, words), dtypes=("I32",)),
        "weight_scale": ExpectedTensor(shape=(out_features, groups), dtypes=FLOATS),
        "weight_shape": ExpectedTensor(shape=(2,), dtypes=("I64",)),
    }
    if not own.symmetric:
        zeros = (packing.word_count(out_features, own.bits), groups)
        older = ExpectedTensor(shape=(out_features, groups), dtypes=("I8",))
        tensors["weight_zero_point"] = ExpectedTensor(shape=zeros, dtypes=("I32",), older=older)
    if own.has_g_idx:
        tensors["weight_g_idx"] = ExpectedTensor(shape=(in_features,), dtypes=("I32",))
    return tensors


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
    own, (in_features, out_features) = settings.of(module), shape
    if tuple(tensors["weight_shape"]) != (out_features, in_features):
        raise ValueError(
            f"{module}.weight_shape says {tensors['weight_shape'].tolist()}, but the model has "
            f"{[out_features, in_features]}"
        )
    words, permutation = jnp.asarray(_transposed(tensors["weight_packed"]).view(np.uint32)), None
    group_size = own.group_length(in_features)
    if own.has_g_idx:
        permutation = permutation_of(f"{module}.weight_g_idx", tensors["weight_g_idx"], group_size)
    if permutation is not None:
        words = pack(unpack(words, bits=own.bits, length=in_features)[permutation], bits=own.bits)
    zeros = None if own.symmetric else _zeros(f"{module}.weight_zero_point", tensors, own.bits, out_features)
    return tensor.QuantizedTensor(
        codes=words,
        scales=jnp.asarray(_transposed(tensors["weight_scale"])),
        zeros=zeros,
        permutation=None if permutation is None else jnp.asarray(permutation),
        bits=own.bits,
        group_size=group_size,
        dtype=jnp.dtype(settings.dtypes.get(module) or dtype or tensors["weight_scale"].dtype),
        layout=tensor.Layout.dense(in_features, out_features),
    )


def describe(weights: Mapping[str, tensor.QuantizedTensor], left: Sequence[str], dtype: Any) -> dict[str, Any]:
    """The quantization_config of packed `weights` by module name, with the modules `left` as they are.

    Weights of one kind are the group "Linear"; where there are several kinds, each lists its modules.
    """

    def problem(weight: tensor.QuantizedTensor) -> str | None:
        if weight.permutation is not None:
            return "inputs are in the groups of act_order=True; quantize with act_order='static' or 'group'"
        if weight.in_features % weight.group_size:
            return f"its last group is short: {weight.in_features} inputs in groups of {weight.group_size}"
        return None

    check_holds("compressed-tensors", weights, problem)
    kinds: dict[tuple, list[str]] = {}
    for module, weight in weights.items():
        group_size = None if weight.group_size == weight.in_features else weight.group_size
        kinds.setdefault((weight.bits, group_size, weight.symmetric), []).append(module)
    groups = {}
    for number, ((bits, group_size, symmetric), modules) in enumerate(kinds.items()):
        scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        scheme |= {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
        targets = ["Linear"] if len(kinds) == 1 else modules
        groups[f"group_{number}"] = {"targets": targets, "weights": scheme}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT_NAME,
        "quantization_status": "compressed",
        "ignore": with_head(left, weights),
        "config_groups": groups,
        **({"meta": meta} if (meta := meta_of(weights, dtype)) else {}),
    }


def encode(settings: Settings, weight: tensor.QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of one module, as `decode` reads them."""
    tensors = {
        "weight_packed": _transposed(np.asarray(weight.codes).view(np.int32)),
        "weight_scale": _transposed(np.asarray(weight.scales)),
        "weight_shape": np.asarray([weight.out_features, weight.in_features], np.int64),
    }
    if weight.zeros is not None:
        packed = pack(jnp.asarray(weight.zeros).T, bits=weight.bits)
        tensors["weight_zero_point"] = np.asarray(packed).view(np.int32)
    return tensors


def _zeros(name: str, tensors: Mapping[str, np.ndarray], bits: int, out_features: int) -> jax.Array:
    """The (groups, out) zeros, uint8."""
    stored, midpoint = tensors["weight_zero_point"], 2 ** (bits - 1)
    if stored.dtype == np.int32:
        return unpack(jnp.asarray(stored.view(np.uint32)), bits=bits, length=out_features).T.astype(jnp.uint8)
    if stored.size and (stored.min() < -midpoint or stored.max() >= midpoint):
        raise ValueError(
            f"{name} has values {stored.min()} .. {stored.max()}; {bits} bits are {-midpoint} .. {midpoint - 1}"
        )
    return jnp.asarray((_transposed(stored).astype(np.int16) + midpoint).astype(np.uint8))


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


FORMAT = Format(
    name="compressed-tensors",
    marker="weight_packed",
    parse=parse,
    expected=expected,
    decode=decode,
    describe=describe,
    encode=encode,
)
