"""load: a checkpoint of any format, float or packed, to a LanguageModel and its parameters."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jgptq.checkpoints import gguf, huggingface, orbax
from jgptq.checkpoints.formats import PACKINGS
from jgptq.checkpoints.layout import ExpectedTensor, Format, Placing
from jgptq.checkpoints.tensor_file import StoredTensor
from jgptq.models import LanguageModel, language_model
from jgptq.tensor import QuantizedTensor

FLOATS = ("F16", "BF16", "F32", "F64")
BLOCK = 1 << 20  # elements of a weight that are transposed at once


def load(
    path: str | Path,
    *,
    dtype: Any | None = None,
    lazy: bool = False,
    sharding: jax.sharding.Sharding | Placing | None = None,
) -> tuple[LanguageModel, dict]:
    """The model in a Hugging Face directory (or hub id), a GGUF file or an Orbax directory, and its parameters.

    What it is, is seen from the files: float or packed as GPTQ, AWQ (GEMM) or compressed-tensors (pack-quantized),
    GGUF, or what `save` wrote through Orbax. Packed weights come back as QuantizedTensors, bit for bit as stored.

    dtype: of float parameters and of the arrays that packed ones stand for; None: as stored (float64, which JAX does
        not have by default, as float32).
    lazy: float parameters stay on disk as LazyParameters, for `quantize` and `save`, which read one when needed;
        Orbax's are read at once.
    sharding: of every array, or a function from its dotted path (`model.embed_tokens.embedding`, and for packed ones
        `….kernel.codes`, `.scales`, `.zeros`) and its shape and dtype; None: JAX's default device.

    Everything is checked against the architecture before anything is read: FileNotFoundError or ValueError in one
    line, all missing and misshapen tensors at once. Tensors the model has no place for are named in a UserWarning.
    """
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype={dtype!r}; give a floating-point dtype, or None to keep what is stored")
    if lazy and sharding is not None:
        raise ValueError("lazy=True leaves parameters on disk, where sharding says nothing; give one of them")

    def place(keys: Sequence[Any], leaf: Any) -> Any:
        if lazy:
            return leaf
        return jax.tree_util.tree_map_with_path(lambda own, part: _on_device((*keys, *own), part, sharding), leaf)

    source = Path(path) if gguf.recognizes(Path(path)) else huggingface.locate(path)
    if orbax.recognizes(source):
        return orbax.load(source, dtype=dtype, placing=_placing(sharding))
    if gguf.recognizes(source):
        return gguf.load(source, dtype=dtype, place=place)
    return _load_directory(huggingface.open_checkpoint(source), dtype, place)


def _load_directory(
    checkpoint: huggingface.Checkpoint, dtype: Any | None, place: Callable[[Sequence[Any], Any], Any]
) -> tuple[LanguageModel, dict]:
    """A Hugging Face directory's model, and its parameters; each goes to its place before the next is read."""
    try:
        model = language_model(checkpoint.config, checkpoint.directory, tensors=len(checkpoint.tensors))
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory / 'config.json'}: {error}") from error
    packing, settings = _packing(checkpoint)
    plans = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _plan(checkpoint, model, packing, settings, keys, leaf.shape), model.parameter_shapes
    )
    _check(checkpoint, jax.tree.leaves(plans))
    _warn_of_unused(checkpoint, model, jax.tree.leaves(plans))
    stored_dtype = _stored_dtype(checkpoint)

    def read(keys: Sequence[Any], plan: _Plan) -> Any:
        return place(keys, _read(checkpoint, plan, packing, settings, dtype, stored_dtype))

    return model, jax.tree_util.tree_map_with_path(read, plans)


