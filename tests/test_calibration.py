"""Calibration windows: what they contain, that they repeat, and what is said about sources that cannot be used."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jgptq.calibration import batches, bos_token, encode, gptq_windows, load_tokenizer, read_documents
from jgptq.chat import ChatTemplate

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [f"w{index}" for index in range(40)]


def word_tokenizer(*, bos: bool, marker: bool = False, newline: bool = False) -> Tokenizer:
    """One token a word; ids 0 .. 39 are w0 .. w39, 40 is unknown, then <s> and what else is asked for."""
    names = [*WORDS, "?", "<s>", *(["<|endoftext|>"] if marker else []), *(["\n"] if newline else [])]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 41)])
    return tokenizer


CHAT = ChatTemplate(
    source="{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %} <s>",
    special_tokens={"bos_token": "<s>"},
    file=Path("chat_template.jinja"),
)


def text(first: int, last: int) -> str:
    return " ".join(WORDS[first:last])


def windows_of(found) -> np.ndarray:
    return np.concatenate([np.asarray(tokens) for (tokens,) in found])


def test_bos_is_what_the_tokenizer_puts_in_front_of_a_text():
    assert bos_token(word_tokenizer(bos=True)) == 41
    assert bos_token(word_tokenizer(bos=False)) is None


def test_documents_are_separated_by_the_marker_or_bos_or_a_newline_and_never_by_the_marker_as_text():
    story = "w0 w1\n<|endoftext|>\nw2"
    assert encode([story], word_tokenizer(bos=True, marker=True)).tolist() == [0, 1, 42, 2]
    assert encode([story], word_tokenizer(bos=True)).tolist() == [0, 1, 41, 2]
    assert encode([story], word_tokenizer(bos=False, newline=True)).tolist() == [0, 1, 42, 2]
    assert encode(["w0 w1", "w2"], word_tokenizer(bos=True)).tolist() == [0, 1, 41, 2]
    assert encode([], word_tokenizer(bos=True)).tolist() == []


def test_a_conversation_is_what_its_template_makes_of_it_and_a_text_the_users_message():
    tokenizer = word_tokenizer(bos=True)
    conversation = [{"role": "w30", "content": "w1"}, {"role": "w31", "content": "w2 <|endoftext|> w3"}]
    # 40 is a word that the vocabulary does not have: `user`, and the marker, at which a conversation is not cut.
    # The template's own BOS at the ends is not doubled by the separator.
    expected = [30, 1, 31, 2, 40, 3, 41, 40, 4, 41, 40, 5]
    assert encode([conversation, "w4<|endoftext|>w5"], tokenizer, CHAT).tolist() == expected
    found = batches([conversation] * 9, tokenizer, samples=2, seq_len=8, chat_template=CHAT)
    assert set(windows_of(found).ravel().tolist()) == {41, 30, 1, 31, 2, 40, 3}


def test_a_conversation_that_cannot_be_encoded_is_named():
    conversation = [{"role": "w1", "content": "w2"}]
    with pytest.raises(
        ValueError, match=r"document 2 \(of a JSONL file: line 2\): a conversation needs .*--chat-template"
    ):
        encode(["w1", conversation], word_tokenizer(bos=True))
    broken = [{"role": "w1", "content": "\ud800"}]
    with pytest.raises(ValueError, match=r"document 1 .*surrogates not allowed"):
        encode([broken], word_tokenizer(bos=True), CHAT)
    refusing = ChatTemplate(source="{{ raise_exception('No w2') }}", special_tokens={}, file=Path("file"))
    with pytest.raises(ValueError, match=r"document 1 .*: the chat template file failed: No w2"):
        batches([conversation], word_tokenizer(bos=True), samples=1, seq_len=4, chat_template=refusing)


def test_a_single_text_is_no_list_of_documents():
    with pytest.raises(ValueError, match=r"documents is one text, .*; give \[text\]"):
        encode("w1 w2", word_tokenizer(bos=True))


def test_the_day_does_not_change_the_batches():
    dated = ChatTemplate(source="{{ strftime_now('%Y %m %d') }}", special_tokens={}, file=Path("file"))
    tokenizer = word_tokenizer(bos=False)
    tokenizer.add_tokens(["2024 07 26"])
    assert encode(["w1"], tokenizer, dated).tolist() == [42]


def test_without_packing_a_window_is_a_piece_of_one_document_that_is_long_enough():
    documents = [text(0, 4), text(0, 10), text(20, 30), text(30, 34), text(35, 40)]
    tokenizer = word_tokenizer(bos=True)
    found = windows_of(batches(documents, tokenizer, samples=60, seq_len=6, pack=False))
    assert (found[:, 0] == 41).all()
    assert (np.diff(found[:, 1:], axis=1) == 1).all()
    starts = [*range(6), *range(20, 26), 35]
    assert sorted(set(found[:, 1].tolist())) == starts
    again = windows_of(batches(documents, tokenizer, samples=60, seq_len=6, pack=False))
    assert again.tolist() == found.tolist()
    other = windows_of(batches(documents, tokenizer, samples=60, seq_len=6, pack=False, seed=1))
    assert other.tolist() != found.tolist()
    ids = windows_of(batches(range(100, 110), samples=40, seq_len=8, pack=False))
    assert sorted(set(ids[:, 0].tolist())) == [100, 101, 102]
    with pytest.raises(ValueError, match=r"no document .* has the 11 tokens that a window of seq_len=12 needs"):
        batches(documents, tokenizer, samples=1, seq_len=12, pack=False)


def test_gptq_windows_are_the_text_as_one_without_what_does_not_fill_the_last(tmp_path):
    tokenizer = word_tokenizer(bos=True, newline=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # a token for each line and each newline
    rows = ["", "w1\n", "w2\n", "w3\n"]  # as WikiText's rows end
    ids = [41, 42, 42, 1, 42, 42, 42, 2, 42, 42, 42, 3, 42]
    (tmp_path / "rows.txt").write_text("\n\n".join(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    for source in (rows, tmp_path / "rows.txt", tmp_path / "rows.jsonl"):
        assert gptq_windows(source, tokenizer, seq_len=5).tolist() == [ids[:5], ids[5:10]]
    with pytest.raises(ValueError, match="the text has 13 tokens, too few for one window of 14"):
        gptq_windows(rows, tokenizer, seq_len=14)
    with pytest.raises(ValueError, match="seq_len=0; give an integer of at least 2"):
        gptq_windows(rows, tokenizer, seq_len=0)


def test_windows_are_bos_and_distinct_pieces_of_the_stream():
    found = batches([text(0, 40)], word_tokenizer(bos=True), samples=8, seq_len=6, batch_size=4)
    assert [tokens.shape for (tokens,) in found] == [(4, 6), (4, 6)]
    assert all(tokens.dtype == jnp.int32 for (tokens,) in found)
    windows = windows_of(found)
    assert (windows[:, 0] == 41).all()
    assert sorted(windows[:, 1:].ravel().tolist()) == list(range(40))
    assert (np.diff(windows[:, 1:], axis=1) == 1).all()


def test_no_bos_is_put_where_the_tokenizer_puts_none_or_ids_come_without_tokenizer():
    for source, tokenizer in (([text(0, 40)], word_tokenizer(bos=False)), (np.arange(40), None)):
        windows = windows_of(batches(source, tokenizer, samples=8, seq_len=5))
        assert sorted(windows.ravel().tolist()) == list(range(40))


def test_a_seed_fixes_the_windows_and_another_changes_them():
    ids = list(range(1000))
    draw = lambda seed: windows_of(batches(ids, samples=10, seq_len=10, seed=seed)).tolist()  # noqa: E731
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(("samples", "sizes"), [(16, [8, 8]), (10, [5, 5]), (7, [7]), (11, [1] * 11)])
def test_all_batches_have_one_size(samples, sizes):
    found = batches(range(100), samples=samples, seq_len=4)
    assert [tokens.shape[0] for (tokens,) in found] == sizes


def test_a_file_and_its_documents_give_the_same_batches(tmp_path):
    tokenizer = word_tokenizer(bos=True)
    documents = [text(0, 15), text(20, 35)]
    (tmp_path / "calibration.txt").write_text("\n<|endoftext|>\n".join(documents))
    from_file = batches(tmp_path / "calibration.txt", tokenizer, samples=3, seq_len=8)
    from_documents = batches(documents, tokenizer, samples=3, seq_len=8)
    assert windows_of(from_file).tolist() == windows_of(from_documents).tolist()


@pytest.mark.skipif(not DATA.is_dir(), reason="the small real models are not here")
def test_stories_are_cut_into_windows_with_their_bos_between_and_in_front():
    tokenizer = load_tokenizer(DATA / "stories260K")
    documents = read_documents(DATA / "tinystories_train_stories.txt")
    found = batches(documents[:100], tokenizer, samples=32, seq_len=256)
    windows = windows_of(found)
    assert windows.shape == (32, 256)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:] == 1).any()
    assert "endoftext" not in tokenizer.decode(windows.ravel().tolist())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "the calibration source is empty"),
        (["  \n"], {}, "has 0 tokens, but one window of seq_len=6 needs 5"),
        ([text(0, 4)], {}, "has 4 tokens, but one window"),
        ([text(0, 40)], {"samples": 9}, "make 8 windows of seq_len=6, but samples=9; .* at most 8 samples"),
        (np.array([1.5, 2.5]), {}, "token ids are float64"),
        (np.ones((4, 4), int), {}, r"token ids are int64\[4, 4\]; .* or a list of texts and of conversations"),
        ([1, 42], {}, "lie in 1 .. 42; they must be at least 0 and below the vocabulary size, 42"),
        (np.arange(-1, 30), {}, "lie in -1 .. 29"),
        ([text(0, 40)], {"samples": 0}, "samples=0"),
        ([text(0, 40)], {"seq_len": 1}, "seq_len=1; give an integer of at least 2"),
        ([text(0, 40)], {"batch_size": 0}, "batch_size=0"),
        (range(40), {"chat_template": CHAT}, "token ids take no chat template"),
    ],
)
def test_bad_sources_are_named(source, options, message):
    with pytest.raises(ValueError, match=message):
        batches(source, word_tokenizer(bos=True), **({"samples": 2, "seq_len": 6} | options))


def test_text_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        batches(["some text"], samples=1, seq_len=4)


def test_a_directory_without_a_readable_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
