"""The journal of finished weights: bit for bit, across processes, against damage and against other settings."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jgptq import grid, tensor
from jgptq.checkpoints import Journal, fingerprint
from jgptq.checkpoints import journal as journal_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    path: str
    shape: tuple[int, ...]
    loss: float
    notes: tuple[str, ...]


IDENTITY = {"bits": 4, "rules": [["*.down_proj", 8]], "calibration": "123 bytes"}
from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def weight(*, batch=(), symmetric=False, permuted=False, scale_dtype="float16", layout=None, dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    codes = random.integers(0, 8, (*batch, 40, 6))
    permutation = np.broadcast_to(random.permutation(40).astype(np.int32), (*batch, 40))
    return from_codes(
        jnp.asarray(codes, jnp.uint32),
        jnp.asarray(random.uniform(0.01, 0.1, (*batch, 3, 6)), jnp.float32),
        None if symmetric else jnp.asarray(random.integers(0, 8, (*batch, 3, 6)), jnp.uint8),
        grid=grid.Grid(bits=3, group_size=16, symmetric=symmetric, scale_dtype=scale_dtype),
        permutation=jnp.asarray(permutation) if permuted else None,
        layout=layout,
        dtype=dtype,
    )


WEIGHTS = {
    "plain": weight(),
    "symmetric": weight(symmetric=True, scale_dtype="bfloat16"),
    "permuted": weight(permuted=True, scale_dtype="float32", dtype=jnp.float32),
    "scaled": dataclasses.replace(weight(), input_scales=jnp.linspace(0.5, 2, 40)),
    "experts": weight(
        batch=(5,),
        permuted=True,
        layout=tensor.Layout(shape=(5, 6, 40), factors=(5, 6, 40), batch_axes=(0,), in_axes=(2,), out_axes=(1,)),
    ),
    "stacked": weight(batch=(2,), layout=tensor.Layout.dense(40, 6)),
    "heads": weight(layout=tensor.Layout(shape=(5, 8, 6), factors=(5, 8, 6), in_axes=(0, 1), out_axes=(2,))),
}


def row(path, loss=0.1 + 0.2):
    return Row(path=path, shape=(40, 6), loss=loss, notes=("one", "two"))


def open_journal(directory, identity=IDENTITY):
    return Journal(directory, identity, row_type=Row)


def assert_identical(given, wanted):
    """Equal to the bit, once the arrays are read."""
    read = jax.tree.map(lambda array: array[...], given)
    assert jax.tree.structure(read) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_and_its_row_survive_bit_for_bit(name, tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal[name] = WEIGHTS[name], row(name)
    with open_journal(tmp_path / "journal") as journal:
        read, its_row = journal[name]
        assert_identical(read, WEIGHTS[name])
        assert its_row == row(name)
        assert (read.shape, read.dtype, read.nbytes) == (
            WEIGHTS[name].shape,
            WEIGHTS[name].dtype,
            WEIGHTS[name].nbytes,
        )


def test_arrays_that_come_back_are_on_disk_and_can_be_stored_again(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["permuted"], row("a")
        assert not any(isinstance(leaf, np.ndarray | jax.Array) for leaf in jax.tree.leaves(journal["a"][0]))
        journal["b"] = journal["a"]
        assert_identical(journal["b"][0], WEIGHTS["permuted"])


def test_any_path_is_a_key_and_losses_that_are_no_numbers_survive(tmp_path):
    paths = ["layers.kernel[3]", "a/b", "..", "", "ü %2F\n", "a%2Fb"]
    with open_journal(tmp_path / "journal") as journal:
        for path in paths:
            journal[path] = WEIGHTS["plain"], row(path, loss=float("inf"))
    with open_journal(tmp_path / "journal") as journal:
        assert sorted(journal) == sorted(paths)
        assert all(journal[path][1] == row(path, loss=float("inf")) for path in paths)
    assert [file.name for file in tmp_path.iterdir()] == ["journal"]


def test_it_is_a_mapping(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a", 1.0)
        journal["a"] = WEIGHTS["plain"], row("a", 2.0)
        journal["b"] = WEIGHTS["plain"], row("b")
        assert (len(journal), list(journal), "a" in journal, "c" in journal) == (2, ["a", "b"], True, False)
        assert journal["a"][1].loss == 2.0
        del journal["a"]
        assert "a" not in journal
        with pytest.raises(KeyError):
            journal["a"]
    with open_journal(tmp_path / "journal") as journal:
        assert list(journal) == ["b"]
        journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_journal_without_weights_leaves_nothing(tmp_path):
    with open_journal(tmp_path / "journal"):
        assert (tmp_path / "journal" / "identity.json").is_file()
    assert not list(tmp_path.iterdir())


def test_other_settings_are_refused_with_every_difference_and_nothing_is_lost(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
    other = {"bits": 3, "rules": [["*.down_proj", 8]], "seed": 0}
    with pytest.raises(ValueError, match="unfinished run that differs") as error:
        open_journal(tmp_path / "journal", other)
    message = str(error.value)
    assert 'bits was 4, now 3; calibration was "123 bytes", now null; seed was null, now 0;' in message
    assert "rules" not in message
    assert f"remove {tmp_path / 'journal'} to start anew" in message
    with open_journal(tmp_path / "journal") as journal:
        assert list(journal) == ["a"]


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-3] + b"\x01" + file.read_bytes()[-2:]),
    "no metadata": lambda file: save_file(load_file(file), file),
    "of another weight": lambda file: edit_metadata(file, path="b"),
    "no row": lambda file: edit_metadata(file, row="{}"),
    "a row that is none": lambda file: edit_metadata(file, row="[1]"),
    "a row of strings": lambda file: edit_metadata(file, row=json.dumps({"path": "a", "shape": "x", "loss": "y"})),
    "another loss": lambda file: edit_metadata(file, row=json.dumps(dataclasses.asdict(row("a", 0.5)))),
    "deep JSON": lambda file: edit_metadata(file, row="[" * 100_000),
    "5 bits": lambda file: edit_weight(file, bits=5),
    "bits that are a list": lambda file: edit_weight(file, bits=[3]),
    "groups of 0": lambda file: edit_weight(file, group_size=0),
    "other groups": lambda file: edit_weight(file, group_size=8),
    "stands for integers": lambda file: edit_weight(file, dtype="int8"),
    "stands for objects": lambda file: edit_weight(file, dtype="object"),
    "layout of another shape": lambda file: edit_weight(file, layout=vars(tensor.Layout.dense(6, 40))),
    "huge layout": lambda file: edit_weight(file, layout=vars(tensor.Layout.dense(2**40, 2**40))),
    "layout with an axis twice": lambda file: edit_weight(
        file, layout={**vars(tensor.Layout.dense(40, 6)), "out_axes": [0]}
    ),
    "layout of fractions": lambda file: edit_weight(file, layout={**vars(tensor.Layout.dense(40, 6)), "shape": [0.5]}),
    "layout that is none": lambda file: edit_weight(file, layout=[]),
    "codes missing": lambda file: edit_arrays(file, lambda arrays: arrays.pop("codes")),
    "scales of integers": lambda file: edit_arrays(
        file, lambda arrays: arrays.update(scales=arrays["scales"].view(np.uint16))
    ),
    "an array too many": lambda file: edit_arrays(file, lambda arrays: arrays.update(more=arrays["scales"])),
    "scalar codes": lambda file: edit_arrays(file, lambda arrays: arrays.update(codes=np.zeros((), np.uint32))),
}


def edit_metadata(file, **changes):
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | changes)


def edit_weight(file, **changes):
    with safe_open(file, framework="numpy") as opened:
        static = json.loads(opened.metadata()["weight"])
    edit_metadata(file, weight=json.dumps(static | changes))


def edit_arrays(file, change):
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, metadata=metadata)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_weight_is_told_and_solved_again(name, tmp_path, monkeypatch):
    if name not in ("one bit", "another loss"):  # Whoever writes a file can write its hash: it must not be needed.
        monkeypatch.setattr(journal_file, "_digest", lambda metadata, arrays: "")
    with open_journal(tmp_path / "journal") as journal:
        for path in ("a", "b"):
            journal[path] = WEIGHTS["plain"], row(path)
    DAMAGE[name](tmp_path / "journal" / "a.safetensors")
    with pytest.warns(UserWarning, match=r"a\.safetensors is damaged \((.|\n)*\); a is solved again"):
        journal = open_journal(tmp_path / "journal")
    with journal:
        assert list(journal) == ["b"]
        journal["a"] = WEIGHTS["plain"], row("a")
    with open_journal(tmp_path / "journal") as journal:
        assert_identical(journal["a"][0], WEIGHTS["plain"])


def test_a_weight_damaged_while_in_use_is_an_error(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
        DAMAGE["truncated"](tmp_path / "journal" / "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            journal["a"]


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_damaged_identity_is_refused(content, tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
    (tmp_path / "journal" / "identity.json").write_text(content)
    with pytest.raises(ValueError, match=r"identity\.json is damaged .*; remove .* to start anew"):
        open_journal(tmp_path / "journal")


def test_weights_of_nobody_are_refused(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
    (tmp_path / "journal" / "identity.json").unlink()
    with pytest.raises(ValueError, match=r"holds finished weights, but no identity\.json"):
        open_journal(tmp_path / "journal")


def test_half_written_files_are_forgotten(tmp_path):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
    (tmp_path / "journal" / "b.safetensors.partial").write_bytes(b"half")
    with open_journal(tmp_path / "journal") as journal:
        assert list(journal) == ["a"]
    assert sorted(os.listdir(tmp_path / "journal")) == ["a.safetensors", "identity.json"]


def test_a_failed_write_leaves_the_old_weight(tmp_path, monkeypatch):
    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a", 1.0)

        def fail(handle):
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            journal["a"] = WEIGHTS["plain"], row("a", 2.0)
        monkeypatch.undo()
    with open_journal(tmp_path / "journal") as journal:
        assert journal["a"][1].loss == 1.0


def test_an_interruption_after_the_file_appeared_counts_the_weight(tmp_path, monkeypatch):
    def interrupt(directory):
        raise KeyboardInterrupt

    with open_journal(tmp_path / "journal") as journal:
        monkeypatch.setattr(journal_file.tensor_file, "sync_directory", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal["a"] = WEIGHTS["plain"], row("a")
        assert list(journal) == ["a"]
    assert os.path.exists(tmp_path / "journal" / "a.safetensors")


def test_a_second_process_is_refused_while_the_first_has_it_open(tmp_path):
    """The other process is one of its own, without JAX: it tries the lock that the journal says it takes."""
    pytest.importorskip("fcntl")
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def other():
        command = [sys.executable, "-c", script, str(tmp_path / "journal")]
        return subprocess.run(command, capture_output=True, text=True)

    with open_journal(tmp_path / "journal") as journal:
        journal["a"] = WEIGHTS["plain"], row("a")
        assert "BlockingIOError" in other().stderr
        with pytest.raises(ValueError, match="is in use by another process; wait for it to end, or choose another"):
            open_journal(tmp_path / "journal")
    assert other().returncode == 0
    with pytest.raises(ValueError, match="differs"):
        open_journal(tmp_path / "journal", {})
    assert other().returncode == 0


def test_the_fingerprint_names_every_file_and_sees_each_byte(tmp_path):
    files = {"config.json": b"{}", "tokenizer.json": b"1", "model-1.safetensors": None, "model-2.safetensors": None}
    for number, name in enumerate(files):
        if files[name] is None:
            save_file({f"t{number}": np.arange(5, dtype=np.float32)}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(files[name])
    index = {"weight_map": {"t2": "model-1.safetensors", "t3": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "weights.bin").write_bytes(b"not read")
    before = fingerprint(tmp_path)
    assert sorted(before) == sorted([*files, "model.safetensors.index.json"])
    # printf '{}' | sha256sum
    assert before["config.json"] == ("2 bytes, sha256 44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
    content = bytearray((tmp_path / "model-2.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model-2.safetensors").write_bytes(content)
    after = fingerprint(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["model-2.safetensors"]
