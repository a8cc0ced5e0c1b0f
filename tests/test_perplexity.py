"""Perplexity and KL against plain NumPy float64 loops over windows of models with random logits."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq.calibration import bos_token, encode, gptq_windows, load_tokenizer
from jgptq.perplexity import compare, count_scored, perplexity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
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


def strided(ids, content, stride, bos):
    """(window, index of its first scored token), as Hugging Face's guide walks a text: each token is scored once."""
    found, scored_up_to = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + content, len(ids))
        found.append(([*bos, *ids[start:end]], max(scored_up_to - start, 1) + len(bos)))
        scored_up_to = end
        if end == len(ids):
            break
    return found


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


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("count", [45, 44, 9, 4])
def test_with_a_stride_only_what_is_new_is_scored(table, ids, count, stride, bos):
    prefix = [] if bos is None else [bos]
    losses = []
    for window, first in strided(ids[:count].tolist(), 7 - len(prefix), stride, prefix):
        scores = log_probabilities(table, window)
        losses += [-scores[i - 1, window[i]] for i in range(first, len(window))]
    options = {"seq_len": 7, "stride": stride, "bos_token_id": bos}
    assert len(losses) == count - 1 == count_scored(RunningSum(), ids[:count], **options)
    found = perplexity(RunningSum(), table, ids[:count], **options)
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_stride_of_the_whole_window_changes_nothing(table, ids):
    for bos, stride in ((None, 6), (3, 5)):
        options = {"seq_len": 6, "bos_token_id": bos}
        assert perplexity(RunningSum(), table, ids, stride=stride, **options) == perplexity(
            RunningSum(), table, ids, **options
        )


@pytest.mark.skipif(not DATA.is_dir(), reason="the small real models are not here")
def test_every_protocol_gives_pytorchs_figure_of_a_real_model():
    """Windows of 64 tokens read by transformers' model, and scored by PyTorch's cross entropy."""
    import torch
    import transformers

    from jgptq.checkpoints import load

    directory = DATA / "stories260K"
    text = (DATA / "tinystories_valid_nl.txt").read_text(encoding="utf-8")[:2200]  # 8 windows and more, one program
    tokenizer = load_tokenizer(directory)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model, params = load(directory, dtype=jnp.float32)

    def expected(windows):
        losses = []
        for window, first in windows:
            with torch.no_grad():
                logits = torch_model(torch.tensor([list(map(int, window))])).logits[0, first - 1 : -1].double()
            losses += torch.nn.functional.cross_entropy(logits, torch.tensor(window[first:]), reduction="none").tolist()
        return math.exp(np.mean(losses))

    bos, ids = bos_token(tokenizer), encode([text], tokenizer).tolist()
    found = perplexity(model, params, ids, seq_len=64, bos_token_id=bos)
    assert found == pytest.approx(expected([(window, 2) for window in reference_windows(ids, 63, [bos])]), rel=1e-4)
    found = perplexity(model, params, ids, seq_len=64, stride=20, bos_token_id=bos)
    assert found == pytest.approx(expected(strided(ids, 63, 20, [bos])), rel=1e-4)
    # The GPTQ paper's: transformers' own tokenization of the text as one, the mean of the windows' mean losses
    slow = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    whole = slow(text).input_ids
    windows = [whole[start : start + 64] for start in range(0, len(whole) // 64 * 64, 64)]
    paper = math.exp(np.mean([math.log(expected([(window, 1)])) for window in windows]))
    assert perplexity(model, params, gptq_windows([text], tokenizer, seq_len=64)) == pytest.approx(paper, rel=1e-4)


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


@pytest.mark.parametrize("stride", [None, 2])
def test_compare_equals_a_float64_loop(table, ids, stride):
    other = table + 0.3 * jax.random.normal(jax.random.key(1), table.shape)
    windows = strided(ids.tolist(), 5, stride or 5, [0])
    losses, reference_losses, divergences, agreements = [], [], [], []
    for window, first in windows:
        log_p, log_q = (log_probabilities(params, window)[first - 1 : -1] for params in (table, other))
        targets = (np.arange(len(window) - first), window[first:])
        losses += list(-log_q[targets])
        reference_losses += list(-log_p[targets])
        divergences += list((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        agreements += list(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    options = {"seq_len": 6, "stride": stride, "bos_token_id": 0}
    found = compare(RunningSum(), other, RunningSum(), table, ids, **options, batch_size=4)
    assert found.tokens == len(losses) == (len(ids) - len(windows) if stride is None else len(ids) - 1)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(np.mean(reference_losses)), rel=1e-5)
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
        ([1, 2, 3], {"stride": 0}, "stride=0; give between 1 and 8, what a window holds"),
        ([1, 2, 3], {"stride": 8, "bos_token_id": 0}, "stride=8; give between 1 and 7"),
        (np.ones((2, 4), int), {"stride": 2}, "stride=2, but windows were given"),
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
