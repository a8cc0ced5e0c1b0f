"""save: a LanguageModel's parameters, float or packed, to a checkpoint that appears whole or not at all.

Leaves are read, translated and written one after another, so that lazy ones are never in memory together.
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import math
import os
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.checkpoints import gguf, gguf_file, gguf_tokenizer, huggingface, orbax, tensor_file
from jgptq.checkpoints.formats import FORMATS, PACKINGS
from jgptq.checkpoints.layout import ExpectedTensor, Format, dotted, leaves_by_path
from jgptq.kernels.prepack import unprepack
from jgptq.models import LanguageModel
from jgptq.models.serving import Arranged
from jgptq.partition import gathered, one_writer
from jgptq.tensor import Layout, QuantizedTensor

# Of a source's config.json: how it was packed and in what dtype, and what names code that is not copied.
NOT_KEPT = ("quantization_config", "compression_config", "dtype", "torch_dtype", "auto_map")
FLOATS = ("float32", "float16", "bfloat16")
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def save(
    path: str | Path,
    model: LanguageModel,
    params: Mapping | Arranged,
    *,
    format: str = "gptq",
    tokenizer_from: str | Path | None = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a new checkpoint that `load` reads back bit for bit.

    format: a name in FORMATS. "gptq", "awq" and "compressed-tensors" are directories in Hugging Face's layout, plain
        ones if nothing is packed; "gguf" is one file; "orbax" is a directory in Orbax's layout.
    tokenizer_from: a directory whose tokenizer files are copied; None: `model.source`, where it has any.
    extra_files: texts to write beside the weights, by file name; a report for example. Not for "gguf".
    max_shard_bytes: weights beyond this are spread over several files; in Hugging Face's layout.

    Everything is written beside `path` under a hidden name, synced to disk and renamed. Raises FileExistsError if
    `path` exists, and ValueError for parameters that are not this model's or that the format cannot hold. What GGUF
    holds only nearly is in a UserWarning, with the largest change; as are scales that the other readers of a format
    round to float16, though `load` does not.

    Of several processes (`jax.distributed`) all call it with the same arguments; the first one writes what all hold,
    and the rest wait for it. Not for "orbax".
    """
    if jax.process_count() > 1 and format == "orbax":
        raise ValueError(
            'format="orbax" cannot be written by several processes; choose another, or save in one process'
        )
    if jax.process_count() > 1:
        params = gathered(unprepack(model.plain(params)))
    path = Path(path)
    with one_writer() as writes:
        if not writes:
            return
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists; choose a new name, or remove it first")
        if format not in FORMATS:
            raise ValueError(f"format={format!r}; choose one of {list(FORMATS)}")
        if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
            raise FileNotFoundError(f"tokenizer_from={str(tokenizer_from)!r} is not a directory")
        if format == "gguf" and extra_files:
            raise ValueError(f"extra_files has {sorted(extra_files)}, but a GGUF file holds none; write them yourself")
        params = unprepack(model.plain(params))
        _check(model, params, kernels_only=format != "orbax")
        tokenizer = tokenizer_from or model.source
        with _appearing(path) as partial:
            if format == "gguf":
                gguf.save(partial, model, params, tokenizer_from=tokenizer)
                return
            partial.mkdir()
            if format == "orbax":
                orbax.save(partial, _plain_config(model), params)
            else:
                _write_directory(partial, model, params, PACKINGS[format], max_shard_bytes)
            _copy_tokenizer(tokenizer, partial)
            for name, text in (extra_files or {}).items():
                if Path(name).name != name or (partial / name).exists():
                    raise ValueError(
                        f"extra_files has {name!r}; give plain file names that the format does not use itself"
                    )
                (partial / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` for a file or a directory, which is synced to disk and renamed if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        yield partial
        _sync(partial)
        partial.rename(path)
    except BaseException:
        _remove(partial)
        raise
    tensor_file.sync_directory(path.parent)


def _write_directory(
    directory: Path, model: LanguageModel, params: Mapping, packing: Format, max_shard_bytes: int
) -> None:
    config = _config(model, params, packing)
    leaves = _stored_leaves(model, params, packing, config)
    _write_json(directory / "config.json", config)
    _write_shards(directory, leaves, max_shard_bytes)
    if "quantization_config" in config:
        _write_json(directory / "quantize_config.json", config["quantization_config"])


def remove_partial(path: Path) -> None:
    """Deletes what a `save` to this path that was killed left beside it; for when no other can be under way."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check(model: LanguageModel, params: Mapping, *, kernels_only: bool) -> None:
    """ValueError unless these are the model's parameters, with (in, out) kernels alone packed if `kernels_only`."""
    wanted, given = leaves_by_path(model.parameter_shapes), leaves_by_path(params)
    problems = [f"{dotted(path)} is missing" for path in wanted if path not in given]
    problems += [f"{dotted(path)} is no parameter of this model" for path in given if path not in wanted]
    for path in (path for path in given if path in wanted):
        leaf, shape = given[path], wanted[path].shape
        kind = getattr(leaf, "dtype", None)
        if kind is None:
            problems.append(f"{dotted(path)} is {leaf!r}, not an array")
        elif tuple(leaf.shape) != shape:
            problems.append(f"{dotted(path)} has shape {list(leaf.shape)}, not {list(shape)}")
        elif jnp.dtype(kind).name not in FLOATS:
            problems.append(f"{dotted(path)} is {jnp.dtype(kind)}; cast it to {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
        elif kernels_only and isinstance(leaf, QuantizedTensor) and not _fits(model, path, leaf):
            problems.append(
                f"{dotted(path)} is packed, which only (in, out) kernels can be in this format; dequantize it, or "
                "choose format='orbax'"
            )
    if problems:
        raise ValueError(f"these parameters cannot be saved: {'; '.join(problems)}")


def _fits(model: LanguageModel, path: tuple, leaf: QuantizedTensor) -> bool:
    """Whether a packed leaf is an (in, out) kernel, or a stack of them where the checkpoint has one a module."""
    stacked = "*" in model.architecture.tensor_name(path)[0]
    return path[-1] == "kernel" and leaf.layout.unstacked() == Layout.dense(*leaf.shape[stacked:])


def _config(model: LanguageModel, params: Mapping, packing: Format) -> dict[str, Any]:
    """config.json, with a quantization_config if anything is packed."""
    leaves = leaves_by_path(params)
    dtype = Counter(jnp.dtype(leaf.dtype) for leaf in leaves.values()).most_common(1)[0][0]
    config = _plain_config(model) | {"torch_dtype": dtype.name}
    kernels = {
        module: leaf for path, leaf in leaves.items() if path[-1] == "kernel" for module in _modules(model, path, leaf)
    }
    packed = {module: leaf for module, leaf in kernels.items() if isinstance(leaf, QuantizedTensor)}
    if not packed:
        return config
    left = [module for module in kernels if module not in packed]
    _warn_of_rounding(packing.name, packed)
    return config | {"quantization_config": packing.describe(packed, left, dtype)}


def _warn_of_rounding(format: str, weights: Mapping[str, QuantizedTensor]) -> None:
    """AutoAWQ, GPTQModel and vLLM hold scales in float16; in compressed-tensors they are of the model's dtype."""
    exact = (jnp.float16, jnp.bfloat16) if format == "compressed-tensors" else (jnp.float16,)
    changes = {
        module: change
        for module, weight in weights.items()
        if weight.scales.dtype not in exact and (change := _rounding(np.asarray(weight.scales, np.float32)))
    }
    if changes:
        largest = max(changes, key=changes.get)
        warnings.warn(
            f"scales of {len(changes)} weights are {weights[largest].scales.dtype}; other readers of {format!r} "
            f"checkpoints round them to float16, which changes them by up to {changes[largest]:.1g} of themselves "
            f"({largest}); quantize with Grid(scale_dtype='float16')",
            stacklevel=5,
        )


def _rounding(scales: np.ndarray) -> float:
    """The largest relative change by rounding to float16; infinite beyond its range."""
    with np.errstate(over="ignore"):
        change = np.abs(scales.astype(np.float16).astype(np.float32) - scales)
    changed = change > 0
    return float(np.max(np.divide(change, np.abs(scales), out=np.zeros_like(scales), where=changed), initial=0))


def _plain_config(model: LanguageModel) -> dict[str, Any]:
    """config.json without what is packed: the model's own keys, and those of its source that say other things."""
    kept = {}
    if model.source is not None and (Path(model.source) / "config.json").is_file():
        source = huggingface.read_json(Path(model.source) / "config.json")
        if source.get("model_type") == model.config.model_type:
            kept = {name: value for name, value in source.items() if name not in NOT_KEPT}
    return kept | model.config.to_dict()


def _modules(model: LanguageModel, path: tuple, leaf: Any) -> dict[str, Any]:
    """The checkpoint's modules that a parameter belongs to, and its index for each; `...` is all of it."""
    names = model.architecture.stored_names(path, tuple(leaf.shape))
    stacked = "*" in model.architecture.tensor_name(path)[0]
    return {name.rpartition(".")[0]: index if stacked else ... for index, name in enumerate(names)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StoredLeaf:
    """A parameter as it will lie in the checkpoint: the tensors' shapes and dtypes, and what makes them."""

    specs: dict[str, jax.ShapeDtypeStruct]
    tensors: Callable[[], dict[str, np.ndarray]]


def _stored_leaves(model: LanguageModel, params: Mapping, packing: Format, config: Mapping) -> list[_StoredLeaf]:
    settings = packing.parse(config["quantization_config"]) if "quantization_config" in config else None
    stored = []
    for path, leaf in leaves_by_path(params).items():
        name, transposed = model.architecture.tensor_name(path)
        for module, index in _modules(model, path, leaf).items():
            if isinstance(leaf, QuantizedTensor):
                stored.append(_packed_leaf(module, leaf, index, packing, settings))
            else:
                stored.append(_float_leaf(f"{module}.{name.rpartition('.')[2]}", transposed, leaf, index))
    return stored


def _float_leaf(name: str, transposed: bool, leaf: Any, index: Any) -> _StoredLeaf:
    def tensors() -> dict[str, np.ndarray]:
        value = _read(leaf, index)
        return {name: value.T if transposed else value}

    shape = tuple(leaf.shape) if index is ... else tuple(leaf.shape[1:])
    spec = jax.ShapeDtypeStruct(shape[::-1] if transposed else shape, leaf.dtype)
    return _StoredLeaf(specs={name: spec}, tensors=tensors)


def _packed_leaf(module: str, leaf: QuantizedTensor, index: Any, packing: Format, settings: Any) -> _StoredLeaf:
    def tensors() -> dict[str, np.ndarray]:
        weight = jax.tree.map(lambda array: _read(array, index), leaf)
        parts = packing.encode(settings, dataclasses.replace(weight, layout=leaf.layout.unstacked()))
        return {f"{module}.{part}": array for part, array in parts.items()}

    def spec(expected: ExpectedTensor) -> jax.ShapeDtypeStruct:
        own = tensor_file.NAMES[jnp.dtype(leaf.scales.dtype)]
        kind = expected.dtypes[0] if len(expected.dtypes) == 1 else own
        return jax.ShapeDtypeStruct(expected.shape, tensor_file.DTYPES[kind])

    parts = packing.expected(settings, module, *leaf.shape[-2:])
    return _StoredLeaf(specs={f"{module}.{part}": spec(parts[part]) for part in parts}, tensors=tensors)


def _read(leaf: Any, index: Any) -> np.ndarray:
    """Values of an array or a lazy leaf."""
    return np.asarray(leaf[index]) if isinstance(leaf, jax.Array) else leaf[index]


def _write_shards(directory: Path, leaves: Sequence[_StoredLeaf], max_bytes: int) -> None:
    """Fills one file after another; a tensor larger than max_bytes has a file to itself."""
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    total = held = 0
    for name, spec in (item for leaf in leaves for item in leaf.specs.items()):
        nbytes = math.prod(spec.shape) * spec.dtype.itemsize
        if shards[-1] and held + nbytes > max_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += nbytes
        total += nbytes
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    if len(shards) == 1:
        names = [huggingface.WEIGHTS]
    arrays = _arrays(leaves)
    for name, shard in zip(names, shards, strict=True):
        tensor_file.write(directory / name, shard, itertools.islice(arrays, len(shard)), {"format": "pt"})
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(directory / huggingface.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _arrays(leaves: Sequence[_StoredLeaf]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in order; none is held here once it is handed out."""
    for leaf in leaves:
        tensors = leaf.tensors()
        for name in list(tensors):
            yield name, tensors.pop(name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: str | Path | None, directory: Path) -> None:
    """The tokenizer's files of a directory; of a GGUF file, its tokenizer as one, unless it has none."""
    if source is None:
        return
    if Path(source).is_file():
        _write_tokenizer(Path(source), directory)
        return
    for name in COPIED:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)


def _write_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer and the chat template of a GGUF file; a UserWarning for a tokenizer that is not understood."""
    metadata = gguf_file.read_file(source).metadata
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    try:
        gguf_tokenizer.read_tokenizer(source).save(str(directory / "tokenizer.json"))
    except ValueError as error:
        if metadata.get("tokenizer.ggml.model", "none") != "none":
            warnings.warn(f"no tokenizer is written: {error}", stacklevel=4)


def _sync(path: Path) -> None:
    """Puts a file, or a directory and all in it, on disk for good."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        tensor_file.sync_directory(path)
    else:
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())
