"""The "pack-quantized" layout of compressed-tensors, as llm-compressor writes it and transformers and vLLM read it.

A linear module P has, in place of P.weight, (b bits, I inputs, O outputs, G groups):
    P.weight_packed     int32 (O, I b / 32)   codes packed along the inputs
    P.weight_scale      float (O, G)
    P.weight_shape      int64 (2,)            O, I
    P.weight_zero_point int32 (O b / 32, G)   asymmetric only: zeros packed along the outputs
    P.weight_g_idx      int32 (I,)            only where actorder is "group": the group of each input
Codes and zeros are signed in its documents and stored plus 2^(b-1), which makes them the codes and zeros of GPTQ.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jgptq import grid as grids
from jgptq import packing, tensor
from jgptq.checkpoints.layout import (
    FLOATS,
    ExpectedTensor,
    Format,
    check_holds,
    pack,
    permutation_of,
    unpack,
    with_head,
)

FORMAT_NAME = "pack-quantized"


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
        if weights.get("type", "int") != "int" or bits not in grids.BITS:
            raise ValueError(
                f"quantization_config: {name} has {bits!r} bits of type {weights.get('type')!r}; this reads integers "
                f"of {grids.BITS} bits"
            )
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(f"quantization_config: {name} quantizes activations; this reads quantized weights alone")
        strategy = strategy or ("channel" if group_size in (None, -1) else "group")
        if strategy not in ("group", "channel"):
            raise ValueError(f"quantization_config: {name} has strategy={strategy!r}; this reads 'group' and 'channel'")
        if strategy == "group" and (type(group_size) is not int or group_size < 1):
            raise ValueError(f"quantization_config: {name} has group_size={group_size!r}; give a positive integer")
        return cls(
            bits=bits,
            group_size=group_size if strategy == "group" else None,
            symmetric=bool(weights.get("symmetric", True)),
            has_g_idx=weights.get("actorder") in ("group", True),
        )

    def group_length(self, in_features: int) -> int:
        return in_features if self.group_size is None else min(self.group_size, in_features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A quantization_config, parsed: (targets, scheme) of each config group, the first target that matches wins."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]

    def of(self, module: str) -> Scheme:
        """A target is a module's name, a pattern of names behind `re:`, or a class of modules: then any module's."""
        for matches in (_names, _is_class):
            for targets, scheme in self.groups:
                if any(matches(target, module) for target in targets):
                    return scheme
        raise ValueError(f"{module} is packed, but no config group of the quantization_config targets it")


def _names(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def _is_class(target: str, module: str) -> bool:
    return "." not in target and not target.startswith("re:")


def parse(config: Mapping[str, Any]) -> Settings:
    """Reads a quantization_config; ValueError for what this reader does not know."""
    groups = config.get("config_groups")
    if config.get("format") != FORMAT_NAME:
        raise ValueError(f"quantization_config: format={config.get('format')!r}; this reads {FORMAT_NAME!r}")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("quantization_config: config_groups must be an object with at least one group")
    parsed = []
    for name, group in groups.items():
        scheme = Scheme.from_config(name, group)
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"quantization_config: {name} has targets={targets!r}; they must be a list of names")
        for target in targets:
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise ValueError(
                    f"quantization_config: {name}'s target {target!r} is no regular expression ({error})"
                ) from error
        parsed.append((tuple(targets), scheme))
    return Settings(groups=tuple(parsed))


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
        tensors["weight_zero_point"] = ExpectedTensor(shape=zeros, dtypes=("I32",))
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

    dtype: of the logical array; None: that of the scales.
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
    zeros = None
    if not own.symmetric:
        packed = jnp.asarray(tensors["weight_zero_point"].view(np.uint32))
        zeros = unpack(packed, bits=own.bits, length=out_features).T.astype(jnp.uint8)
    return tensor.QuantizedTensor(
        codes=words,
        scales=jnp.asarray(_transposed(tensors["weight_scale"])),
        zeros=zeros,
        permutation=None if permutation is None else jnp.asarray(permutation),
        bits=own.bits,
        group_size=group_size,
        dtype=jnp.dtype(dtype or tensors["weight_scale"].dtype),
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


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


FORMAT = Format(
    name="compressed-tensors",
    bits=grids.BITS,
    marker="weight_packed",
    parse=parse,
    expected=expected,
    decode=decode,
    describe=describe,
    encode=encode,
)
