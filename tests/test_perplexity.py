"""Perplexity and KL against plain NumPy float64 loops over windows of models with random logits."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.perplexity import compare, perplexity

VOCAB, CONTEXT = 11, 8


class RunningSum:
    """Logits are the sum of table rows of all tokens so far: they depend on the whole window and on nothing else."""

    def __init__(self, vocab_size: int = VOCAB):
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=CONTEXT)
        self.traces = 0

    def apply(self, params, tokens):
        self.traces += 1
        return jnp.cumsum(params[tokens], axis=1)


def log_probabilities(table, window):
    """float64 log-probabilities of the token after each position of a window."""
    logits = np.cumsum(np.asarray(table, np.float64)[window], axis=0)
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def reference_windows(ids, content, bos):
    return [[*bos, *ids[start : start + content]] for start in range(0, len(ids), content)]


def reference_perplexity(table, windows, first=1):
    """Perplexity of the tokens from index `first` of each window on, and how many they are."""
    losses = []
    for window in windows:
        scores = log_probabilities(table, window)
        losses += [-scores[i, window[i + 1]] for i in range(first - 1, len(window) - 1)]
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.fixture
def table():
    return jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, VOCAB, 45)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("count", [45, 42, 40, 8, 3])
def test_perplexity_equals_a_loop_over_windows_also_when_the_last_is_short(table, ids, count, bos):
    prefix = [] if bos is None else [bos]
    expected, _ = reference_perplexity(table, reference_windows(ids[:count], 7 - len(prefix), prefix), 1 + len(prefix))
    found = perplexity(RunningSum(), table, ids[:count], seq_len=7, bos_token_id=bos, batch_size=4)
    assert found == pytest.approx(expected, rel=1e-5)  # float32 logits


def test_windows_cut_already_count_as_rows(table, ids):
    windows = ids.reshape(9, 5)
    expected, _ = reference_perplexity(table, windows.tolist())
    assert perplexity(RunningSum(), table, windows) == pytest.approx(expected, rel=1e-5)
    with_bos, _ = reference_perplexity(table, [[3, *window] for window in windows.tolist()], first=2)
    assert perplexity(RunningSum(), table, windows, bos_token_id=3) == pytest.approx(with_bos, rel=1e-5)


def test_batch_size_changes_nothing_and_one_program_serves_all_batches(table, ids):
    found = set()
    for batch_size in (1, 2, 100):
        model = RunningSum()
        found.add(round(perplexity(model, table, ids, seq_len=6, batch_size=batch_size), 4))
        assert model.traces == 1
    assert len(found) == 1


def test_uniform_logits_have_a_perplexity_of_the_vocabulary_size(ids):
    assert perplexity(RunningSum(), jnp.zeros((VOCAB, VOCAB)), ids) == pytest.approx(VOCAB, rel=1e-6)


def test_broken_logits_show_as_nan_and_hopeless_ones_as_infinity():
    broken = jnp.zeros((VOCAB, VOCAB)).at[2].set(jnp.nan)
    assert math.isnan(perplexity(RunningSum(), broken, [1, 2, 3]))
    certain_of_zero = jnp.zeros((VOCAB, VOCAB)).at[:, 0].set(1e5)
    assert perplexity(RunningSum(), certain_of_zero, [1, 2, 3]) == math.inf


def test_compare_equals_a_float64_loop(table, ids):
    other = table + 0.3 * jax.random.normal(jax.random.key(1), table.shape)
    windows = reference_windows(ids, 5, [0])
    expected, count = reference_perplexity(other, windows, first=2)
    reference, _ = reference_perplexity(table, windows, first=2)
    divergences, agreements = [], []
    for window in windows:
        log_p, log_q = log_probabilities(table, window)[1:-1], log_probabilities(other, window)[1:-1]
        divergences += list((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        agreements += list(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    found = compare(RunningSum(), other, RunningSum(), table, ids, seq_len=6, bos_token_id=0, batch_size=4)
    assert found.tokens == count == len(ids) - len(windows)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.reference_perplexity == pytest.approx(reference, rel=1e-5)
    assert found.kl == pytest.approx(np.mean(divergences), rel=1e-4)  # differences of float32 log-probabilities
    assert found.top1_agreement == pytest.approx(np.mean(agreements))


def test_a_model_is_at_no_distance_from_itself(table, ids):
    model = RunningSum()
    found = compare(model, table, model, table, ids)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity == pytest.approx(perplexity(model, table, ids))


def test_a_token_that_the_reference_rules_out_adds_nothing(ids):
    table = jnp.zeros((VOCAB, VOCAB)).at[:, 0].set(-jnp.inf)
    assert compare(RunningSum(), jnp.zeros((VOCAB, VOCAB)), RunningSum(), table, ids).kl == pytest.approx(
        math.log(VOCAB / (VOCAB - 1)), rel=1e-5
    )


def test_progress_counts_windows_up_to_all_of_them(table, ids):
    calls = []
    perplexity(
        RunningSum(), table, ids, seq_len=5, batch_size=4, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "no tokens to evaluate"),
        ([1, VOCAB], {}, "lie in 1 .. 11, but the model's vocabulary is 0 .. 10"),
        ([1, -1], {}, "lie in -1 .. 1"),
        ([1, 2], {"bos_token_id": 99}, "lie in 1 .. 99"),
        (np.ones(4), {}, "give integers"),
        (np.ones((2, 2, 2), int), {}, r"int64\[2, 2, 2\]"),
        ([1, 2, 3], {"seq_len": 1}, "a window has 1 tokens; give between 2 and the model's context, 8"),
        ([1, 2, 3], {"seq_len": 9}, "a window has 9 tokens"),
        (np.ones((2, 8), int), {"bos_token_id": 0}, "a window has 9 tokens, BOS included"),
        ([1, 2, 3], {"seq_len": 2, "bos_token_id": 0}, "give between 3 and the model's context, 8"),
        (np.ones((2, 4), int), {"seq_len": 5}, "the windows given are 4 tokens long"),
        ([1], {}, "a single token has nothing before it"),
        ([1, 2], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input_is_named(table, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(RunningSum(), table, tokens, **options)


def test_models_of_different_vocabularies_are_not_compared(table, ids):
    with pytest.raises(ValueError, match=r"11 tokens in its vocabulary and the reference 12"):
        compare(RunningSum(), table, RunningSum(12), jnp.zeros((12, 12)), ids)
