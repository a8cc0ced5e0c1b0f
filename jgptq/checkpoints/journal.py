"""The journal of a quantization under way: every finished weight on disk, so that a killed run goes on where it was.

directory/identity.json          what the result depends on; a run that differs in anything is refused
directory/<path>.safetensors     codes, scales, zeros, permutation, input_scales; in the metadata the rest of the
                                 QuantizedTensor, its row of the report, and a SHA-256 of all that
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from jgptq import packing
from jgptq.checkpoints import huggingface, orbax, tensor_file
from jgptq.grid import BITS
from jgptq.models.json_fields import read_fields
from jgptq.tensor import Layout, QuantizedTensor

try:
    import fcntl
except ImportError:  # Windows, where two processes on one journal are not noticed.
    fcntl = None

IDENTITY = "identity.json"
SUFFIX = ".safetensors"
ARRAYS = ("codes", "scales", "zeros", "permutation", "input_scales")
SCALE_DTYPES = ("F16", "BF16", "F32")


class Journal(MutableMapping):
    """Finished weights by path: (QuantizedTensor, row), each a file that appears whole or not at all.

    A weight that is read comes with lazy arrays, which are read with `array[...]`. A file that is damaged is removed
    with a warning when the journal is opened, so that its weight is solved again: it depends on nothing that was
    solved after it, so the result is the one that was lost. Used as a context, in which no other process may open it.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, row_type: type):
        """identity: what the result depends on, JSON values by name. row_type: the dataclass of the rows.

        Makes the directory, or goes on with the one that is there: ValueError if its identity is another, naming each
        difference, or if another process has it open.
        """
        self._directory, self._row_type = Path(directory), row_type
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._check_identity(json.loads(json.dumps(identity)))
            for leftover in self._directory.glob("*.partial"):
                leftover.unlink()
            self._finished = {}
            for file in sorted(self._directory.glob(f"*{SUFFIX}")):
                path = unquote(file.name.removesuffix(SUFFIX))
                try:
                    self._read(path, file, digest=True)
                    self._finished[path] = file
                except ValueError as error:
                    warnings.warn(f"{error}; {path} is solved again", stacklevel=2)
                    file.unlink()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leaves the directory to the next run, if anything in it is worth that."""
        if not self._finished:
            self.remove()
        self._unlock()

    def remove(self) -> None:
        """Deletes the directory; for when the result is in its place."""
        self._finished.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._finished)

    def __iter__(self) -> Iterator[str]:
        return iter(self._finished)

    def __getitem__(self, path: str) -> tuple[QuantizedTensor, Any]:
        return self._read(path, self._finished[path])

    def __delitem__(self, path: str) -> None:
        self._finished.pop(path).unlink()

    def __setitem__(self, path: str, finished: tuple[QuantizedTensor, Any]) -> None:
        weight, row = finished
        arrays = {name: np.asarray(array[...]) for name, array in _arrays(weight).items()}
        layout = dataclasses.asdict(weight.layout)
        static = {"bits": weight.bits, "group_size": weight.group_size, "dtype": jnp.dtype(weight.dtype).name}
        metadata = {
            "path": path,
            "weight": json.dumps(static | {"layout": layout}),
            "row": json.dumps(dataclasses.asdict(row)),
        }
        specs = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
        file = self._directory / f"{quote(path, safe='')}{SUFFIX}"
        metadata["sha256"] = _digest(metadata, arrays)
        try:
            _appear(file, lambda partial: tensor_file.write(partial, specs, arrays.items(), metadata))
        finally:  # An interruption may come when the file is there already.
            if file.is_file():
                self._finished[path] = file

    def _read(self, path: str, file: Path, *, digest: bool = False) -> tuple[QuantizedTensor, Any]:
        """A weight with lazy arrays, and its row; ValueError if the file is not as `__setitem__` wrote it.

        digest: read the arrays too, and compare the SHA-256.
        """
        try:
            arrays, metadata = tensor_file.read_header(file)
            if metadata["path"] != path:
                raise ValueError(f"it is that of {metadata['path']}")
            weight = _weight(arrays, json.loads(metadata["weight"]))
            fields = [field.name for field in dataclasses.fields(self._row_type)]
            row = self._row_type(**read_fields(self._row_type, json.loads(metadata["row"]), fields))
            if digest and metadata["sha256"] != _digest(metadata, arrays):
                raise ValueError("its bytes are not those that were written")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error})") from error
        return weight, row

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self._directory / IDENTITY
        out = f"remove {self._directory} to start anew"
        if not file.is_file():
            if any(self._directory.glob(f"*{SUFFIX}")):
                raise ValueError(f"{self._directory} holds finished weights, but no {IDENTITY} to say of what; {out}")
            _appear(file, lambda partial: _write_text(partial, json.dumps(identity, indent=1)))
            return
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
            names = {**old, **identity}
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}); {out}") from error
        differences = [
            f"{name} was {json.dumps(old.get(name))}, now {json.dumps(identity.get(name))}"
            for name in names
            if old.get(name) != identity.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self._directory} is of an unfinished run that differs: {'; '.join(differences)}; "
                f"run again as before to go on with it, or {out}"
            )

    def _locked(self) -> int | None:
        """An open handle of the directory, which no other process can lock until it is closed."""
        if fcntl is None:
            return None
        handle = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(
                f"{self._directory} is in use by another process; wait for it to end, or choose another output"
            ) from error
        return handle

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def fingerprint(source: Path) -> dict[str, str]:
    """Size and SHA-256 of each file that `load` or `save` reads of a model directory or GGUF file, by name.

    All of every file is read: half a minute for 16 GB on a disk that gives 500 MB a second.
    """
    if source.is_file():
        return {source.name: size_and_hash(source)}
    if orbax.recognizes(source):
        files = (file for file in source.rglob("*") if file.is_file())
        return {str(file.relative_to(source)): size_and_hash(file) for file in sorted(files)}
    tensors = huggingface.open_checkpoint(source).tensors.values()
    files = {tensor.file for tensor in tensors}
    files |= {file for pattern in huggingface.HUB_FILES for file in source.glob(pattern)}
    return {str(file.relative_to(source)): size_and_hash(file) for file in sorted(files)}


def size_and_hash(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return f"{handle.tell()} bytes, sha256 {digest}"


def _arrays(weight: QuantizedTensor) -> dict[str, Any]:
    return {name: getattr(weight, name) for name in ARRAYS if getattr(weight, name) is not None}


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([metadata[name] for name in ("path", "weight", "row")]).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name][...]).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _weight(arrays: Mapping[str, tensor_file.StoredTensor], static: Mapping[str, Any]) -> QuantizedTensor:
    """A QuantizedTensor whose arrays have the shapes and dtypes that its static fields ask for; else ValueError."""
    layout = _layout(static["layout"])
    bits, group_size, dtype = static["bits"], static["group_size"], jnp.dtype(static["dtype"])
    if bits not in BITS or type(group_size) is not int or not 1 <= group_size <= layout.in_features:
        raise ValueError(f"it has {bits} bits and groups of {group_size} for {layout.in_features} inputs")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"it stands for {dtype}")
    batch, groups = layout.sizes(layout.batch_axes), -(-layout.in_features // group_size)
    stack = arrays["codes"].shape[: arrays["codes"].ndim - 2 - len(batch)]
    per_group = (groups, layout.out_features)
    expected = {
        "codes": ((packing.word_count(layout.in_features, bits), layout.out_features), ("U32",)),
        "scales": (per_group, SCALE_DTYPES),
        "zeros": (per_group, ("U8",)),
        "permutation": ((layout.in_features,), ("I32",)),
        "input_scales": ((layout.in_features,), ("F32",)),
    }
    if not {"codes", "scales"} <= set(arrays) <= set(expected):
        raise ValueError(f"it holds {', '.join(arrays)}")
    for name, array in arrays.items():
        shape, dtypes = expected[name]
        if array.shape != stack + batch + shape or array.stored_dtype not in dtypes:
            raise ValueError(f"its {name} are {array.stored_dtype}{list(array.shape)}")
    return QuantizedTensor(
        **dict.fromkeys(ARRAYS) | dict(arrays), bits=bits, group_size=group_size, dtype=dtype, layout=layout
    )


def _layout(fields: Mapping[str, Any]) -> Layout:
    layout = Layout(**{name: tuple(values) for name, values in fields.items()})
    if not all(type(size) is int and size >= 0 for values in vars(layout).values() for size in values):
        raise ValueError(f"its layout is {layout}")
    axes = sorted(layout.order)
    if axes != list(range(len(layout.factors))) or math.prod(layout.factors) != math.prod(layout.shape):
        raise ValueError(f"its layout is {layout}")
    return layout


def _appear(file: Path, write: Any) -> None:
    """A file that is there whole or not at all, whatever happens: written and synced under another name first."""
    partial = file.with_name(f"{file.name}.partial")
    write(partial)
    partial.rename(file)
    tensor_file.sync_directory(file.parent)


def _write_text(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
