"""The container: read back by the gguf package, and damaged in every part."""

import ast
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from jgptq.checkpoints import gguf_file
from jgptq.checkpoints.gguf_file import Spec, read_file, write_file

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "ü▁", ""],
    "tokenizer.ggml.scores": np.array([0, -1, -2.5], np.float32),
}
TENSORS = {
    "wide": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(5, dtype=np.float16),
    "blocks": np.arange(2 * 34, dtype=np.uint8).reshape(2, 34),
}
SPECS = {
    "wide": Spec(shape=(3, 4), kind="F32"),
    "half": Spec(shape=(5,), kind="F16"),
    "blocks": Spec(shape=(2, 32), kind="Q8_0"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_file(file, METADATA, SPECS, TENSORS.items())
    return file


def test_the_gguf_package_reads_it(written):
    reader = gguf.GGUFReader(written)
    assert [reader.fields[key].contents() for key in METADATA][:4] == ["llama", 1, pytest.approx(1e-5), True]
    assert reader.fields["tokenizer.ggml.tokens"].contents() == METADATA["tokenizer.ggml.tokens"]
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, TENSORS[tensor.name])


def test_reads_what_the_gguf_package_wrote(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("numbers", [1, 2, 3])
    for name, array in TENSORS.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[SPECS[name].kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    file = read_file(tmp_path / "other.gguf")
    assert file.metadata["general.architecture"] == "llama"
    np.testing.assert_array_equal(file.metadata["numbers"], [1, 2, 3])
    for name, array in TENSORS.items():
        stored = file.tensors[name]
        assert (stored.shape, stored.kind) == (SPECS[name].shape, SPECS[name].kind)
        np.testing.assert_array_equal(
            stored.read_bytes(0, stored.rows).reshape(-1), np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )


def test_metadata_comes_back(written):
    metadata = read_file(written).metadata
    assert {key: metadata[key] for key in list(METADATA)[:2]} == {
        "general.architecture": "llama",
        "llama.block_count": 1,
    }
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.tokens"] == ["a", "ü▁", ""]
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], METADATA["tokenizer.ggml.scores"])


def test_runs_of_rows_read_only_themselves(written):
    stored = read_file(written).tensors["wide"]
    np.testing.assert_array_equal(stored.read(1, 2), TENSORS["wide"][1:2])
    assert [(first, len(rows)) for first, rows in stored.chunks(0, 3)] == [(0, 3)]


def test_a_tensor_that_never_came_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not those that were announced"):
        write_file(tmp_path / "x", {}, SPECS, [("wide", TENSORS["wide"])])


@pytest.mark.parametrize("name", ["gguf", "gguf_file", "gguf_blocks", "gguf_config", "gguf_rope", "gguf_tokenizer"])
def test_the_gguf_package_is_imported_when_it_is_needed(name):
    tree = ast.parse((Path(gguf_file.__file__).parent / f"{name}.py").read_text())
    assert all("gguf" not in [alias.name for alias in node.names] for node in tree.body if isinstance(node, ast.Import))


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, entries=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, entries)


def entry(key=b"k", kind=4, value=b"\1\0\0\0"):
    return text(key) + struct.pack("<I", kind) + value


def info(name=b"t", sizes=(32,), kind=0, offset=0, axes=None):
    axes = len(sizes) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", axes, *sizes, kind, offset)


def aligned(raw, data=b"\0" * 128):
    return raw + b"\0" * (-len(raw) % 32) + data


