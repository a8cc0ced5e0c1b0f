"""The AWQ layout for matrix products (GEMM) of AutoAWQ, transformers and vLLM: 4 bits, packed across the outputs.

A linear module P has, in place of P.weight, three tensors (I inputs, O outputs, G groups):
    P.qweight int32 (I, O / 8)   a word holds 8 codes of one input; its fields hold outputs 0 2 4 6 1 3 5 7
    P.qzeros  int32 (G, O / 8)   the zeros in the same order
    P.scales  float (G, O)
"""

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import tensor
from jgptq.checkpoints.layout import (
    FLOATS,
    ExpectedTensor,
    Format,
    check_holds,
    logical_dtypes,
    meta_of,
    pack,
    pack_rows,
    unpack,
    unpack_rows,
    with_head,
)

BITS = 4
FIELDS = 32 // BITS
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each field of a word
INVERSE = tuple(ORDER.index(output) for output in range(FIELDS))
MIDPOINT = 2 ** (BITS - 1)
CODES_AT_ONCE = 1 << 24  # that are put in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A quantization_config, parsed; group_size None: one group spans all inputs."""

    group_size: int | None
    dtypes: Mapping[str, str]

    def group_length(self, in_features: int) -> int:
        return in_features if self.group_size is None else self.group_size


def parse(config: Mapping[str, Any]) -> Settings:
    """Reads a quantization_config; ValueError for what this reader does not know."""
    # Older files of AutoAWQ have other names for the first two.
    bits, group_size = (
        config.get("bits", config.get("w_bit", BITS)),
        config.get("group_size", config.get("q_group_size", 128)),
    )
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    if bits != BITS:
        raise ValueError(f"quantization_config: bits={bits!r}; AWQ checkpoints have {BITS}")
    if str(version).lower() != "gemm":
        raise ValueError(
            f"quantization_config: version={version!r}; of AWQ's layouts this reads 'gemm'; save it so with its library"
        )
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise ValueError(f"quantization_config: group_size={group_size!r}; a positive integer is allowed, or -1")
    return Settings(group_size=None if group_size == -1 else group_size, dtypes=logical_dtypes(config))


def expected(settings: Settings, module: str, in_features: int, out_features: int) -> dict[str, ExpectedTensor]:
    """The tensors of one packed module, by the last part of their names."""
    length = settings.group_length(in_features)
    if in_features % length or out_features % FIELDS:
        raise ValueError(
            f"{module} is {in_features} by {out_features}, but AWQ needs whole groups of {length} inputs and a "
            f"multiple of {FIELDS} outputs; the checkpoint's config.json does not fit it"
        )
    words = out_features // FIELDS
    return {
        "qweight": ExpectedTensor(shape=(in_features, words), dtypes=("I32",)),
        "qzeros": ExpectedTensor(shape=(in_features // length, words), dtypes=("I32",)),
        "scales": ExpectedTensor(shape=(in_features // length, out_features), dtypes=FLOATS),
    }


def decode(
    settings: Settings,
    module: str,
    shape: tuple[int, int],
    tensors: Mapping[str, np.ndarray],
    dtype: Any | None,
) -> tensor.QuantizedTensor:
    """One module's tensors, checked against `expected`, as a QuantizedTensor; zeros that are all 8 as symmetric.

    dtype: of the logical array, where the config's meta does not say; None: that of the scales.
    """
    zeros = _from_words(tensors["qzeros"])
    return tensor.QuantizedTensor(
        codes=_codes(tensors["qweight"]),
        scales=jnp.asarray(tensors["scales"]),
        zeros=None if (zeros == MIDPOINT).all() else jnp.asarray(zeros),
        permutation=None,
        bits=BITS,
        group_size=settings.group_length(shape[0]),
        dtype=jnp.dtype(settings.dtypes.get(module) or dtype or tensors["scales"].dtype),
        layout=tensor.Layout.dense(*shape),
    )


def describe(weights: Mapping[str, tensor.QuantizedTensor], left: Sequence[str], dtype: Any) -> dict[str, Any]:
    """The quantization_config of packed `weights` by module name, with the modules `left` as they are."""
    first = next(iter(weights.values()))
    whole = all(weight.group_size == weight.in_features for weight in weights.values())

    def problem(weight: tensor.QuantizedTensor) -> str | None:
        if weight.bits != BITS:
            return f"{weight.bits} bits, where the format has {BITS}"
        if weight.permutation is not None:
            return "inputs are in the groups of act_order=True; quantize with act_order='static' or 'group'"
        if not whole and weight.group_size != first.group_size:
            return f"groups of {weight.group_size} beside groups of {first.group_size}; the format has one group size"
        if weight.in_features % weight.group_size:
            return f"its last group is short: {weight.in_features} inputs in groups of {weight.group_size}"
        if weight.out_features % FIELDS:
            return f"{weight.out_features} outputs are no multiple of {FIELDS}"
        return None

    check_holds("awq", weights, problem)
    meta = {"quantizer": [f"jgptq:{importlib.metadata.version('jgptq')}"]}
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": -1 if whole else first.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": with_head(left, weights),
        **({"dynamic": {f"-:^{re.escape(module)}$": {} for module in left}} if left else {}),  # the same to GPTQModel
        "meta": meta | meta_of(weights, dtype),
    }


def encode(settings: Settings, weight: tensor.QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of one module, as `decode` reads them."""
    zeros = np.full(weight.scales.shape, MIDPOINT, np.uint8) if weight.zeros is None else np.asarray(weight.zeros)
    return {"qweight": _qweight(weight), "qzeros": _to_words(zeros), "scales": np.asarray(weight.scales)}


def _codes(qweight: np.ndarray) -> jax.Array:
    """(in, out / 8) words as (in / 8, out) ones, some inputs at a time."""
    rows = _rows_at_once(qweight.shape[1] * FIELDS)
    parts = [pack(_from_words(qweight[start : start + rows]), bits=BITS) for start in range(0, len(qweight), rows)]
    return jnp.concatenate(parts)


def _qweight(weight: tensor.QuantizedTensor) -> np.ndarray:
    """The inverse of `_codes`."""
    rows, words, parts = _rows_at_once(weight.out_features), jnp.asarray(weight.codes), []
    for start in range(0, weight.in_features, rows):
        length = min(rows, weight.in_features - start)
        some = words[start // FIELDS : -(-(start + length) // FIELDS)]
        parts.append(_to_words(np.asarray(unpack(some, bits=BITS, length=length), np.uint8)))
    return np.concatenate(parts)


def _rows_at_once(columns: int) -> int:
    return FIELDS * max(1, CODES_AT_ONCE // (FIELDS * columns))


def _to_words(values: np.ndarray) -> np.ndarray:
    fields = values.reshape(len(values), -1, FIELDS)[..., ORDER]
    return pack_rows(fields.reshape(values.shape), BITS)


def _from_words(words: np.ndarray) -> np.ndarray:
    fields = unpack_rows(words.view(np.uint32), BITS, words.shape[1] * FIELDS)
    return np.ascontiguousarray(fields.reshape(len(words), -1, FIELDS)[..., INVERSE].reshape(fields.shape))


FORMAT = Format(
    name="awq",
    marker="qweight",
    parse=parse,
    expected=expected,
    decode=decode,
    describe=describe,
    encode=encode,
)
