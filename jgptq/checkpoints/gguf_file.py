"""One GGUF file: its metadata and tensors, checked before anything is believed, and a writer.

    magic "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata entries; all little-endian
    metadata   key, uint32 kind, value; strings and arrays begin with a uint64 length
    tensors    name, uint32 number of axes, uint64 sizes with the innermost first, uint32 type, uint64 offset
    data       begins at a multiple of the alignment, as does every tensor in it

[ggml's docs/gguf.md] Sizes and offsets are compared with the file's length before anything is allocated by them.
"""

import dataclasses
import functools
import io
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_NAME = 65535  # bytes of a key or a tensor's name
MAX_STRING = 1 << 28
MAX_AXES = 4
MAX_NESTING = 2  # arrays inside arrays
BLOCK = 1 << 20  # elements that are dequantized at once

NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9

# Types that are arrays of numbers as they are; all others are blocks, which the gguf package decodes.
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file. shape: outermost axis first. kind: ggml's name of its type, "Q4_0" for example.

    block: elements along the last axis that are coded together, in `block_bytes` bytes. A row is a run along that axis.
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str
    block: int
    block_bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers as they are read: of narrow floats their own, of everything else float32."""
        return PLAIN[self.kind] if self.kind in ("F16", "BF16") else np.dtype(np.float32)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block * self.block_bytes

    def read_bytes(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop of all axes but the last merged, undecoded: (rows, row_bytes) uint8."""
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.offset + start * self.row_bytes)
            raw = np.fromfile(handle, np.uint8, (stop - start) * self.row_bytes)
        if len(raw) != (stop - start) * self.row_bytes:
            raise ValueError(f"{self.file} ends inside {self.name}; it was changed while in use")
        return raw.reshape(stop - start, self.row_bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The same rows as numbers, (rows, last axis) of `dtype`."""
        raw = self.read_bytes(start, stop)
        with np.errstate(all="ignore"):  # numbers may be anything
            if self.kind in PLAIN:
                return raw.view(PLAIN[self.kind].newbyteorder("<")).astype(self.dtype, copy=False)
            import gguf

            return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])

    def chunks(self, start: int, stop: int) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, numbers) of runs of rows that are small whatever the tensor."""
        step = max(1, BLOCK // self.shape[-1])
        for first in range(start, stop, step):
            yield first, self.read(first, min(first + step, stop))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """An open file. metadata: strings, numbers and booleans as Python's, arrays of numbers as NumPy's, else lists."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_file(path: Path) -> GGUFFile:
    """Metadata and tensors of a GGUF file; nothing of the data is read. ValueError, naming the file, for damage."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as handle:
            header = _Header(handle, size)
            metadata, infos = header.read()
            tensors = _place(path, size, header.position, metadata, infos)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


class _Header:
    """Reads what precedes the data, and never past the file's end."""

    def __init__(self, handle: io.BufferedReader, size: int):
        self.handle, self.size, self.position = handle, size, 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple]]:
        if (magic := self.take(4)) != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not with {MAGIC!r}, and is no GGUF file")
        version = self.number(UINT32)
        if version not in (2, 3):
            way = "it is big-endian" if version and version % 65536 == 0 else "convert it with llama.cpp's tools"
            raise ValueError(f"its version is {version}, but versions 2 and 3 are read; {way}")
        tensors, entries = self.number(10), self.number(10)
        # The least that each takes: a name of no bytes, a kind or type, and a value of a byte or an offset.
        self.check_count(entries, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string(MAX_NAME)
            if key in metadata:
                raise ValueError(f"metadata has {key!r} twice")
            metadata[key] = self.value(self.number(UINT32), key)
        self.check_count(tensors, 32, "tensors")
        infos: dict[str, tuple] = {}
        for _ in range(tensors):
            name = self.string(MAX_NAME)
            if name in infos:
                raise ValueError(f"it has the tensor {name!r} twice")
            axes = self.number(UINT32)
            if not 1 <= axes <= MAX_AXES:
                raise ValueError(f"tensor {name!r} has {axes} axes; 1 to {MAX_AXES} are allowed")
            shape = tuple(self.number(10) for _ in range(axes))[::-1]
            infos[name] = (shape, self.number(UINT32), self.number(10))
        return metadata, infos

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"it ends at byte {self.size}, inside its header; fetch it again")
        self.position += count
        return self.handle.read(count)

    def check_count(self, count: int, least: int, what: str) -> None:
        """ValueError if so many things of at least so many bytes cannot lie in the rest of the file."""
        if count * least > self.size - self.position:
            raise ValueError(f"it claims {count} {what}, more than its {self.size} bytes can hold; fetch it again")

    def number(self, kind: int) -> Any:
        dtype = NUMBERS[kind]
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def string(self, limit: int) -> str:
        length = self.number(10)
        if length > limit:
            raise ValueError(f"it claims a string of {length} bytes at byte {self.position}; {limit} are allowed")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the string that ends at byte {self.position} is no UTF-8 ({error.reason})") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string(MAX_STRING)
        if kind == ARRAY:
            return self.array(key, depth)
        if kind not in NUMBERS:
            raise ValueError(f"metadata {key!r} has a value of kind {kind}, which does not exist; kinds are 0 to 12")
        if kind == BOOL:
            return bool(self.boolean(self.take(1), key)[0])
        return self.number(kind)

    def array(self, key: str, depth: int) -> Any:
        kind, count = self.number(UINT32), self.number(10)
        if depth == MAX_NESTING:
            raise ValueError(f"metadata {key!r} has arrays nested more than {MAX_NESTING} deep")
        if kind in NUMBERS:
            self.check_count(count, NUMBERS[kind].itemsize, f"numbers in {key!r}")
            raw = self.take(count * NUMBERS[kind].itemsize)
            return self.boolean(raw, key) if kind == BOOL else np.frombuffer(raw, NUMBERS[kind])
        self.check_count(count, 12 if kind == ARRAY else 8, f"elements in {key!r}")
        return [self.value(kind, key, depth + 1) for _ in range(count)]

    def boolean(self, raw: bytes, key: str) -> np.ndarray:
        if raw.strip(b"\0\1"):
            raise ValueError(f"metadata {key!r} is a boolean that is neither 0 nor 1")
        return np.frombuffer(raw, NUMBERS[BOOL])


