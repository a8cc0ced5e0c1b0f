"""What a packed checkpoint format is: a value that names its tensors and translates one module both ways."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jgptq.tensor import QuantizedTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedTensor:
    """A tensor a checkpoint must hold: its shape, and the dtypes allowed, in safetensors' names."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A row of FORMATS. `Settings` below is the format's own parsed form of config.json's quantization_config.

    name: the quant_method it reads and writes.
    marker: the last part of the tensor name that only a packed module has.
    parse: quantization_config -> Settings; ValueError for what is not supported.
    expected: (Settings, module, in_features, out_features) -> tensors by the last part of their names. One that may
        have several dtypes is written in that of the weight's scales.
    decode: (Settings, module, tensors, logical dtype or None) -> QuantizedTensor; tensors already checked.
    describe: (weights by module, modules left alone, dtype of the model) -> quantization_config.
    encode: (Settings, weight) -> tensors, in the order of `expected`; decode(encode(weight)) is bit for bit the weight.
    """

    name: str
    marker: str
    parse: Callable[[Mapping[str, Any]], Any]
    expected: Callable[[Any, str, int, int], dict[str, ExpectedTensor]]
    decode: Callable[[Any, str, Mapping[str, np.ndarray], Any], QuantizedTensor]
    describe: Callable[[Mapping[str, QuantizedTensor], Sequence[str], Any], dict[str, Any]]
    encode: Callable[[Any, QuantizedTensor], dict[str, np.ndarray]]
