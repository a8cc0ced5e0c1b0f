"""From text to calibration batches: windows of a token stream, all of one shape.

Documents are separated where a text says `<|endoftext|>`. In the token stream the separator is that marker if the
vocabulary has it, else the token that the tokenizer puts in front of a text (BOS), else a newline. A tokenizer that
puts BOS in front of a text also gets it in front of every window: models trained so read windows without it badly.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer

DOCUMENT_SEPARATOR = "<|endoftext|>"


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory, from its tokenizer.json; ValueError if there is none."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json; save one there with transformers' "
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


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 text file, those that hold more than white space.

    Raises ValueError if there is no such file, it is not UTF-8 or holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it, with iconv for example") from error
    documents = split_documents(text)
    if not documents:
        raise ValueError(f"{path} holds no text; give a file with some")
    return documents


def split_documents(text: str) -> list[str]:
    """`text` cut at every `<|endoftext|>`, without the newlines around it and without blank documents."""
    documents = [document.strip("\r\n") for document in text.split(DOCUMENT_SEPARATOR)]
    return [document for document in documents if document.strip()]


def encode(documents: Sequence[str], tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
    """One stream of token ids, int32, with a separator between documents (see above) and none at either end.

    Each document may hold several, separated by `<|endoftext|>`. Nothing to encode gives an empty stream.
    """
    parts = [part for document in documents for part in split_documents(document)]
    encodings = tokenizer.encode_batch(parts, add_special_tokens=False)
    separator = _separator(tokenizer)
    stream = [np.concatenate([separator, np.asarray(encoding.ids, np.int32)]) for encoding in encodings]
    return np.concatenate(stream)[len(separator) :] if stream else np.zeros(0, np.int32)


def batches(
    source: str | Path | Sequence[str] | Sequence[int] | np.ndarray | Array,
    tokenizer: Tokenizer | None = None,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    batch_size: int = 8,
) -> list[tuple[Int[Array, "batch {seq_len}"]]]:
    """`samples` windows of `seq_len` tokens, drawn at random without overlap: what `quantize` takes as its batches.

    source: the path of a text file, a list of texts, or token ids in one stream.
    tokenizer: needed for text. With one that puts BOS in front of a text, a window is BOS and seq_len - 1 tokens.
    seed: which windows are drawn, and their order. The same arguments give the same batches on any machine.
    batch_size: windows a batch, at most. All batches have one size, the largest up to this that divides `samples`.
    Raises ValueError for a source that is missing or too short for so many windows.
    """
    for name, value, least in (("samples", samples, 1), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}={value}; give an integer of at least {least}")
    stream = _token_stream(source, tokenizer)
    bos = None if tokenizer is None else bos_token(tokenizer)
    content = seq_len - (bos is not None)
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
    chosen = np.random.default_rng(seed).permutation(count)[:samples]
    windows = stream[: count * content].reshape(count, content)[chosen]
    if bos is not None:
        windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)
    size = max(size for size in range(1, min(batch_size, samples) + 1) if samples % size == 0)
    return [(jnp.asarray(windows[start : start + size]),) for start in range(0, samples, size)]


def _separator(tokenizer: Tokenizer) -> Int[np.ndarray, " tokens"]:
    """What stands between two documents."""
    for token in (tokenizer.token_to_id(DOCUMENT_SEPARATOR), bos_token(tokenizer)):
        if token is not None:
            return np.asarray([token], np.int32)
    return np.asarray(tokenizer.encode("\n", add_special_tokens=False).ids, np.int32)


def _token_stream(
    source: str | Path | Sequence[str] | Sequence[int] | np.ndarray | Array, tokenizer: Tokenizer | None
) -> Int[np.ndarray, " tokens"]:
    if isinstance(source, str | Path):
        source = read_documents(source)
    if len(source) == 0:
        raise ValueError("the calibration source is empty; give a text file, a list of texts or token ids")
    if isinstance(source[0], str):
        if tokenizer is None:
            raise ValueError("text needs a tokenizer; give one, from load_tokenizer(directory), or token ids")
        return encode(source, tokenizer)
    stream = np.asarray(source)
    if stream.ndim != 1 or not np.issubdtype(stream.dtype, np.integer):
        raise ValueError(
            f"token ids are {stream.dtype}{list(stream.shape)}; give integers in one stream, windows are cut from it"
        )
    if stream.min() < 0 or (tokenizer is not None and stream.max() >= tokenizer.get_vocab_size()):
        limit = "" if tokenizer is None else f" and below the vocabulary size, {tokenizer.get_vocab_size()}"
        raise ValueError(f"token ids lie in {stream.min()} .. {stream.max()}; they must be at least 0{limit}")
    return stream.astype(np.int32)
