"""From text to calibration batches: token windows, all of one shape.

Documents are packed: one stream of tokens with a separator between documents, cut into windows that follow each other.
The separator is `<|endoftext|>` if the vocabulary has it, else the token that the tokenizer puts in front of a text
(BOS), else a newline. A tokenizer that puts BOS in front of a text also gets it in front of every window: models
trained so read windows without it badly. Without packing, a window is a piece of a single document.

With a chat template, a conversation is the text that the template makes of it, and a text is that of a conversation of
one message, the user's.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer

from jgptq.chat import ChatTemplate
from jgptq.checkpoints import read_tokenizer
from jgptq.documents import DOCUMENT_SEPARATOR, Document, join_texts, read_documents, read_text, split_documents

CHUNK = 1000  # texts encoded at a time: an encoding takes many times the memory of its ids
# What a chat template is told today is, so that the same arguments give the same batches on any day.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)

Source = str | Path | Sequence[Document] | Sequence[int] | np.ndarray | Array


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, from its tokenizer.json, or of a GGUF file; ValueError if there is none."""
    if Path(source).is_file():
        return read_tokenizer(source)
    path = Path(source) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{source} has no tokenizer.json; save one there with transformers' "
            f"PreTrainedTokenizerFast.save_pretrained, or pass token ids in place of text"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for all that it cannot read
        raise ValueError(f"{path} is not a tokenizer that the tokenizers package reads: {error}") from error


def bos_token(tokenizer: Tokenizer) -> int | None:
    """The id of the special token that the tokenizer puts in front of a text, None if it puts none there."""
    encoding = tokenizer.encode("a")
    return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, chat_template: ChatTemplate | None = None
) -> Int[np.ndarray, " tokens"]:
    """One stream of token ids, int32, with a separator between documents (see above) and none at either end.

    A text may hold several documents, separated by `<|endoftext|>`. Nothing to encode gives an empty stream.
    Raises ValueError for a conversation without a chat template, and for one that the template fails on.
    """
    if isinstance(documents, str):
        raise ValueError("documents is one text, whose characters would be taken for documents; give [text]")
    separator = _separator(tokenizer)
    stream = []
    for ids in _encoded(_texts(documents, chat_template), tokenizer):
        stream += [separator, ids]
    return np.concatenate(stream[1:]) if stream else np.zeros(0, np.int32)


def batches(
    source: Source,
    tokenizer: Tokenizer | None = None,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    batch_size: int = 8,
    pack: bool = True,
    chat_template: ChatTemplate | None = None,
) -> list[tuple[Int[Array, "batch {seq_len}"]]]:
    """`samples` windows of `seq_len` tokens, drawn at random: what `quantize` takes as its batches.

    source: a file (jgptq.documents says which kinds), a list of texts and conversations, or token ids in one stream.
    tokenizer: needed for text. With one that puts BOS in front of a text, a window is BOS and seq_len - 1 tokens.
    seed: which windows are drawn, and their order. The same arguments give the same batches on any machine.
    batch_size: windows a batch, at most. All batches have one size, the largest up to this that divides `samples`.
    pack: True draws windows of the packed stream, without overlap. False draws documents, leaving out those too short
        for a window, and from each a piece at random; once all are drawn it begins again. So draws the GPTQ paper's
        code from C4 and, with one long text as the only document, from WikiText-2, but for the BOS in front.
    chat_template: what makes a text of a conversation, from jgptq.chat.load_chat_template.
    Raises ValueError for a source that is missing or too short for so many windows.
    """
    for name, value, least in (("samples", samples, 1), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}; give an integer of at least {least}")
    documents, ids = _documents_or_ids(source, tokenizer)
    if ids is not None and chat_template is not None:
        raise ValueError("token ids take no chat template; give texts or conversations, or leave chat_template out")
    bos = None if tokenizer is None else bos_token(tokenizer)
    content = seq_len - (bos is not None)
    rng = np.random.default_rng(seed)
    if pack:
        stream = encode(documents, tokenizer, chat_template) if ids is None else ids
        windows = _packed(stream, samples, content, seq_len, rng)
    else:
        parts = _texts(documents, chat_template) if ids is None else [ids]
        windows = _pieces(parts, tokenizer, samples, content, seq_len, rng)
    if bos is not None:
        windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)
    size = windows_a_batch(samples, batch_size)
    return [(jnp.asarray(windows[start : start + size]),) for start in range(0, samples, size)]


def windows_a_batch(samples: int, batch_size: int = 8) -> int:
    """The largest number of windows up to `batch_size` that divides all `samples` into equal batches."""
    return max(size for size in range(1, min(batch_size, samples) + 1) if samples % size == 0)