def _placing(sharding: jax.sharding.Sharding | Placing | None) -> Placing:
    """Where an array is to be, by its path; ValueError that names it where its axes cannot be divided so."""
    one = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(path: str, spec: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        chosen = sharding(path, spec) if callable(sharding) else one
        try:
            chosen.shard_shape(spec.shape)
        except ValueError as error:
            raise ValueError(
                f"{path} of shape {list(spec.shape)} cannot have the sharding {chosen}; give a function that chooses "
                "one for each array"
            ) from error
        return chosen

    return place


def _on_device(keys: Sequence[Any], leaf: Any, sharding: jax.sharding.Sharding | Placing | None) -> Array:
    """An array, or a lazy leaf's values, where they are to be; the host holds one leaf at a time."""
    value = leaf if isinstance(leaf, jax.Array) else leaf[...]
    if sharding is None:
        return jnp.asarray(value, leaf.dtype)
    path = ".".join(str(key.key if hasattr(key, "key") else key.name) for key in keys)
    return jax.device_put(value, _placing(sharding)(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyParameter:
    """A float parameter on disk: shape and dtype without bytes; `leaf[...]` reads it, in its own dtype and order."""

    stored: StoredTensor
    dtype: np.dtype
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    @property
    def ndim(self) -> int:
        return self.stored.ndim

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        if not self.transposed:
            return self.stored[index].astype(self.dtype, copy=False)
        # A run of rows at a time, so that there are never two copies of the whole.
        result = np.empty(self.shape, self.dtype)
        rows = max(1, BLOCK // max(1, len(result)))
        for start in range(0, len(result.T), rows):
            result.T[start : start + rows] = self.stored[start : start + rows]
        return result[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyStack:
    """Lazy parameters of one shape and dtype along a new first axis: the experts of a layer. `stack[3]` reads one."""

    parts: tuple[LazyParameter, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return len(self.parts) * self.parts[0].nbytes

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if isinstance(first, int):
            return self.parts[first][tuple(rest)]
        chosen = self.parts
        if isinstance(first, slice):
            chosen, index = self.parts[first], (slice(None), *rest)
        result = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for number, part in enumerate(chosen):
            result[number] = part[...]
        return result[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one parameter is read: for each module, what the checkpoint must hold, by full name.

    shape: of one module's part of the parameter.
    stacked: the parameter is a stack of the modules', even if there is but one.
    """

    modules: dict[str, dict[str, ExpectedTensor]]
    shape: tuple[int, ...]
    packed: bool
    transposed: bool
    stacked: bool

    @property
    def tensors(self) -> dict[str, ExpectedTensor]:
        return {name: wanted for tensors in self.modules.values() for name, wanted in tensors.items()}


def _packing(checkpoint: huggingface.Checkpoint) -> tuple[Format | None, Any]:
    if checkpoint.quantization is None:
        return None, None
    name = checkpoint.quantization.get("quant_method", "gptq")
    if not isinstance(name, str) or name not in PACKINGS:
        raise ValueError(f"{checkpoint.directory}: quant_method={name!r} is not supported; known are {list(PACKINGS)}")
    try:
        return PACKINGS[name], PACKINGS[name].parse(checkpoint.quantization)
    except ValueError as error:
        raise ValueError(f"{checkpoint.directory}: {error}") from error


def _stored_dtype(checkpoint: huggingface.Checkpoint) -> Any | None:
    """The dtype config.json gives the model; None where it gives none that is a dtype of arrays."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return name if name in ("float16", "bfloat16", "float32") else None


def _plan(
    checkpoint: huggingface.Checkpoint,
    model: LanguageModel,
    packing: Format | None,
    settings: Any,
    keys: Sequence[Any],
    shape: tuple[int, ...],
) -> _Plan:
    path, architecture = tuple(key.key for key in keys), model.architecture
    name, transposed = architecture.tensor_name(path)
    names, stacked = architecture.stored_names(path, shape), "*" in name
    if not any(stored.startswith(architecture.prefix) for stored in checkpoint.tensors):
        names = tuple(name.removeprefix(architecture.prefix) for name in names)
    shape = shape[1:] if stacked else shape
    modules = [name.rpartition(".")[0] for name in names]
    packed = packing is not None and keys[-1].key == "kernel" and f"{modules[0]}.{packing.marker}" in checkpoint.tensors
    plans = {}
    for name, module in zip(names, modules, strict=True):
        if packed:
            try:
                parts = packing.expected(settings, module, *shape)
            except ValueError as error:
                raise ValueError(f"{checkpoint.directory}: {error}") from error
            plans[module] = {f"{module}.{part}": wanted for part, wanted in parts.items()}
        else:
            plans[module] = {name: ExpectedTensor(shape=shape[::-1] if transposed else shape, dtypes=FLOATS)}
    return _Plan(modules=plans, shape=shape, packed=packed, transposed=transposed, stacked=stacked)


def _check(checkpoint: huggingface.Checkpoint, plans: Sequence[_Plan]) -> None:
    problems = []
    for plan in plans:
        for name, wanted in plan.tensors.items():
            stored = checkpoint.tensors.get(name)
            if stored is None:
                problems.append(f"{name} is missing")
            elif problem := wanted.problem(stored.shape, stored.stored_dtype):
                problems.append(f"{name} {problem}")
    if problems:
        raise ValueError(f"{checkpoint.directory} does not fit its config.json: {'; '.join(problems)}")


def _warn_of_unused(checkpoint: huggingface.Checkpoint, model: LanguageModel, plans: Sequence[_Plan]) -> None:
    used = {name for plan in plans for name in plan.tensors}
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in model.architecture.unused) or r"(?!)")
    unused = [name for name in sorted(checkpoint.tensors) if name not in used and not ignored.fullmatch(name)]
    unused = _without_zero_biases(checkpoint, model, plans, unused)
    if unused:
        warnings.warn(
            f"{checkpoint.directory}: {len(unused)} tensors are not used by a {model.architecture.model_type}: "
            f"{', '.join(unused[:8])}{', …' if len(unused) > 8 else ''}",
            stacklevel=4,
        )


def _without_zero_biases(
    checkpoint: huggingface.Checkpoint, model: LanguageModel, plans: Sequence[_Plan], names: Sequence[str]
) -> list[str]:
    """`names` without the biases of packed modules that have none; ValueError unless they are zero, as AutoGPTQ's."""
    packed = {f"{module}.bias" for plan in plans if plan.packed for module in plan.modules}
    for name in (name for name in names if name in packed):
        if np.any(checkpoint.tensors[name][...]):
            raise ValueError(
                f"{checkpoint.directory} does not fit its config.json: {name} is not zero, and a "
                f"{model.architecture.model_type} with this config.json has no bias there"
            )
    return [name for name in names if name not in packed]


def _read(
    checkpoint: huggingface.Checkpoint,
    plan: _Plan,
    packing: Format | None,
    settings: Any,
    dtype: Any | None,
    stored_dtype: Any | None,
) -> LazyParameter | LazyStack | QuantizedTensor:
    if not plan.packed:
        parts = tuple(_read_float(checkpoint.tensors[name], plan.transposed, dtype) for name in plan.tensors)
        return LazyStack(parts=parts) if plan.stacked else parts[0]
    weights = []
    for module, tensors in plan.modules.items():
        arrays = {name.rpartition(".")[2]: checkpoint.tensors[name][...] for name in tensors}
        try:
            weights.append(packing.decode(settings, module, plan.shape, arrays, stored_dtype))
        except ValueError as error:
            raise ValueError(f"{checkpoint.directory}: {error}") from error
    weight = _stack(checkpoint, list(plan.modules), weights) if plan.stacked else weights[0]
    return weight if dtype is None else dataclasses.replace(weight, dtype=jnp.dtype(dtype))


def _read_float(stored: StoredTensor, transposed: bool, dtype: Any | None) -> LazyParameter:
    own = np.float32 if stored.dtype == np.float64 else stored.dtype
    return LazyParameter(stored=stored, dtype=jnp.dtype(dtype or own), transposed=transposed)


def _stack(
    checkpoint: huggingface.Checkpoint, modules: Sequence[str], weights: Sequence[QuantizedTensor]
) -> QuantizedTensor:
    if len({weight.symmetric for weight in weights}) > 1:  # AWQ does not say which are: those with all zeros alike
        weights = [_with_zeros(weight) for weight in weights]
    if len({(jax.tree.structure(weight), weight.scales.dtype) for weight in weights}) > 1:
        raise ValueError(
            f"{checkpoint.directory}: {modules[0]} to {modules[-1]} are packed in different ways; experts of one layer "
            "must have the same bits, group size, symmetry and order of inputs"
        )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)


def _with_zeros(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight with the zeros of a symmetric grid written out."""
    if not weight.symmetric:
        return weight
    return dataclasses.replace(weight, zeros=jnp.full(weight.scales.shape, 2 ** (weight.bits - 1), jnp.uint8))
