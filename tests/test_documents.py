"""What is read from text files, JSON lines and files of the hub; what is said about those that cannot be read."""

import gzip
import json

import huggingface_hub.constants
import pytest

from jgptq.documents import join_texts, locate, read_documents, read_text, split_documents

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_a_text_file_is_cut_at_the_marker():
    assert split_documents("\na\n<|endoftext|>\n \n<|endoftext|>b\nc\n") == ["a", "b\nc"]


def test_how_a_system_ends_lines_and_marks_its_files_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb".encode())
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\r\n{"text": "b"}\r\n'.encode())
    assert read_documents(tmp_path / "a.txt") == ["a\nb"]
    assert read_documents(tmp_path / "a.jsonl") == ["a", "b"]


def test_json_lines_are_a_document_each_under_the_number_of_their_line(tmp_path):
    file = tmp_path / "some.jsonl"
    lines = [
        json.dumps({"text": "one\u2028line\nand more", "id": 3}, ensure_ascii=False),
        "",
        json.dumps({"messages": CONVERSATION}),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_documents(file) == ["one\u2028line\nand more", "", CONVERSATION]


def test_a_json_array_and_compressed_files_hold_the_same(tmp_path):
    records = [{"text": "a"}, {"messages": CONVERSATION, "text": "unused"}]
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"a<|endoftext|>b"))
    for name in ("array.json", "lines.json", "lines.jsonl.gz"):
        assert read_documents(tmp_path / name) == ["a", CONVERSATION]
    assert read_documents(tmp_path / "text.txt.gz") == ["a", "b"]


def test_the_whole_text_is_the_file_as_it_stands_or_its_texts_joined_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n = A = \n<|endoftext|>\n")
    assert read_text(tmp_path / "a.txt") == "\n = A = \n<|endoftext|>\n"
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " = A = \\n"}\n')
    assert read_text(tmp_path / "a.jsonl") == "\n\n = A = \n"
    with pytest.raises(ValueError, match="document 2 is a conversation; texts alone are joined"):
        join_texts(["a", CONVERSATION])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON .*; give one object a line"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('"text"', "line 2 is a JSON str; give an object with a text or with messages"),
        ('{"content": "a", "id": 1}', "line 2 has neither a text nor messages, but content, id; rename"),
        ("{}", "line 2 has neither a text nor messages, but nothing"),
        ('{"text": ["a"]}', "line 2: text is a list; give a string"),
        ('{"messages": []}', "line 2: messages are empty"),
        ('{"messages": [{"role": "user", "value": "a"}]}', "line 2: message 1 has no content; give one beside role, v"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        read_documents(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b"\n<|endoftext|>\n \n", "holds no text; give a file with some"),
        ("blank.jsonl", b'{"text": " "}\n\n', "holds no text"),
        ("latin.txt", "déjà vu".encode("latin-1"), "is not UTF-8 text .*iconv"),
        ("cut.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "is not a whole gzip file"),
        ("plain.jsonl.gz", b'{"text": "a"}', "is not a whole gzip file"),
        ("array.json", b'[{"text": "a"}, 3]', "entry 2 is a JSON int"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        read_documents(tmp_path / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache laid out by hand, and no network: main of owner/texts is commit 1…, and there is a commit 2…."""
    repository = tmp_path / "hub" / "datasets--owner--texts"
    for commit, text in (("1" * 40, "first"), ("2" * 40, "second")):
        (repository / "snapshots" / commit / "data").mkdir(parents=True)
        (repository / "snapshots" / commit / "data" / "train.jsonl").write_text(json.dumps({"text": text}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub")
def test_a_file_of_the_hub_is_found_in_its_cache():
    assert read_documents("hf://datasets/owner/texts/data/train.jsonl") == ["first"]
    assert read_documents(f"hf://datasets/owner/texts@{'2' * 40}/data/train.jsonl") == ["second"]


@pytest.mark.usefixtures("hub")
def test_what_the_hub_cannot_give_is_one_line():
    for name in ("owner/texts/data/test.jsonl", "owner/other/train.jsonl", "owner/texts@dev/data/train.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"^fetching hf://datasets/{name} from the hub failed: ") as failure:
            locate(f"hf://datasets/{name}")
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["hf://owner/texts/a.txt", "hf://datasets/owner/texts", "hf:datasets/a/b/c.txt"])
def test_what_names_no_file_of_the_hub_is_refused(name):
    with pytest.raises(ValueError, match=r"names no file of a dataset; give hf://datasets/owner/name/path"):
        locate(name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.txt is not a file; give the path of a text or JSONL file, or hf://"):
        read_documents(tmp_path / "none.txt")