HUGE = 2**62
ARRAY_OF_STRINGS = struct.pack("<IQ", 8, HUGE)
NESTED = struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQ", 4, 0)
DAMAGED = {
    "no magic": (b"GGML" + header()[4:], "no GGUF file"),
    "empty": (b"", "ends at byte 0"),
    "cut in the counts": (header()[:13], "ends at byte 13"),
    "version 1": (header(version=1), "version is 1"),
    "big-endian": (header(version=0x03000000), "big-endian"),
    "too many entries": (header(entries=HUGE), f"claims {HUGE} metadata entries"),
    "too many tensors": (header(tensors=HUGE), f"claims {HUGE} tensors"),
    "entries beyond the end": (header(entries=2) + entry(b"a key of some length"), "ends at byte"),
    "long key": (header(entries=1) + struct.pack("<Q", HUGE) + b"x" * 40, "claims a string of"),
    "key beyond the end": (header(entries=1) + struct.pack("<Q", 60000) + b"x" * 40, "inside its header"),
    "key that is no text": (header(entries=1) + entry(key=b"\xff\xfe"), "no UTF-8"),
    "key twice": (header(entries=2) + entry() + entry(), "'k' twice"),
    "unknown kind": (header(entries=1) + entry(kind=13), "kind 13"),
    "bad boolean": (header(entries=1) + entry(kind=7, value=b"\2"), "neither 0 nor 1"),
    "long string": (header(entries=1) + entry(kind=8, value=struct.pack("<Q", HUGE)), "claims a string of"),
    "string beyond the end": (
        header(entries=1) + entry(kind=8, value=struct.pack("<Q", 99) + b"x"),
        "inside its header",
    ),
    "array of too many numbers": (
        header(entries=1) + entry(kind=9, value=struct.pack("<IQ", 4, HUGE)),
        "numbers in 'k'",
    ),
    "array of too many strings": (header(entries=1) + entry(kind=9, value=ARRAY_OF_STRINGS), "elements in 'k'"),
    "array of an unknown kind": (
        header(entries=1) + entry(kind=9, value=struct.pack("<IQB", 77, 1, 0) + b"12345678"),
        "kind 77",
    ),
    "arrays in arrays in arrays": (header(entries=1) + entry(kind=9, value=NESTED), "nested more than 2"),
    "alignment of 0": (header(entries=1) + entry(b"general.alignment", 4, b"\0\0\0\0"), "general.alignment is 0"),
    "alignment of 33": (header(entries=1) + entry(b"general.alignment", 4, b"\x21\0\0\0"), "general.alignment is 33"),
    "alignment of text": (header(entries=1) + entry(b"general.alignment", 8, text(b"32")), "general.alignment is '32'"),
    "no axes": (aligned(header(tensors=1) + info(sizes=())), "0 axes"),
    "five axes": (aligned(header(tensors=1) + info(sizes=(1, 1, 1, 1, 1))), "5 axes"),
    "countless axes": (aligned(header(tensors=1) + info(axes=2**32 - 1)), "4294967295 axes"),
    "a size of 0": (aligned(header(tensors=1) + info(sizes=(32, 0))), "has sizes"),
    "a part of a block": (aligned(header(tensors=1) + info(sizes=(33, 2), kind=2)), "whole blocks of 32"),
    "unknown type": (aligned(header(tensors=1) + info(kind=5)), "type 5"),
    "sizes that overflow": (aligned(header(tensors=1) + info(sizes=(2**63, 2**63))), "does not fit"),
    "data beyond the end": (aligned(header(tensors=1) + info(sizes=(33,))), "does not fit"),
    "offset beyond the end": (aligned(header(tensors=1) + info(offset=2**63)), "does not fit"),
    "offset out of line": (aligned(header(tensors=1) + info(sizes=(1,), offset=4)), "does not fit"),
    "no data": (header(tensors=1) + info(), "does not fit"),
    "tensor twice": (aligned(header(tensors=2) + info() + info()), "'t' twice"),
    "tensors on each other": (aligned(header(tensors=2) + info() + info(b"u", (8,), 0, 32)), "'u' overlaps"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_clear_error(name, tmp_path):
    raw, message = DAMAGED[name]
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=r"bad\.gguf cannot be read: ") as caught:
        read_file(tmp_path / "bad.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_undamaged_pattern_is_read(tmp_path):
    """What the cases above damage is right in all else."""
    raw = aligned(header(tensors=1, entries=1) + entry() + info())
    (tmp_path / "good.gguf").write_bytes(raw)
    assert read_file(tmp_path / "good.gguf").tensors["t"].shape == (32,)


def test_a_file_cut_after_it_was_opened_is_an_error(written, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(written.read_bytes())
    stored = read_file(copy).tensors["blocks"]
    copy.write_bytes(written.read_bytes()[:-60])
    with pytest.raises(ValueError, match="ends inside blocks"):
        stored.read_bytes(0, 2)


def test_every_mutation_is_read_or_refused(written, tmp_path):
    """Bytes changed and cut at random: a file or a ValueError, and never much memory."""
    raw, random = written.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        mutant = bytearray(raw)
        for place in random.integers(0, len(raw) - 200, random.integers(1, 4)):
            mutant[place] = random.choice([0, 1, 127, 255, random.integers(256)])
        (tmp_path / "mutant.gguf").write_bytes(mutant[: random.choice([len(raw), random.integers(len(raw))])])
        try:
            file = read_file(tmp_path / "mutant.gguf")
            for stored in file.tensors.values():
                stored.read(0, stored.rows) if gguf_file.readable(stored.kind) else None
        except ValueError as error:
            refused += "mutant.gguf" in str(error)
    assert refused > 100
