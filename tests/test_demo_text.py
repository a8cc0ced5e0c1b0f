"""The demo's text: what is in it, and that training and held-out modules never mix."""

import sysconfig
from pathlib import Path

import pytest

from jgptq.demo_text import is_held_out, module_names, read_modules

STDLIB = Path(sysconfig.get_path("stdlib"))


def test_the_split_is_by_crc_32_of_the_path_so_it_is_the_same_everywhere():
    # By gzip's trailer: the CRC-32 of "copy.py" is 88137940, a multiple of 20; that of "json/decoder.py" 1136565175.
    assert is_held_out("copy.py")
    assert not is_held_out("json/decoder.py")


def test_about_one_module_in_twenty_is_held_out():
    names = module_names(STDLIB)
    assert names == sorted(names)
    assert 0.02 < sum(map(is_held_out, names)) / len(names) < 0.10


def test_both_parts_are_large_enough_for_the_demo_and_share_no_module():
    training, held_out = read_modules(held_out=False), read_modules(held_out=True)
    assert sum(map(len, training)) > 5_000_000
    assert sum(map(len, held_out)) > 200_000
    assert not set(training) & set(held_out)


def test_tests_packages_tables_and_generated_modules_are_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "site-packages/c/d.py", "tkinter/test/e.py", "encodings/f.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("x = 1\n")
    (tmp_path / "test.py").write_text("x = 1\n")
    assert module_names(tmp_path) == ["a.py", "test.py"]


def test_a_module_is_read_in_the_encoding_that_it_declares(tmp_path):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    assert "é" in read_modules(held_out=is_held_out("a.py"), root=tmp_path)[0]


def test_a_library_without_sources_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no held-out modules of the standard library's source"):
        read_modules(held_out=True, root=tmp_path)
