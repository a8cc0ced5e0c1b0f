"""One safetensors file: its tensors as lazy arrays, and a writer that holds one tensor at a time.

The safetensors library writes only what is in memory all at once, and reads through a mapping whose pages count as the
process's memory besides the copy. It checks every file that is opened here; the bytes go past it.

    8 bytes   length of the header, little-endian
    header    JSON: name -> dtype, shape, data_offsets from the header's end; padded with spaces to 8 bytes
    data      little-endian, without gaps; wide dtypes first, so that each tensor starts at a multiple of its own width
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: shape and dtype from the header; `tensor[...]` reads it, `tensor[2:5]` those rows alone.

    stored_dtype: in safetensors' names, of which DTYPES has those that can be read.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    stored_dtype: str

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.stored_dtype]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if isinstance(first, int | slice) and self.shape:
            chosen = range(self.shape[0])[first]
            if isinstance(chosen, int):
                return self._rows(chosen, chosen + 1)[(0, *rest)]
            if chosen.step == 1:
                return self._rows(chosen.start, max(chosen.start, chosen.stop))[(slice(None), *rest)]
        return self._rows(0, self.shape[0] if self.shape else 1)[index]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.offset + start * row)
            raw = np.fromfile(handle, np.uint8, (stop - start) * row)
        if len(raw) != (stop - start) * row:
            raise ValueError(f"{self.file} ends inside {self.name}; it was changed while in use")
        return raw.view(self.dtype).reshape((stop - start, *self.shape[1:]) if self.shape else ())


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; nothing but the header is read.

    ValueError if the file is no safetensors file, or if its header and its length disagree.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            kinds = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
            metadata = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from error
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    # Whatever json reads here that safetensors did not check: shapes are bounded, and a short read is an error.
    offsets = {name: 8 + length + header[name]["data_offsets"][0] for name in kinds}
    return {
        name: StoredTensor(name=name, file=file, offset=offsets[name], shape=shape, stored_dtype=dtype)
        for name, (shape, dtype) in kinds.items()
    }, metadata


def write(
    file: Path,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file and syncs it to disk; `arrays` come one by one, in any order, each as its spec says."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: (-jnp.dtype(item[1].dtype).itemsize, item[0])):
        offsets[name] = end
        end += math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize
        header[name] = {
            "dtype": NAMES[jnp.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays:
            if (array.shape, array.dtype) != (specs[name].shape, specs[name].dtype):
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}, but was announced as "
                    f"{jnp.dtype(specs[name].dtype)}{list(specs[name].shape)}"
                )
            handle.seek(8 + len(text) + offsets.pop(name))
            # As bytes, since NumPy's buffers do not know bfloat16.
            handle.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            del array  # before the next one is made
        if offsets:
            raise ValueError(f"{file}: {', '.join(offsets)} never came")
        handle.flush()
        os.fsync(handle.fileno())


def sync_directory(directory: Path) -> None:
    """Makes renames inside a directory last; Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
