"""Greedy generation against transformers' PyTorch model; laws of sampling on a model with known probabilities."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from jgptq.generate import TextStream, draw_token, generate

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB, CONTEXT = 7, 160


class Bigram:
    """The next token's logits are the row of a table that the last token points to."""

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=CONTEXT)
        self.traces = 0

    def prefill(self, params, tokens, lengths, capacity):
        self.traces += 1
        empty = jnp.zeros((len(tokens), capacity, 1, 1))
        return params[jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]], ((empty, empty),)

    def step(self, params, tokens, positions, cache):
        self.traces += 1
        return params[tokens], cache


@pytest.fixture
def table():
    return jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))


def test_greedy_follows_the_most_likely_token(table):
    expected = [2, 5]
    for _ in range(20):
        expected.append(int(np.argmax(table[expected[-1]])))
    assert generate(Bigram(), table, [2, 5], max_new_tokens=20).tolist() == expected


@pytest.mark.skipif(not DATA.is_dir(), reason="the small real models are not here")
@pytest.mark.parametrize("name", ["stories260K", "anton-charstories-gpt2", "tinystories-656k-as-qwen2"])
def test_greedy_equals_pytorch_on_real_models(name):
    """Prompts of unequal length together here, one by one there."""
    import torch
    import transformers

    from jgptq.checkpoints import load

    torch_model = transformers.AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32)
    model, params = load(DATA / name, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, length).tolist() for length in (7, 3, 12)]
    together = generate(model, params, prompts, max_new_tokens=20)
    for prompt, sequence in zip(prompts, together, strict=True):
        with torch.no_grad():
            expected = torch_model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert sequence.tolist() == expected[0].tolist()


def test_one_program_serves_prompts_of_similar_length(table):
    model = Bigram()
    for length in (3, 10, 20):
        generate(model, table, [1] * length, max_new_tokens=12)
    assert model.traces == 2  # one for prompts, one for tokens


def test_sequences_of_any_lengths_go_together(table):
    prompts = [[3], [1, 2, 5, 4], [6, 6]]
    together = generate(Bigram(), table, prompts, max_new_tokens=40)
    for prompt, sequence in zip(prompts, together, strict=True):
        assert sequence.tolist() == generate(Bigram(), table, prompt, max_new_tokens=40).tolist()
    cycle = jnp.eye(VOCAB)[(jnp.arange(VOCAB) + 1) % VOCAB]
    ended = generate(Bigram(), cycle, [[0], [5]], max_new_tokens=5, stop_token_ids=[1])
    assert [sequence.tolist() for sequence in ended] == [[0, 1], [5, 6, 0, 1]]


def test_tokens_are_told_as_they_come(table):
    seen = []
    cycle = jnp.eye(VOCAB)[(jnp.arange(VOCAB) + 1) % VOCAB]
    generate(
        Bigram(), cycle, [[0], [5]], max_new_tokens=5, stop_token_ids=[1], on_token=lambda t: seen.append(t.tolist())
    )
    assert seen == [[1, 6], [-1, 0], [-1, 1]]


def test_generation_ends_with_the_first_stop_token():
    cycle = jnp.eye(VOCAB)[(jnp.arange(VOCAB) + 1) % VOCAB]  # 0 1 2 3 4 5 6 0 1 ...
    assert generate(Bigram(), cycle, [0], stop_token_ids=[6, 3]).tolist() == [0, 1, 2, 3]
    assert generate(Bigram(), cycle, [3], max_new_tokens=2, stop_token_ids=[3]).tolist() == [3, 4, 5]


def test_the_context_can_be_filled_to_the_last_token(table):
    assert len(generate(Bigram(), table, [1] * 100, max_new_tokens=CONTEXT - 100)) == CONTEXT
    assert generate(Bigram(), table, [1, 2], max_new_tokens=0).tolist() == [1, 2]


def test_the_most_likely_token_alone_is_greedy(table):
    greedy = generate(Bigram(), table, [0], max_new_tokens=30).tolist()
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        key = jax.random.key(3)
        sampled = generate(Bigram(), table, [0], max_new_tokens=30, temperature=5.0, key=key, **options)
        assert sampled.tolist() == greedy


