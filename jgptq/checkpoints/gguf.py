"""GGUF, llama.cpp's file of a whole model: one .gguf holds config, tokenizer and weights.

Packed weights are Q4_0 (symmetric, up to 4 bits), Q8_0 (symmetric, 8 bits) and Q4_1 (asymmetric, up to 4 bits), with
the very codes of the QuantizedTensor. Q4_1 stores -scale * zero as float16, which may round it. Weights of other types
are read as floats.
"""

import dataclasses
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.checkpoints import gguf_blocks, gguf_config, gguf_file, gguf_rope, gguf_tokenizer
from jgptq.checkpoints.layout import dotted, leaves_by_path
from jgptq.models import LanguageModel
from jgptq.models.language_model import ParameterPath
from jgptq.tensor import QuantizedTensor

# general.file_type of files of which most bytes are of a type.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
# llama.cpp adds these, and multiplies the router, in float32 only.
FLOAT32_TENSORS = ("position_embd.", ".ffn_gate_inp.")


def recognizes(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its name or its first bytes, or a directory with one and no config.json."""
    if path.is_dir():
        return not (path / "config.json").is_file() and any(path.glob("*.gguf"))
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return path.suffix == ".gguf" or handle.read(4) == gguf_file.MAGIC


def locate(path: Path) -> Path:
    """The file that a path `recognizes` takes stands for; ValueError for a directory of several."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path} holds {', '.join(file.name for file in files)}; give the path of one of them")
    return files[0]


