"""Tokenizers in GGUF's metadata: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

A file written here also holds the whole tokenizer.json, under the key that GGUF has for it, and is read back by that.
From another's file the tokenizer is built of its tokens, merges or scores, and flags.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jgptq.checkpoints import gguf_file

PREFIX = "tokenizer."
WHOLE = "tokenizer.huggingface.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
MAX_PIECE = 1024  # characters of a token whose merges are looked for
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS_AND_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merging, by llama.cpp's name: the same as in the tokenizer.json of these models.
SPLITS = {
    "llama-bpe": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + WORDS_AND_MARKS,
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + WORDS_AND_MARKS,
}
SAME_SPLIT = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "dbrx": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
GPT2_SPLIT = ("gpt-2", "default")  # the rule that ByteLevel has of its own


def describe(source: str | Path | None, vocab_size: int) -> dict[str, Any]:
    """The metadata of the tokenizer of a directory or of another GGUF file.

    A UserWarning says what GGUF has no word for; such a file has the tokenizer "none".
    """
    if source is not None and Path(source).is_file():
        metadata = gguf_file.read_file(Path(source)).metadata
        # The tokens of the model are in its config, and may have been changed there.
        ids = tuple(f"{PREFIX}ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom"))
        return {key: value for key, value in metadata.items() if key.startswith(PREFIX) and key not in ids}
    file = None if source is None else Path(source) / "tokenizer.json"
    if file is None or not file.is_file():
        return _without("there is no tokenizer.json", {})
    text = file.read_text(encoding="utf-8")
    try:
        tokenizer, content = Tokenizer.from_str(text), json.loads(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file} is not a tokenizer that the tokenizers package reads: {error}") from error
    whole = {WHOLE: text, **_chat_template(Path(source))}
    if tokenizer.get_vocab_size() > vocab_size:
        return _without(f"it has {tokenizer.get_vocab_size()} tokens, more than the model's {vocab_size}", whole)
    model = content["model"]
    if model.get("type") != "BPE":
        return _without(f"it is a {model.get('type')}", whole)
    byte_level = "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    if not byte_level and not model.get("byte_fallback"):
        return _without("it is a BPE of neither bytes nor SentencePiece", whole)
    tokens, kinds = _tokens(content, vocab_size)
    if len(set(tokens)) < len(tokens):
        return _without("two of its tokens are spelled alike", whole)
    own = _byte_level(content) if byte_level else _sentencepiece(content, tokens)
    lists = {f"{PREFIX}ggml.tokens": tokens, f"{PREFIX}ggml.token_type": np.array(kinds, np.int32)}
    return {**own, **lists, **_flags(content, tokenizer), **whole}


def _without(reason: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    warnings.warn(f"the GGUF file has no tokenizer that llama.cpp reads: {reason}", stacklevel=4)
    return {f"{PREFIX}ggml.model": "none", **kept}


def _chat_template(directory: Path) -> dict[str, str]:
    if (directory / "chat_template.jinja").is_file():
        return {f"{PREFIX}chat_template": (directory / "chat_template.jinja").read_text(encoding="utf-8")}
    if not (directory / "tokenizer_config.json").is_file():
        return {}
    template = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    return {f"{PREFIX}chat_template": template} if isinstance(template, str) else {}


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    cuts = [part.get("pattern", {}) for part in _parts(content.get("pre_tokenizer"))]
    patterns = [cut["Regex"] for cut in cuts if "Regex" in cut]
    known = [name for name, pattern in SPLITS.items() if patterns == [pattern]]
    if patterns and not known:
        warnings.warn(
            "llama.cpp has no name here for how this tokenizer cuts text before merging; the GGUF file says 'default'",
            stacklevel=5,
        )
    return {
        f"{PREFIX}ggml.model": "gpt2",
        f"{PREFIX}ggml.pre": known[0] if known else "default" if patterns else "gpt-2",
        f"{PREFIX}ggml.merges": [_merge(merge) for merge in content["model"]["merges"]],
    }


def _parts(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A component of tokenizer.json, or those of a sequence."""
    if component is None:
        return []
    for name in ("pretokenizers", "normalizers", "decoders", "processors"):
        if name in component:
            return component[name]
    return [component]


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _sentencepiece(content: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The score of a token is minus the rank of its first merge, which is how SentencePiece numbers its own."""
    pieces = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pieces):
        ranks.setdefault(left + right, rank)
    prepends = any(part.get("type") == "Prepend" for part in _parts(content.get("normalizer")))
    metaspace = any(part.get("prepend_scheme") in ("first", "always") for part in _parts(content.get("pre_tokenizer")))
    return {
        f"{PREFIX}ggml.model": "llama",
        f"{PREFIX}ggml.pre": "default",
        f"{PREFIX}ggml.scores": np.array([-ranks.get(token, len(pieces)) for token in tokens], np.float32),
        f"{PREFIX}ggml.add_space_prefix": prepends or metaspace,
    }


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Spelling and kind of every token; what the tokenizer lacks of the model's vocabulary is unused."""
    spelled = {number: token for token, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    spelled |= {number: token["content"] for number, token in added.items()}
    unknown = content["model"].get("unk_token")
    tokens = [spelled.get(number, f"[PAD{number}]") for number in range(vocab_size)]

    def kind(number: int) -> int:
        if number not in spelled:
            return UNUSED
        if tokens[number] == unknown:
            return UNKNOWN
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return NORMAL if _byte_of(tokens[number]) is None else BYTE

    return tokens, [kind(number) for number in range(vocab_size)]


def _byte_of(token: str) -> int | None:
    """65 for "<0x41>", SentencePiece's token of a byte."""
    found = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return None if found is None else int(found[1], 16)


def _flags(content: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    encoding = tokenizer.encode("a")
    special = encoding.special_tokens_mask
    flags: dict[str, Any] = {
        f"{PREFIX}ggml.add_bos_token": special[:1] == [1],
        f"{PREFIX}ggml.add_eos_token": special[-1:] == [1],
    }
    unknown = content["model"].get("unk_token")
    if unknown is not None and tokenizer.token_to_id(unknown) is not None:
        flags[f"{PREFIX}ggml.unknown_token_id"] = tokenizer.token_to_id(unknown)
    return flags


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file; ValueError for a file that has none, or one of a kind that is not read."""
    path = Path(path)
    metadata = gguf_file.read_file(path).metadata
    try:
        return _build(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; pass token ids, or a directory with its tokenizer.json") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} has no tokenizer that the tokenizers package reads: {error}") from error


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    if isinstance(metadata.get(WHOLE), str):
        return Tokenizer.from_str(metadata[WHOLE])
    kind = metadata.get(f"{PREFIX}ggml.model")
    tokens = _strings(metadata, "tokens") if kind in ("gpt2", "llama") else []
    if kind == "gpt2":
        tokenizer = _build_byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _build_sentencepiece(metadata, tokens)
    else:
        raise ValueError(f"its tokenizer is {kind!r}; 'gpt2' and 'llama' are read")
    kinds = _numbers(metadata, "token_type", len(tokens))
    if kinds is not None:
        for names, add in (((CONTROL, UNKNOWN), tokenizer.add_special_tokens), ((USER_DEFINED,), tokenizer.add_tokens)):
            chosen = np.flatnonzero(np.isin(kinds, names))
            add([AddedToken(tokens[number], normalized=False) for number in chosen])
    _add_ends(tokenizer, metadata, tokens, kind)
    return tokenizer


def _build_byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("tokenizer.ggml.merges has one that is not of two tokens")
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(tokens), merges=merges))
    name = metadata.get(f"{PREFIX}ggml.pre", "default")
    name = SAME_SPLIT.get(name, name) if isinstance(name, str) else "default"
    if name in SPLITS:
        cut = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, own])
    elif name in GPT2_SPLIT:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise ValueError(f"its tokenizer cuts text by the rule {name!r}; {[*SPLITS, *GPT2_SPLIT]} are read")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = _numbers(metadata, "scores", len(tokens))
    if str(metadata.get("general.architecture")).startswith("gemma"):
        # Its merges are in the order of the tokens, not of their scores, and its runs of spaces are respelled.
        tokens, scores = [SPACE * len(token) if set(token) == {" "} else token for token in tokens], None
    vocabulary = _vocabulary(tokens)
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(tokens, vocabulary, scores),
        unk_token=_token(metadata, "unknown", tokens),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get(f"{PREFIX}ggml.add_space_prefix", True) is not False
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _merges(tokens: list[str], vocabulary: Mapping[str, int], scores: np.ndarray | None) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: SentencePiece's merges, which it does not store.

    Where scores are equal, as some writers leave them, tokens are in order.
    """
    found = []
    for number, token in enumerate(tokens):
        if len(token) > MAX_PIECE:
            raise ValueError(f"its tokenizer has a token of {len(token)} characters; {MAX_PIECE} are allowed")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                score = 0.0 if scores is None else float(scores[number])
                found.append((-score, number, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    return vocabulary


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], kind: str) -> None:
    """BOS in front of a text and EOS behind it, where the file asks for them."""
    # llama.cpp adds BOS to a SentencePiece vocabulary that does not say otherwise.
    asked = {f"{PREFIX}ggml.add_bos_token": kind == "llama"} | dict(metadata)
    wanted = [name for name in ("bos", "eos") if asked.get(f"{PREFIX}ggml.add_{name}_token") is True]
    ends = {name: _token(metadata, name, tokens) for name in wanted}
    ends = {name: token for name, token in ends.items() if token is not None}
    if ends:
        whole = [*([ends["bos"]] if "bos" in ends else []), "$A", *([ends["eos"]] if "eos" in ends else [])]
        special = {token: tokenizer.token_to_id(token) for token in ends.values()}
        tokenizer.post_processor = processors.TemplateProcessing(single=whole, special_tokens=list(special.items()))


def _token(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    number = metadata.get(f"{PREFIX}ggml.{name}_token_id")
    return tokens[number] if type(number) is int and 0 <= number < len(tokens) else None


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(f"{PREFIX}ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"it has no tokenizer.ggml.{name}, or they are not strings")
    return value


def _numbers(metadata: Mapping[str, Any], name: str, count: int) -> np.ndarray | None:
    value = metadata.get(f"{PREFIX}ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise ValueError(f"tokenizer.ggml.{name} is not a number for each of its {count} tokens")
    return value
