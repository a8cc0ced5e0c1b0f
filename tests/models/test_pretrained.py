"""Small trained models, where they lie beside this repository: logits and perplexity are those of transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jgptq

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# (directory, length of a window, whether it begins with BOS)
MODELS = [("stories260K", 256, True), ("tinystories-656k-as-qwen2", 256, True), ("anton-charstories-gpt2", 32, False)]


def torch_perplexity(model, windows, scored_from):
    """exp of the mean negative log-likelihood of what follows the first `scored_from` tokens of every window."""
    with torch.no_grad():
        chances = torch.log_softmax(model(torch.tensor(windows).long()).logits.double(), dim=-1).numpy()
    rows, places = np.meshgrid(np.arange(len(windows)), np.arange(scored_from, windows.shape[1]), indexing="ij")
    return np.exp(-chances[rows, places - 1, windows[rows, places]].mean())


@pytest.mark.parametrize(("name", "length", "with_bos"), MODELS)
def test_logits_and_perplexity_equal_transformers(name, length, with_bos):
    directory, text = DATA / name, DATA / "tinystories_valid_nl.txt"
    if not (directory.is_dir() and text.is_file()):
        pytest.skip(f"shared/data/{name} and a text are not beside this repository")
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model, params = jgptq.load(directory)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    own = length - with_bos
    tokens = np.asarray(tokenizer.encode(text.read_text()[:20_000], add_special_tokens=False))[: 8 * own]
    windows = tokens[: len(tokens) // own * own].reshape(-1, own)
    bos = model.config.bos_token_id if with_bos else None
    rows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos) if with_bos else windows
    with torch.no_grad():
        expected = reference(torch.tensor(rows[:2]).long()).logits.numpy()
    # Float32 sums in another order; logits reach 20 here.
    np.testing.assert_allclose(jax.jit(model.apply)(params, jnp.asarray(rows[:2])), expected, atol=1e-4)
    ours = jgptq.perplexity(model, params, windows, seq_len=length, bos_token_id=bos)
    # The first token of the stream in a window is not scored.
    assert ours == pytest.approx(torch_perplexity(reference, rows, 1 + with_bos), rel=1e-5)
    assert 1 < ours < 40