def load(path: Path, *, dtype: Any | None, place: Callable[[Sequence[Any], Any], Any]) -> tuple[LanguageModel, dict]:
    """The model in a GGUF file, and its parameters; each goes through `place`, by its keys, before the next is read.

    A Q4_1 whose minima are no integer multiples of its scales has float32 zeros. Packed weights stand for arrays of
    the embedding's dtype. Types that no QuantizedTensor holds (Q4_K, Q6_K, …), and packed embeddings, are read as
    float32, a run of rows at a time; one UserWarning names them. `model.source` is the file.
    """
    file = gguf_file.read_file(locate(path))
    try:
        model = gguf_config.read_model(file)
        plans = _plans(file, model)
    except ValueError as error:
        raise ValueError(f"{file.path} cannot be read: {error}") from error
    _warn(file, plans)
    logical = dtype or file.tensors[gguf_config.EMBEDDING].dtype
    return model, jax.tree_util.tree_map_with_path(
        lambda keys, _: place(keys, _read(plans[_path(keys)], dtype, logical)), model.parameter_shapes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyParameter:
    """A float parameter in a GGUF file: shape and dtype without bytes; `leaf[...]` reads it, `stack[3]` one matrix.

    order: for each row of the file (of each matrix, if there are several) its number among the outputs; None: the same.
    offset: what the file's numbers have more than the parameter's. transposed: a kernel, which the file has (out, in).
    """

    stored: gguf_file.StoredTensor
    dtype: np.dtype
    transposed: bool
    order: np.ndarray | None
    offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.stored.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if self.ndim == 3 and isinstance(first, int):
            return self._matrix(range(self.shape[0])[first])[tuple(rest)]
        if self.ndim == 2 and not self.transposed and isinstance(first, slice) and first.step in (None, 1):
            start, stop, _ = first.indices(self.shape[0])
            return self._rows(start, max(start, stop))[(slice(None), *rest)]
        if self.ndim == 3:
            result = np.empty(self.shape, self.dtype)
            for number in range(len(result)):
                result[number] = self._matrix(number)
            return result[index]
        return (self._matrix(0) if self.transposed else self._rows(0, self.stored.rows).reshape(self.shape))[index]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        result = np.empty((stop - start, self.stored.shape[-1]), self.dtype)
        for first, numbers in self.stored.chunks(start, stop):
            values = numbers - np.float32(self.offset) if self.offset else numbers
            result[first - start : first - start + len(numbers)] = values
        return result if self.order is None else result[:, np.argsort(self.order)]

    def _matrix(self, number: int) -> np.ndarray:
        """An (in, out) matrix, filled a run of outputs at a time, so that there are never two copies of the whole."""
        result = np.empty(self.shape[-2:], self.dtype)
        start = number * self.shape[-1]
        order = np.arange(self.shape[-1]) if self.order is None else self.order
        for first, numbers in self.stored.chunks(start, start + self.shape[-1]):
            result[:, order[first - start : first - start + len(numbers)]] = numbers.T
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where a parameter lies: name, shape and order of rows as the file has them; path and shape are the model's."""

    path: ParameterPath
    name: str | None
    shape: tuple[int, ...]
    order: np.ndarray | None
    offset: float
    stored: gguf_file.StoredTensor | None = None

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def packed(self) -> bool:
        return self.transposed and self.stored.kind in gguf_blocks.KINDS


def _path(keys: Any) -> ParameterPath:
    return tuple(getattr(key, "key", key) for key in keys)


def _all_plans(model: LanguageModel) -> list[_Plan]:
    flat = jax.tree_util.tree_leaves_with_path(model.parameter_shapes)
    shapes = {_path(keys): leaf.shape for keys, leaf in flat}
    names = gguf_config.tensor_names(model, shapes)
    return [
        _Plan(
            path=path,
            name=names[path],
            shape=shape,
            order=gguf_config.row_order(model, path, shape[-1]),
            offset=gguf_config.norm_offset(model, path),
        )
        for path, shape in shapes.items()
    ]


def _plans(file: gguf_file.GGUFFile, model: LanguageModel) -> dict[ParameterPath, _Plan]:
    """Every parameter with its tensor; ValueError names all that are missing or that have another shape or type."""
    problems, plans = [], {}
    for plan in _all_plans(model):
        stored = file.tensors.get(plan.name)
        if stored is None:
            problems.append(f"{plan.name or dotted(plan.path)} is missing")
        elif stored.shape != plan.stored_shape:
            problems.append(f"{plan.name} has shape {list(stored.shape)}, not {list(plan.stored_shape)}")
        elif not gguf_file.readable(stored.kind):
            problems.append(f"{plan.name} is of type {stored.kind}, which cannot be read")
        plans[plan.path] = dataclasses.replace(plan, stored=stored)
    if problems:
        raise ValueError(f"it does not fit its own metadata: {'; '.join(problems)}")
    return plans


def _warn(file: gguf_file.GGUFFile, plans: Mapping[ParameterPath, _Plan]) -> None:
    unpacked = Counter(
        plan.stored.kind for plan in plans.values() if plan.stored.kind not in gguf_file.PLAIN and not plan.packed
    )
    if unpacked:
        counts = ", ".join(f"{count} of {kind}" for kind, count in unpacked.items())
        warnings.warn(
            f"{file.path}: these tensors are read as floats, since a QuantizedTensor cannot hold them: {counts}",
            stacklevel=4,
        )
    used = {plan.name for plan in plans.values()} | set(gguf_rope.TENSORS)
    unused = [name for name in sorted(file.tensors) if name not in used]
    if unused:
        more = ", …" if len(unused) > 8 else ""
        warnings.warn(
            f"{file.path}: {len(unused)} tensors are not used by this model: {', '.join(unused[:8])}{more}",
            stacklevel=4,
        )


def _read(plan: _Plan, dtype: Any | None, logical: Any) -> LazyParameter | QuantizedTensor:
    stored = plan.stored
    if not plan.packed:
        return LazyParameter(
            stored=stored,
            dtype=jnp.dtype(dtype or stored.dtype),
            transposed=plan.transposed,
            order=plan.order,
            offset=plan.offset,
        )
    raw = stored.read_bytes(0, stored.rows).reshape(*stored.shape[:-1], stored.row_bytes)
    return gguf_blocks.decode(raw, stored.kind, plan.order, logical)


def save(file: Path, model: LanguageModel, params: Mapping, *, tokenizer_from: str | os.PathLike | None = None) -> None:
    """Writes `file`, leaf by leaf, so that lazy parameters are never in memory together, and syncs it.

    Norms and biases are float32, as llama.cpp has them; other floats stay what they are. tokenizer_from: a directory
    with a tokenizer.json, or a GGUF file; None: `model.source`. Without a tokenizer that GGUF knows the file has none,
    which a UserWarning says.

    Raises ValueError before it writes anything for weights or config fields that GGUF cannot hold, all in one line;
    that the parameters are this model's is checked by `checkpoints.save`. If float16 cannot hold the minima of Q4_1
    exactly, one UserWarning says by how much.
    """
    plans = {plan.path: plan for plan in _all_plans(model)}
    leaves = leaves_by_path(params)
    problems, changes = _check(plans, leaves)
    if problems:
        raise ValueError(f"these parameters cannot be saved as GGUF: {'; '.join(problems)}")
    metadata, extra = gguf_config.describe(model, [plan.name for plan in plans.values()])
    metadata |= gguf_tokenizer.describe(tokenizer_from or model.source, model.config.vocab_size)
    specs = {name: gguf_file.Spec(shape=array.shape, kind="F32") for name, array in extra.items()}
    specs |= {plan.name: _spec(plan, leaves[path]) for path, plan in plans.items()}
    metadata |= _totals(specs)
    if changes:
        largest = max(changes, key=changes.get)
        warnings.warn(
            f"GGUF stores the minimum of {len(changes)} asymmetric weights as float16, which changes them by up to "
            f"{changes[largest]:.1g} of a step ({largest}); a symmetric grid is stored exactly",
            stacklevel=2,
        )
    gguf_file.write_file(file, metadata, specs, _arrays(plans, leaves, extra))


def _check(
    plans: Mapping[ParameterPath, _Plan], leaves: Mapping[ParameterPath, Any]
) -> tuple[list[str], dict[str, float]]:
    """What is wrong, in words, and by how many steps weights change that Q4_1 does not hold exactly."""
    problems, changes = [], {}
    for path, leaf in leaves.items():
        plan, name = plans[path], dotted(path)
        if plan.name is None:
            problems.append(f"{name} has no place in this architecture's files")
        elif isinstance(leaf, QuantizedTensor):
            refusals, change = _examine(leaf, plan)
            problems += [f"{name} {refusal}" for refusal in refusals]
            if change:
                changes[name] = change
    return problems, changes


def _examine(leaf: QuantizedTensor, plan: _Plan) -> tuple[list[str], float]:
    change = 0.0
    for weight in _matrices(leaf, plan, codes=False):
        refusal = gguf_blocks.refusal(weight)
        if refusal is not None:
            return [refusal], 0.0
        change = max(change, gguf_blocks.rounding(weight))
    return [], change


def _matrices(leaf: QuantizedTensor, plan: _Plan, *, codes: bool = True) -> Iterator[QuantizedTensor]:
    """The (in, out) matrices of a kernel or of a stack, each read when asked for. codes: False leaves them out."""
    stack = plan.shape[0] if len(plan.shape) == 3 else None
    given = leaf if codes else dataclasses.replace(leaf, codes=None)
    for index in [...] if stack is None else range(stack):
        arrays = jax.tree.map(lambda array, index=index: _values(array, index), given)
        yield dataclasses.replace(arrays, layout=leaf.layout.unstacked())


def _values(leaf: Any, index: Any) -> np.ndarray:
    """Values of an array or a lazy leaf."""
    return np.asarray(leaf[index]) if isinstance(leaf, jax.Array) else leaf[index]


def _kind(plan: _Plan, leaf: Any) -> str | None:
    """The type a leaf is stored as; None for a dtype that has none here."""
    if isinstance(leaf, QuantizedTensor):
        return gguf_blocks.kind_of(leaf)
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(jnp.dtype(leaf.dtype).name)
    wide = len(plan.shape) == 1 or any(part in plan.name for part in FLOAT32_TENSORS)
    return "F32" if name is not None and wide else name


def _spec(plan: _Plan, leaf: Any) -> gguf_file.Spec:
    return gguf_file.Spec(shape=plan.stored_shape, kind=_kind(plan, leaf))


def _totals(specs: Mapping[str, gguf_file.Spec]) -> dict[str, Any]:
    sizes: Counter = Counter()
    for spec in specs.values():
        sizes[spec.kind] += spec.nbytes
    return {"general.quantization_version": 2, "general.file_type": FILE_TYPES[sizes.most_common(1)[0][0]]}


def _arrays(
    plans: Mapping[ParameterPath, _Plan], leaves: Mapping[ParameterPath, Any], extra: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in order, a stack one matrix after another; none is held here once it is handed out."""
    yield from extra.items()
    for path, plan in plans.items():
        leaf = leaves[path]
        if isinstance(leaf, QuantizedTensor):
            for weight in _matrices(leaf, plan):
                yield plan.name, gguf_blocks.encode(weight, plan.order)
        else:
            for index in range(plan.shape[0]) if len(plan.shape) == 3 else [...]:
                yield plan.name, _float_rows(plan, leaf, _values(leaf, index))


def _float_rows(plan: _Plan, leaf: Any, value: np.ndarray) -> np.ndarray:
    """A float leaf, or a matrix of one, as the file has it."""
    dtype = gguf_file.PLAIN[_kind(plan, leaf)]
    if plan.offset:
        value = value.astype(np.float32) + np.float32(plan.offset)
    rows = value.T if plan.transposed else value
    return (rows if plan.order is None else rows[plan.order]).astype(dtype, copy=False)
