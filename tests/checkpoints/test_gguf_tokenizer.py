"""Tokenizers through GGUF's metadata: whole, and rebuilt from what other writers leave."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jgptq.checkpoints import gguf_file, gguf_tokenizer

TEXT = [
    "Once upon a time there was a dog. It's Tom's dog, and they'll PLAY!\n\n  In 1234567 days...",
    "naïve café über 東京 😀 \t tabs\r\nand ends ",
    " a leading space, <|end|> and a control token",
]
CORPUS = [*TEXT, "the dog and the cat and the time and the day, " * 20, "there they then them these those " * 20]
KEYS = "tokenizer.ggml."


def byte_level(split):
    """As the tokenizer.json of Qwen2, Llama 3 (which cut by a regular expression) and GPT-2 (None)."""
    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        cut = pre_tokenizers.Split(Regex(gguf_tokenizer.SPLITS[split]), behavior="isolated")
        own = pre_tokenizers.Sequence([cut, own])
    tokenizer.pre_tokenizer = own
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    if split == "llama-bpe":
        begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return tokenizer


def sentencepiece():
    """As the tokenizer.json of Llama 2: bytes for what is unknown, spaces as ▁ and one in front."""
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    learned.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = learned.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


MADE = {
    "gpt-2": lambda: byte_level(None),
    "qwen2": lambda: byte_level("qwen2"),
    "llama-bpe": lambda: byte_level("llama-bpe"),
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module", params=MADE)
def saved(request, tmp_path_factory):
    """(name, tokenizer, its directory)"""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = MADE[request.param]()
    tokenizer.save(str(directory / "tokenizer.json"))
    return request.param, tokenizer, directory


def write(file, metadata):
    gguf_file.write_file(file, metadata, {}, [])
    return file


def test_comes_back_whole(saved, tmp_path):
    _, tokenizer, directory = saved
    metadata = gguf_tokenizer.describe(directory, tokenizer.get_vocab_size())
    again = gguf_tokenizer.read_tokenizer(write(tmp_path / "model.gguf", metadata))
    assert again.to_str() == tokenizer.to_str()


def test_is_rebuilt_from_what_others_write(saved, tmp_path):
    name, tokenizer, directory = saved
    metadata = gguf_tokenizer.describe(directory, tokenizer.get_vocab_size() + 3)
    del metadata[gguf_tokenizer.WHOLE]
    begin = "<s>" if name == "sentencepiece" else "<|begin|>"
    metadata[f"{KEYS}bos_token_id"] = tokenizer.token_to_id(begin)
    assert metadata[f"{KEYS}model"] == ("llama" if name == "sentencepiece" else "gpt2")
    assert metadata[f"{KEYS}pre"] == {"sentencepiece": "default"}.get(name, name)
    assert metadata[f"{KEYS}tokens"][-1] == f"[PAD{tokenizer.get_vocab_size() + 2}]"
    assert metadata[f"{KEYS}add_bos_token"] == (name in ("llama-bpe", "sentencepiece"))
    again = gguf_tokenizer.read_tokenizer(write(tmp_path / "model.gguf", metadata))
    for text in TEXT:
        assert again.encode(text).ids == tokenizer.encode(text).ids
        ids = tokenizer.encode(text).ids
        assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it(saved, tmp_path):
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    name, tokenizer, directory = saved
    metadata = {"general.architecture": "llama", **gguf_tokenizer.describe(directory, tokenizer.get_vocab_size())}
    architecture, fields, _ = get_gguf_tokenizer(str(write(tmp_path / "model.gguf", metadata)))
    theirs, _ = convert_gguf_tokenizer(architecture, fields)
    for text in TEXT[: 2 if name == "sentencepiece" else 3]:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text, add_special_tokens=False).ids == expected


def test_another_files_tokenizer_is_taken_over(saved, tmp_path):
    _, tokenizer, directory = saved
    metadata = gguf_tokenizer.describe(directory, tokenizer.get_vocab_size())
    first = write(tmp_path / "model.gguf", metadata | {f"{KEYS}eos_token_id": 2, "llama.block_count": 1})
    taken = gguf_tokenizer.describe(first, tokenizer.get_vocab_size())
    assert list(taken) == list(metadata)
    again = gguf_tokenizer.read_tokenizer(write(tmp_path / "again.gguf", taken))
    assert again.to_str() == tokenizer.to_str()


def test_chat_template_goes_along(tmp_path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert gguf_tokenizer.describe(tmp_path, 500)["tokenizer.chat_template"] == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert gguf_tokenizer.describe(tmp_path, 500)["tokenizer.chat_template"] == "{{ other }}"


def test_gemmas_merges_follow_the_order_of_tokens(tmp_path):
    """Whatever their scores; and its runs of spaces are spelled with spaces."""
    tokens = ["a", "b", "c", "▁", "bc", "ab", "  "]
    scores = np.array([0, 0, 0, 0, -9, -1, 0], np.float32)
    metadata = {f"{KEYS}model": "llama", f"{KEYS}tokens": tokens, f"{KEYS}scores": scores}
    metadata |= {f"{KEYS}add_space_prefix": False}
    ids = {}
    for architecture in ("llama", "gemma3"):
        file = write(tmp_path / f"{architecture}.gguf", metadata | {"general.architecture": architecture})
        ids[architecture] = gguf_tokenizer.read_tokenizer(file).encode("abc  a").ids
    assert ids == {"llama": [5, 2, 3, 3, 0], "gemma3": [0, 4, 6, 0]}


def unigram():
    return Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))


def characters():
    return Tokenizer(models.BPE({"a": 0, "b": 1}, []))


@pytest.mark.parametrize(
    ("make", "vocab_size", "message"),
    [
        (None, 2, "no tokenizer.json"),
        (unigram, 2, "it is a Unigram"),
        (characters, 2, "of neither bytes nor SentencePiece"),
        (characters, 1, "2 tokens, more than the model's 1"),
    ],
)
def test_what_gguf_has_no_word_for_is_said(make, vocab_size, message, tmp_path):
    if make is not None:
        make().save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match=message):
        metadata = gguf_tokenizer.describe(tmp_path, vocab_size)
    assert metadata[f"{KEYS}model"] == "none"
    file = write(tmp_path / "model.gguf", metadata)
    if make is None:
        with pytest.raises(ValueError, match=r"its tokenizer is 'none'; 'gpt2' and 'llama' are read; pass token ids"):
            gguf_tokenizer.read_tokenizer(file)
    else:  # It is kept whole nevertheless.
        assert gguf_tokenizer.read_tokenizer(file).to_str() == make().to_str()


def test_a_broken_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        gguf_tokenizer.describe(tmp_path, 2)


PIECES = {f"{KEYS}model": "llama", f"{KEYS}tokens": ["a", "b", "ab"]}
BYTES = {f"{KEYS}model": "gpt2", f"{KEYS}tokens": ["a", "b", "ab"], f"{KEYS}merges": ["a b"]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "its tokenizer is None"),
        ({f"{KEYS}model": "bert"}, "its tokenizer is 'bert'"),
        ({f"{KEYS}model": "llama"}, "has no tokenizer.ggml.tokens"),
        (PIECES | {f"{KEYS}tokens": np.arange(3, dtype=np.int32)}, "they are not strings"),
        (PIECES | {f"{KEYS}tokens": ["a", "a"]}, "a token twice"),
        (PIECES | {f"{KEYS}tokens": ["a", "b" * 2000]}, "a token of 2000 characters"),
        (PIECES | {f"{KEYS}scores": np.zeros(2, np.float32)}, "scores is not a number for each of its 3 tokens"),
        (PIECES | {f"{KEYS}token_type": ["a", "b", "c"]}, "token_type is not a number for each"),
        (BYTES | {f"{KEYS}merges": ["a b b"]}, "one that is not of two tokens"),
        (BYTES | {f"{KEYS}merges": ["a c"]}, "no tokenizer that the tokenizers package reads"),
        (BYTES | {f"{KEYS}pre": "unheard-of"}, "cuts text by the rule 'unheard-of'"),
        ({gguf_tokenizer.WHOLE: "{}"}, "no tokenizer that the tokenizers package reads"),
    ],
)
def test_damage_is_one_clear_error(metadata, message, tmp_path):
    file = write(tmp_path / "model.gguf", metadata)
    with pytest.raises(ValueError, match=r"model\.gguf") as caught:
        gguf_tokenizer.read_tokenizer(file)
    assert message in str(caught.value)
