"""What a packed checkpoint format is: a value that names its tensors and translates one module both ways."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jgptq import packing
from jgptq.tensor import QuantizedTensor, has_integer_zeros

# One program for each shape, where the unjitted functions would compile each of their shifts.
pack = jax.jit(packing.pack, static_argnames="bits")
unpack = jax.jit(packing.unpack, static_argnames=("bits", "length"))

FLOATS = ("F16", "BF16", "F32")
SCALED_INPUTS = (
    "its inputs are scaled, which no format but orbax has a place for; quantize with AWQ(input_scales=False)"
)
BROKEN_ZEROS = "its zeros are no whole numbers (it comes from a GGUF file)"
LOGICAL_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Where an array is to be, by its dotted path, its shape and its dtype.
Placing = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedTensor:
    """A tensor a checkpoint must hold: its shape, and the dtypes allowed, in safetensors' names.

    older: the same tensor as earlier versions of the format stored it, which is read too.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    older: "ExpectedTensor | None" = None

    def problem(self, shape: tuple[int, ...], dtype: str) -> str | None:
        """What is wrong with a tensor of this shape and dtype, in words; None if it is as expected."""
        if self.older is not None and self.older.problem(shape, dtype) is None:
            return None
        if shape != self.shape:
            return f"has shape {list(shape)}, not {list(self.shape)}"
        return None if dtype in self.dtypes else f"has dtype {dtype}, not {' or '.join(self.dtypes)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A row of PACKINGS. `Settings` below is the format's own parsed form of config.json's quantization_config.

    name: the quant_method it reads and writes.
    marker: the last part of the tensor name that only a packed module has.
    parse: quantization_config -> Settings; ValueError for what is not supported.
    expected: (Settings, module, in_features, out_features) -> tensors by the last part of their names. One that may
        have several dtypes is written in that of the weight's scales.
    decode: (Settings, module, (in_features, out_features), tensors, logical dtype or None) -> QuantizedTensor; tensors
        already checked.
    describe: (weights by module, modules left alone, dtype of the model) -> quantization_config; ValueError that
        names every weight the format cannot hold.
    encode: (Settings, weight) -> tensors, in the order of `expected`; decode(encode(weight)) is bit for bit the weight.
    """

    name: str
    marker: str
    parse: Callable[[Mapping[str, Any]], Any]
    expected: Callable[[Any, str, int, int], dict[str, ExpectedTensor]]
    decode: Callable[[Any, str, tuple[int, int], Mapping[str, np.ndarray], Any], QuantizedTensor]
    describe: Callable[[Mapping[str, QuantizedTensor], Sequence[str], Any], dict[str, Any]]
    encode: Callable[[Any, QuantizedTensor], dict[str, np.ndarray]]


def check_holds(
    format: str, weights: Mapping[str, QuantizedTensor], problem: Callable[[QuantizedTensor], str | None]
) -> None:
    """ValueError that names every weight with a problem, by the first of its kind.

    Of all formats zeros must be whole numbers, and inputs not scaled.
    """
    problems: dict[str, list[str]] = {}
    for module, weight in weights.items():
        reason = problem(weight) if has_integer_zeros(weight) else BROKEN_ZEROS
        reason = reason if weight.input_scales is None else SCALED_INPUTS
        if reason:
            problems.setdefault(reason, []).append(module)
    if problems:
        told = "; ".join(
            f"{modules[0]}{f' and {len(modules) - 1} more' if len(modules) > 1 else ''}: {reason}"
            for reason, modules in problems.items()
        )
        raise ValueError(f"{format!r} checkpoints cannot hold these weights as they are: {told}")


def logical_dtypes(config: Mapping[str, Any]) -> dict[str, str]:
    """What a quantization_config's meta says of the dtypes of modules' logical arrays; see `meta_of`."""
    meta = config.get("meta") or {}
    dtypes = meta.get("dtypes") or {} if isinstance(meta, dict) else None
    if not isinstance(dtypes, dict):
        raise ValueError("quantization_config: meta and its dtypes must be objects")
    if wrong := [dtype for dtype in dtypes.values() if dtype not in LOGICAL_DTYPES]:
        raise ValueError(f"quantization_config: meta.dtypes has {wrong[0]!r}; each must be one of {LOGICAL_DTYPES}")
    return dtypes


def meta_of(weights: Mapping[str, QuantizedTensor], dtype: Any) -> dict[str, Any]:
    """A quantization_config's meta: the dtypes of logical arrays where these are not the model's `dtype`."""
    dtypes = {module: np.dtype(weight.dtype).name for module, weight in weights.items() if weight.dtype != dtype}
    return {"dtypes": dtypes} if dtypes else {}


def with_head(left: Sequence[str], weights: Mapping[str, QuantizedTensor]) -> list[str]:
    """The modules left alone, and the head even where it is tied and so no parameter: readers have a module for it."""
    return [*left, *({"lm_head"} - {*left, *weights})]


def unpack_rows(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """(rows, words) along the last axis -> (rows, length) uint8."""
    return np.asarray(unpack(words.T, bits=bits, length=length)).T.astype(np.uint8)


def pack_rows(values: Any, bits: int) -> np.ndarray:
    """The inverse of `unpack_rows`, as int32 words."""
    return np.ascontiguousarray(np.asarray(pack(values.T, bits=bits)).T).view(np.int32)


def permutation_of(name: str, groups: np.ndarray, group_size: int) -> np.ndarray | None:
    """Input numbers in order of their groups, ties in natural order; None if that is the natural order.

    name: of the tensor that `groups` (in,) is. ValueError unless each group has its number of inputs.
    """
    natural = np.arange(len(groups), dtype=np.int32) // group_size
    if np.array_equal(groups, natural):
        return None
    permutation = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[permutation], natural):
        raise ValueError(
            f"{name}: values {groups.min()} .. {groups.max()} do not put {group_size} of the "
            f"{len(groups)} inputs in each of groups 0 .. {natural[-1]}, the last one perhaps short; "
            "the file is damaged, or its group_size is wrong"
        )
    return permutation


def leaves_by_path(tree: Mapping) -> dict[tuple, Any]:
    """Parameters by path; a QuantizedTensor is one."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return {tuple(getattr(key, "key", key) for key in keys): leaf for keys, leaf in flat}


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))
