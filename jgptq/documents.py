"""Where texts come from: text files, JSON lines, and single files of datasets on the Hugging Face hub.

A text file holds documents separated by `<|endoftext|>`. A file named .jsonl or .json holds one object a line, or a
JSON array of them: {"text": "..."} is a text, {"messages": [{"role": "user", "content": "..."}, ...]} a conversation.
Either may be compressed (.gz). `hf://datasets/owner/name/path/in/it.jsonl` is such a file of a dataset on the hub;
`owner/name@revision` fixes its revision.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jgptq.chat import check_messages

DOCUMENT_SEPARATOR = "<|endoftext|>"
HUB_FILE = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([^/]+))?/([^/].*)")

Conversation = Sequence[Mapping[str, Any]]
Document = str | Conversation


def read_documents(source: str | Path) -> list[Document]:
    """The documents of a file: texts and conversations. Of a JSONL file there is one for each line, "" for a blank one.

    A line with both a text and messages is a conversation. Raises ValueError, with the line's number, for what cannot
    be read, and for a file without text.
    """
    file = locate(source)
    content = _read(file)
    documents = _records(file, content) if _is_json(file) else split_documents(content)
    if not any(document.strip() if isinstance(document, str) else document for document in documents):
        raise ValueError(f"{file} holds no text; give a file with some")
    return documents


def read_text(source: str | Path) -> str:
    """All of a text file as it stands; of a JSONL file its texts, joined by blank lines. Errors: `read_documents`."""
    file = locate(source)
    content = _read(file)
    return join_texts(_records(file, content)) if _is_json(file) else content


def join_texts(documents: Sequence[Document]) -> str:
    """Texts joined by blank lines, as the GPTQ paper joins the rows of WikiText-2; ValueError for a conversation."""
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise ValueError(f"document {number} is a conversation; texts alone are joined to one")
    return "\n\n".join(documents)


def split_documents(text: str) -> list[str]:
    """`text` cut at every `<|endoftext|>`, without the newlines around it and without blank documents."""
    documents = [document.strip("\r\n") for document in text.split(DOCUMENT_SEPARATOR)]
    return [document for document in documents if document.strip()]


def locate(source: str | Path) -> Path:
    """The file that `source` names; one on the hub (hf://datasets/...) is fetched, or found in the hub's cache.

    Raises ValueError if there is no such file and FileNotFoundError if fetching it fails.
    """
    if not str(source).startswith("hf:"):
        if not Path(source).is_file():
            raise ValueError(f"{source} is not a file; give the path of a text or JSONL file, or hf://datasets/...")
        return Path(source)
    match = HUB_FILE.fullmatch(str(source))
    if match is None:
        raise ValueError(f"{source} names no file of a dataset; give hf://datasets/owner/name/path/in/it.jsonl")
    repository, revision, name = match.groups()
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(f"to fetch {source}, pip install huggingface_hub") from error
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except Exception as error:  # The hub's client passes on whatever its HTTP library raises.
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"fetching {source} from the hub failed: {reason or type(error).__name__}") from error


def _is_json(file: Path) -> bool:
    return Path(file.name.removesuffix(".gz")).suffix in (".jsonl", ".json")


def _read(file: Path) -> str:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as handle:
            return handle.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); convert it, with iconv for example") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); fetch it again") from error


def _records(file: Path, content: str) -> list[Document]:
    """The documents of a JSONL file, or of a JSON file with one array."""
    if content.lstrip().startswith("["):
        return [_document(record, f"{file}, entry {n}") for n, record in enumerate(_json(content, str(file)), 1)]
    lines = content.removesuffix("\n").split("\n")
    places = [f"{file}, line {number}" for number in range(1, len(lines) + 1)]
    return [
        _document(_json(line, place), place) if line.strip() else "" for line, place in zip(lines, places, strict=True)
    ]


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}); give one object a line") from error


def _document(record: Any, place: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is a JSON {type(record).__name__}; give an object with a text or with messages")
    if "messages" in record:
        try:
            check_messages(record["messages"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return record["messages"]
    if "text" not in record:
        found = ", ".join(record) or "nothing"
        raise ValueError(f"{place} has neither a text nor messages, but {found}; rename the field that holds the text")
    if not isinstance(record["text"], str):
        raise ValueError(f"{place}: text is a {type(record['text']).__name__}; give a string")
    return record["text"]