def gptq_windows(source: Source, tokenizer: Tokenizer, *, seq_len: int) -> Int[np.ndarray, "n {seq_len}"]:
    """The windows that the GPTQ paper evaluates on; `perplexity` of them, without BOS in front, is its figure.

    The text is encoded as one, with the special tokens that the tokenizer itself puts at its ends, and cut into windows
    without overlap; what does not fill the last window is left out. The paper has seq_len=2048 and for `source` the
    test split of WikiText-2, its rows joined by blank lines (a text file is taken as it stands, the texts of a JSONL
    file or of a list are joined so). [Frantar et al. 2023, and their code: datautils.py and llama.py]
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}; give an integer of at least 2")
    text = read_text(source) if isinstance(source, str | Path) else join_texts(source)
    ids = np.asarray(tokenizer.encode(text).ids, np.int32)
    count = len(ids) // seq_len
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, too few for one window of {seq_len}; give more text")
    return ids[: count * seq_len].reshape(count, seq_len)


def _packed(
    stream: Int[np.ndarray, " tokens"], samples: int, content: int, seq_len: int, rng: np.random.Generator
) -> Int[np.ndarray, "samples content"]:
    count = len(stream) // content
    if count == 0:
        raise ValueError(
            f"the calibration source has {len(stream)} tokens, but one window of seq_len={seq_len} needs {content}; "
            f"give more text or a smaller seq_len"
        )
    if count < samples:
        raise ValueError(
            f"the calibration source has {len(stream)} tokens, which make {count} windows of seq_len={seq_len}, but "
            f"samples={samples}; give more text, a smaller seq_len, or at most {count} samples"
        )
    return stream[: count * content].reshape(count, content)[rng.permutation(count)[:samples]]


def _pieces(
    documents: Sequence[str | np.ndarray],
    tokenizer: Tokenizer | None,
    samples: int,
    content: int,
    seq_len: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "samples content"]:
    """Encodes no more documents than it needs."""
    long = []
    for index in rng.permutation(len(documents)):
        document = documents[index]
        ids = next(_encoded([document], tokenizer)) if isinstance(document, str) else document
        if len(ids) >= content:
            long.append(ids)
        if len(long) == samples:
            break
    if not long:
        raise ValueError(
            f"no document of the calibration source has the {content} tokens that a window of seq_len={seq_len} needs; "
            f"pack the documents, or give longer ones or a smaller seq_len"
        )
    chosen = [long[sample % len(long)] for sample in range(samples)]
    starts = [int(rng.integers(len(ids) - content + 1)) for ids in chosen]
    return np.stack([ids[start : start + content] for ids, start in zip(chosen, starts, strict=True)])


def _texts(documents: Sequence[Document], chat_template: ChatTemplate | None) -> list[str]:
    """Each document's text, as it will be encoded."""
    texts = []
    for number, document in enumerate(documents, 1):
        try:
            parts = _parts(document, chat_template)
            "".join(parts).encode()  # JSON can hold half a surrogate pair, which is no text
        except ValueError as error:
            raise ValueError(f"document {number} (of a JSONL file: line {number}): {error}") from error
        texts += parts
    return texts


def _parts(document: Document, chat_template: ChatTemplate | None) -> list[str]:
    if isinstance(document, str):
        parts = split_documents(document)
        if chat_template is None:
            return parts
        conversations = [[{"role": "user", "content": part}] for part in parts]
    elif chat_template is None:
        raise ValueError("a conversation needs the model's chat template; ask for it (--chat-template), or give texts")
    else:
        conversations = [document]
    return [chat_template.render(conversation, today=TEMPLATE_DATE) for conversation in conversations]


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, " tokens"]]:
    """The ids of each text, without separators at its ends: a chat template may have put BOS there."""
    separator = _separator(tokenizer)
    for start in range(0, len(texts), CHUNK):
        for encoding in tokenizer.encode_batch(list(texts[start : start + CHUNK]), add_special_tokens=False):
            ids = np.asarray(encoding.ids, np.int32)
            if len(separator) == 1:
                ids = ids[(ids[:1] == separator).sum() :]
                ids = ids[: len(ids) - (ids[-1:] == separator).sum()]
            yield ids


def _separator(tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
    """What stands between two documents."""
    for token in (tokenizer.token_to_id(DOCUMENT_SEPARATOR), bos_token(tokenizer)):
        if token is not None:
            return np.asarray([token], np.int32)
    return np.asarray(tokenizer.encode("\n", add_special_tokens=False).ids, np.int32)


def _documents_or_ids(
    source: Source, tokenizer: Tokenizer | None
) -> tuple[Sequence[Document], Int[np.ndarray, " tokens"] | None]:
    """What the source holds: documents, or token ids."""
    if isinstance(source, str | Path):
        source = read_documents(source)
    if len(source) == 0:
        raise ValueError("the calibration source is empty; give a text file, a list of texts or token ids")
    first = None if isinstance(source, Mapping) else source[0]
    if isinstance(first, str) or (isinstance(first, list | tuple) and first and isinstance(first[0], Mapping)):
        if tokenizer is None:
            raise ValueError("text needs a tokenizer; give one, from load_tokenizer(directory), or token ids")
        return source, None
    return (), _checked_ids(source, tokenizer)


def _checked_ids(source: Sequence[int] | np.ndarray | Array, tokenizer: Tokenizer | None) -> Int[np.ndarray, " tokens"]:
    stream = np.asarray(source)
    if stream.ndim != 1 or not np.issubdtype(stream.dtype, np.integer):
        raise ValueError(
            f"token ids are {stream.dtype}{list(stream.shape)}; give integers in one stream, windows are cut from it, "
            "or a list of texts and of conversations, which are lists of messages"
        )
    if stream.min() < 0 or (tokenizer is not None and stream.max() >= tokenizer.get_vocab_size()):
        limit = "" if tokenizer is None else f" and below the vocabulary size, {tokenizer.get_vocab_size()}"
        raise ValueError(f"token ids lie in {stream.min()} .. {stream.max()}; they must be at least 0{limit}")
    return stream.astype(np.int32)
