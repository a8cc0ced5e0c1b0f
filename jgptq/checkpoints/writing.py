"""save: a LanguageModel's parameters, float or packed, to a model directory that appears whole or not at all."""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jgptq.checkpoints import huggingface
from jgptq.checkpoints.formats import FORMATS
from jgptq.models import LanguageModel
from jgptq.tensor import Layout, QuantizedTensor

Encode = Callable[[QuantizedTensor], dict[str, np.ndarray]]

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
    params: Mapping,
    *,
    format: str = "gptq",
    tokenizer_from: str | Path | None = None,
    extra_files: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a new model directory that `load` reads back bit for bit, in Hugging Face's layout.

    format: a name in FORMATS, for the packed kernels; a tree without any is a plain checkpoint in every format.
    tokenizer_from: a directory whose tokenizer files are copied; None: `model.source`, where it has any.
    extra_files: texts to write beside the weights, by file name; a report for example.
    max_shard_bytes: weights beyond this are spread over several files.

    Everything is written beside `path` under a hidden name, synced to disk and renamed. Raises FileExistsError if
    `path` exists, and ValueError for parameters that are not this model's or that the format cannot hold.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists; choose a new directory, or remove it first")
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; choose one of {list(FORMATS)}")
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise FileNotFoundError(f"tokenizer_from={str(tokenizer_from)!r} is not a directory")
    _check(model, params)
    config, encode = _config(model, params, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        _write_json(partial / "config.json", config)
        _write_shards(partial, _tensors(model, params, encode), max_shard_bytes)
        if "quantization_config" in config:
            _write_json(partial / "quantize_config.json", config["quantization_config"])
        _copy_tokenizer(tokenizer_from or model.source, partial)
        for name, text in (extra_files or {}).items():
            if Path(name).name != name or (partial / name).exists():
                raise ValueError(f"extra_files has {name!r}; give plain file names that the format does not use itself")
            (partial / name).write_text(text, encoding="utf-8")
        _sync(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_directory(path.parent)


def _leaves(tree: Mapping) -> dict[tuple, Any]:
    """Parameters by path; a QuantizedTensor is one."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    return {tuple(getattr(key, "key", key) for key in keys): leaf for keys, leaf in flat}


def _check(model: LanguageModel, params: Mapping) -> None:
    wanted, given = _leaves(model.parameter_shapes), _leaves(params)
    problems = [f"{_dotted(path)} is missing" for path in wanted if path not in given]
    problems += [f"{_dotted(path)} is no parameter of this model" for path in given if path not in wanted]
    for path in (path for path in given if path in wanted):
        leaf, shape = given[path], wanted[path].shape
        if tuple(leaf.shape) != shape:
            problems.append(f"{_dotted(path)} has shape {list(leaf.shape)}, not {list(shape)}")
        elif isinstance(leaf, QuantizedTensor) and (path[-1] != "kernel" or leaf.layout != Layout.dense(*shape)):
            problems.append(f"{_dotted(path)} is packed, which only (in, out) kernels can be in a file; dequantize it")
    if problems:
        raise ValueError(f"these parameters cannot be saved: {'; '.join(problems)}")


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _config(model: LanguageModel, params: Mapping, format: str) -> tuple[dict[str, Any], Encode | None]:
    """config.json, and what turns a packed kernel into tensors; None if nothing is packed."""
    leaves = _leaves(params)
    dtype = Counter(jnp.dtype(leaf.dtype) for leaf in leaves.values()).most_common(1)[0][0]
    config = {**model.config.to_dict(), "torch_dtype": dtype.name}
    kernels = {_module(model, path): leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    packed = {module: leaf for module, leaf in kernels.items() if isinstance(leaf, QuantizedTensor)}
    if not packed:
        return config, None
    left = [module for module in kernels if module not in packed]
    config["quantization_config"] = FORMATS[format].describe(packed, left, dtype)
    settings = FORMATS[format].parse(config["quantization_config"])
    return config, lambda weight: FORMATS[format].encode(settings, weight)


def _module(model: LanguageModel, path: tuple) -> str:
    return model.architecture.tensor_name(path)[0].rpartition(".")[0]


def _tensors(model: LanguageModel, params: Mapping, encode: Encode | None) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors one by one, so that only one shard is held in host memory."""
    for path, leaf in _leaves(params).items():
        if isinstance(leaf, QuantizedTensor):
            for part, array in encode(leaf).items():
                yield f"{_module(model, path)}.{part}", array
        else:
            name, transposed = model.architecture.tensor_name(path)
            yield name, np.asarray(leaf).T if transposed else np.asarray(leaf)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> None:
    shards: list[list[str]] = []
    sizes, shard = [], {}

    def flush() -> None:
        file = directory / f"{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", file)  # safetensors lets only the owner read what it writes.
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + array.nbytes > max_bytes:
            flush()
        shard[name] = np.ascontiguousarray(array)
        sizes.append(array.nbytes)
    flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / huggingface.WEIGHTS)
        return
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for number, name in enumerate(names):
        (directory / f"{number}.safetensors").rename(directory / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    _write_json(directory / huggingface.INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: str | Path | None, directory: Path) -> None:
    if source is None:
        return
    for name in COPIED:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    """Makes renames inside a directory last; Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