def _place(path: Path, size: int, end: int, metadata: Mapping, infos: Mapping[str, tuple]) -> dict[str, StoredTensor]:
    """The tensors, each checked to lie in the file and on no other."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}; a power of two from 8 to {1 << 20} is allowed")
    data = -(-end // alignment) * alignment
    placed = {}
    for name, (shape, number, offset) in infos.items():
        if number not in kinds():
            raise ValueError(f"tensor {name!r} has type {number}, which this does not know")
        kind, block, block_bytes = kinds()[number]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} has sizes {list(shape)}; {kind} has rows of whole blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment or offset + nbytes > size - data:
            raise ValueError(
                f"tensor {name!r} of {nbytes} bytes at {offset} does not fit the {max(0, size - data)} bytes of data, "
                f"aligned to {alignment}; fetch it again"
            )
        placed[name] = StoredTensor(
            name=name,
            file=path,
            offset=data + offset,
            shape=shape,
            kind=kind,
            block=block,
            block_bytes=block_bytes,
        )
    free = 0
    for tensor in sorted(placed.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < free:
            raise ValueError(f"tensor {tensor.name!r} overlaps another")
        free = tensor.offset + tensor.rows * tensor.row_bytes
    return placed


@functools.cache
def kinds() -> dict[int, tuple[str, int, int]]:
    """ggml's tensor types: number -> name, elements of a block, bytes of a block."""
    import gguf

    return {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES
    }


@functools.cache
def readable(kind: str) -> bool:
    """Whether tensors of a type are numbers that can be read: not integers, nor blocks that gguf does not decode."""
    if kind in PLAIN:
        return True
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A tensor to be written: shape with the outermost axis first, and ggml's name of its type."""

    shape: tuple[int, ...]
    kind: str

    @property
    def number(self) -> int:
        return next(number for number, (name, *_) in kinds().items() if name == self.kind)

    @property
    def nbytes(self) -> int:
        _, block, block_bytes = kinds()[self.number]
        return math.prod(self.shape) // block * block_bytes


def write_file(
    path: Path, metadata: Mapping[str, Any], specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a GGUF file and syncs it to disk.

    metadata: integers are written as uint32, floats as float32. arrays: the tensors in the order of `specs`, each in
    as many parts, one after another, as the caller likes.
    """
    header = io.BytesIO()
    header.write(MAGIC + struct.pack("<IQQ", 3, len(specs), len(metadata)))
    for key, value in metadata.items():
        header.write(_string(key) + _value(value))
    offset = 0
    for name, spec in specs.items():
        header.write(_string(name) + struct.pack("<I", len(spec.shape)))
        header.write(struct.pack(f"<{len(spec.shape)}QIQ", *spec.shape[::-1], spec.number, offset))
        offset += spec.nbytes + -spec.nbytes % ALIGNMENT
    with open(path, "wb") as handle:
        handle.write(header.getvalue())
        # The last tensor is padded too: ggml counts the padding of every one.
        written: dict[str, int] = {}
        for name, array in arrays:
            if name not in written:
                handle.write(bytes(-handle.tell() % ALIGNMENT))
                written[name] = 0
            handle.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            written[name] += array.nbytes
            del array  # before the next one is made
        handle.write(bytes(-handle.tell() % ALIGNMENT))
        if list(written) != list(specs) or any(written[name] != spec.nbytes for name, spec in specs.items()):
            raise ValueError(f"{path}: the tensors that came are not those that were announced")
        handle.flush()
        os.fsync(handle.fileno())


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with the number of its kind in front."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, np.ndarray):
        kind = next(number for number, dtype in NUMBERS.items() if dtype == value.dtype.newbyteorder("<"))
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.astype(NUMBERS[kind]).tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(_string(text) for text in value)