def test_a_key_fixes_the_sample_and_another_changes_it(table):
    sample = lambda seed: generate(Bigram(), table, [0], temperature=1.0, key=jax.random.key(seed)).tolist()  # noqa: E731
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, VOCAB, 1.0), (0.5, VOCAB, 1.0), (2.0, 3, 1.0), (1.0, VOCAB, 0.6), (1.0, 3, 0.7)],
)
def test_draws_have_the_frequencies_of_the_truncated_distribution(table, temperature, top_k, top_p):
    probabilities = np.exp(np.asarray(table[0], np.float64) / temperature)
    order = np.argsort(-probabilities)
    probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    kept = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
    probabilities[order[kept:]] = 0
    probabilities /= probabilities.sum()

    draws = 20_000
    options = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(jax.vmap(lambda key: draw_token(table[0], key, *options)))(keys)
    frequencies = np.bincount(np.asarray(tokens), minlength=VOCAB) / draws
    assert (frequencies[probabilities == 0] == 0).all()
    # five standard deviations of a frequency over 20,000 draws
    np.testing.assert_allclose(frequencies, probabilities, atol=5 * 0.5 / draws**0.5)


def tokenizer_of(pieces, decoder, special="<s>") -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([special])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Like Llama's: spaces in front of words, the first one dropped, bytes for what the vocabulary lacks."""
    pieces = ["▁a", "b", "▁", "▁▁", "é", "\ufffd", *(f"<0x{byte:02X}>" for byte in (0x41, 0x0A, *"€😀".encode()))]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer_of(pieces, decoders.Sequence(steps))


TOKENIZERS = {
    "sentencepiece": sentencepiece(),
    # GPT-2's letters for the bytes of é, € and 😀, one by one and two together
    "bytes": tokenizer_of(
        ["a", "Ġb", "Ċ", "Ã", "©", "â", "Ĥ", "¬", "ð", "Ł", "ĺ", "Ģ", "Ã©", "âĤ"], decoders.ByteLevel()
    ),
    "metaspace": tokenizer_of(["▁a", "b", "▁", "▁▁", "c▁"], decoders.Metaspace()),
    "word pieces": tokenizer_of(["a", "##b", ",", "!", "##!"], decoders.WordPiece()),
    "suffixes": tokenizer_of(["a", "b</w>", ",</w>", "c"], decoders.BPEDecoder()),
    "plain words": tokenizer_of(["a", "b", "c"], None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(data=st.data())
def test_pieces_of_text_join_to_the_decoded_whole(name, data):
    tokenizer = TOKENIZERS[name]
    tokens = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12)
    prompt, new = data.draw(tokens), data.draw(tokens)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in new]
    assert "".join([*pieces, stream.rest()]) == tokenizer.decode([*prompt, *new])


def test_text_comes_as_soon_as_it_is_certain():
    def pieces(name, *tokens):
        tokenizer = TOKENIZERS[name]
        stream = TextStream(tokenizer)
        return [stream.add(tokenizer.token_to_id(token)) for token in tokens] + [stream.rest()]

    assert pieces("bytes", "a", "Ġb", "âĤ", "¬", "<s>", "Ã", "a") == ["a", " b", "", "€", "", "", "\ufffda", ""]
    euro = ["<0xE2>", "<0x82>", "<0xAC>"]
    assert pieces("sentencepiece", "▁a", "▁a", *euro, "b") == ["a", " a", "", "", "", "€b", ""]
    # A bad byte spoils the good ones in front of it.
    assert pieces("sentencepiece", "<0x41>", "<s>", "<0xE2>", "b") == ["", "", "", "\ufffd\ufffdb", ""]
    assert pieces("sentencepiece", "b", "<0x0A>") == ["b", "", "\n"]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        (np.ones((1, 2, 1), int), {}, "one sequence of integers, or a list of such"),
        (np.ones(3), {}, "give prompt_ids as one sequence of integers"),
        ([1, VOCAB], {}, "the prompt has ids in 1 .. 7, but the model's vocabulary is 0 .. 6"),
        ([[1], [-1]], {}, "prompt 1 has ids in -1"),
        ([1] * 100, {"max_new_tokens": 61}, "exceed the model's context of 160; .* at most 60 new tokens"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([1], {"temperature": -1.0}, "temperature=-1.0; give 0 for greedy"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"temperature": 1.0}, r"give key=jax.random.key\(seed\)"),
        ([1], {"temperature": 1.0, "top_k": 0, "key": 0}, "top_k=0"),
        ([1], {"temperature": 1.0, "top_p": 0.0, "key": 0}, "top_p=0.0"),
        ([1], {"temperature": 1.0, "top_p": 1.5, "key": 0}, "top_p=1.5"),
        ([1], {"top_k": 5}, "temperature=0 draws none"),
    ],
)
def test_bad_input_is_named(table, prompt, options, message):
    if "key" in options:
        options = options | {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        generate(Bigram(), table, prompt, **options)
