"""Safetensors files written and read here: against the safetensors library, and in parts."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from jgptq.checkpoints import tensor_file


def arrays():
    """Odd sizes, so that no tensor ends where the next dtype could start."""
    random = np.random.default_rng(0)
    return {
        "narrow": random.integers(0, 255, (3, 5), np.uint8),
        "half": random.normal(size=(7, 3)).astype(np.float16),
        "brain": random.normal(size=5).astype(jnp.bfloat16),
        "wide": random.normal(size=(3, 4, 5)).astype(np.float32),
        "words": random.integers(0, 2**32, (3, 3), np.uint32),
        "signed": random.integers(-9, 9, 1, np.int32),
        "double": random.normal(size=(1, 2)),
        "scalar": np.full((), 3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def specs(tensors):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tensors.items()}


@pytest.fixture
def written(tmp_path):
    tensors = arrays()
    tensor_file.write(tmp_path / "file", specs(tensors), reversed(tensors.items()), {"format": "pt"})
    return tmp_path / "file"


def test_safetensors_reads_what_is_written(written):
    read = load_file(written)
    assert list(sorted(read)) == sorted(arrays())
    for name, array in arrays().items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_every_tensor_starts_at_a_multiple_of_its_width(written):
    content = written.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    widths = {name: array.dtype.itemsize for name, array in arrays().items()}
    assert all(entry["data_offsets"][0] % widths[name] == 0 for name, entry in header.items())


def test_bytes_are_those_of_safetensors_itself(tmp_path):
    tensors = {name: array for name, array in arrays().items() if array.dtype == np.float32}
    tensor_file.write(tmp_path / "file", specs(tensors), tensors.items(), {"a": "ü"})
    assert (tmp_path / "file").read_bytes() == save(tensors, {"a": "ü"})


INDICES = [
    ...,
    (),
    0,
    -1,
    slice(1, 3),
    slice(-2, None),
    slice(2, 1),
    slice(None, None, 2),
    (slice(1, 2), 3),
    (..., 1),
    (1, ..., slice(2)),
    (slice(None), [0, 2]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_parts_are_those_of_numpy(index, tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    save_file({"before": np.zeros(7, np.float32), "a": array}, tmp_path / "file", metadata={"x": "y"})
    tensors, metadata = tensor_file.read_header(tmp_path / "file")
    assert metadata == {"x": "y"}
    assert (tensors["a"].shape, tensors["a"].dtype, tensors["a"].nbytes) == ((3, 4, 5), np.float32, 240)
    np.testing.assert_array_equal(tensors["a"][index], array[index])


def test_scalars_and_bfloat16_are_read(written):
    tensors, _ = tensor_file.read_header(written)
    for name, array in arrays().items():
        assert (tensors[name][...].dtype, tensors[name][...].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(tensors[name][...], array)


def test_an_index_outside_is_an_error(written):
    with pytest.raises(IndexError):
        tensor_file.read_header(written)[0]["wide"][3]


def test_only_the_rows_asked_for_are_read(written):
    """The file is cut off behind the first of three rows; so only the whole fails."""
    wide = tensor_file.read_header(written)[0]["wide"]
    with open(written, "rb+") as handle:
        handle.truncate(wide.offset + wide.nbytes // 3)
    np.testing.assert_array_equal(wide[:1], arrays()["wide"][:1])
    with pytest.raises(ValueError, match="ends inside wide; it was changed while in use"):
        wide[...]


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BAD_HEADERS = {
    "beyond the file": {"a": entry("F32", [4], 0, 16), "b": entry("F32", [1_000_000], 16, 4_000_016)},
    "offsets unlike the shape": {"a": entry("F32", [4], 0, 32)},
    "overlapping": {"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)},
    "huge shape": {"a": entry("F32", [2**62, 2**62], 0, 32)},
    "negative": {"a": entry("F32", [-4], -16, 0)},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_lies_is_refused(name, tmp_path):
    text = json.dumps(BAD_HEADERS[name]).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 32)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        tensor_file.read_header(tmp_path / "file")


@pytest.mark.parametrize("starts", [(0, 2**40), (2**40, 0)])
def test_a_header_that_says_a_thing_twice_reads_nothing_outside(starts, tmp_path):
    entries = [f'"a":{json.dumps(entry("F32", [8], start, start + 32))}' for start in starts]
    text = f"{{{','.join(entries)}}}".encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 32)
    values = None
    with contextlib.suppress(ValueError):  # which of the two is believed is safetensors' affair
        values = tensor_file.read_header(tmp_path / "file")[0]["a"][...]
    assert values is None or values.tolist() == [0] * 8


def test_what_was_announced_must_come(tmp_path):
    tensors = {"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="b never came"):
        tensor_file.write(tmp_path / "file", specs(tensors), [("a", tensors["a"])], {})
    with pytest.raises(ValueError, match=r"a is float16\[3\], but was announced as float32\[3\]"):
        tensor_file.write(tmp_path / "file", specs(tensors), [("a", tensors["a"].astype(np.float16))], {})
