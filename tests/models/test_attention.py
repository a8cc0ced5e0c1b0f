"""Attention in parts, as a CPU has it for long sequences: it is the same, takes less memory, and lets scales fold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_against_transformers import CASES, TOLERANCE, random_tokens, torch_logits, torch_model

from jgptq import AWQ, RTN, Grid, checkpoints, quantize
from jgptq.models import MODELS, LanguageModel, attention

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def parts(monkeypatch):
    """Every pass over several tokens is in parts of one head and few queries."""
    for name, number in {"LARGE": 1, "PART": 1, "QUERIES": 5}.items():
        monkeypatch.setattr(attention, name, number)


def llama(**sizes):
    model = LanguageModel(architecture=MODELS["llama"], config=MODELS["llama"].parse_config(SIZES | sizes))
    return model, model.init(jax.random.key(0))


def scans(f, *arguments):
    return str(jax.make_jaxpr(lambda *given: f(*given))(*arguments)).count("scan[")


# Linear biases; soft caps and windows; groups of heads; windows alone.
@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "llama", "mistral"])
def test_logits_in_parts_equal_transformers(model_type, parts, tmp_path):
    variant = next(iter(CASES[model_type][1]))
    reference = torch_model(model_type, variant)
    reference.save_pretrained(tmp_path / "model")
    model, params = checkpoints.load(tmp_path / "model")
    tokens = random_tokens()
    assert scans(model.apply, params, jnp.asarray(tokens)) >= 2
    logits = model.apply(params, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), torch_logits(reference, tokens), atol=TOLERANCE)


def test_gradients_in_parts_are_those_of_the_whole(monkeypatch):
    model, params = llama(num_key_value_heads=2)
    tokens = random_tokens(length=13, vocab=32)

    def gradient():
        return jax.grad(lambda params: jnp.mean(model.apply(params, tokens) ** 2))(params)

    whole = gradient()
    monkeypatch.setattr(attention, "LARGE", 1)
    monkeypatch.setattr(attention, "QUERIES", 5)
    for one, other in zip(jax.tree.leaves(gradient()), jax.tree.leaves(whole), strict=True):
        # float32 sums in another order.
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def test_long_sequences_take_parts_and_the_memory_of_one():
    model, params = llama(num_attention_heads=8)
    tokens = np.zeros((4, 1024), np.int32)
    assert scans(model.apply, params, jnp.asarray(tokens[:, :64])) == 0
    compiled = jax.jit(model.apply).lower(params, tokens).compile()
    # Of 134 MB of scores those of one sequence, in parts of 8 MB with what is computed from them.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8 * 1024**2 * 4 / 3


@pytest.mark.parametrize("heads", [4, 2])
def test_scales_fold_through_parts(heads, parts):
    """Into the values' projection, unless several queries share a head."""
    model, params = llama(num_key_value_heads=heads)
    batches = [random_tokens(batch=4, length=24, vocab=32)]
    packed, _ = quantize(model.apply, params, batches, grid=Grid(bits=4, group_size=16), method=AWQ(solver=RTN()))
    output = packed["model"]["layers"][0]["self_attn"]["o_proj"]["kernel"]
    assert (output.input_scales is None) == (heads == 4)
