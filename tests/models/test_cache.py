"""Prefill and one-token steps give the logits of the whole sequence read at once, for every model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_against_transformers import CASES, FIRST, torch_config

from jgptq.models import MODELS, LanguageModel

LENGTHS = (3, 9)  # of the prompts; the row of the shorter one is filled up with tokens that must not matter
STEPS = 6


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_steps_equal_the_whole(model_type, variant):
    assert variant in CASES[model_type][1]
    architecture = MODELS[model_type]
    config = architecture.parse_config(torch_config(model_type, variant).to_dict())
    model = LanguageModel(architecture=architecture, config=config)
    leaves, tree = jax.tree.flatten(model.parameter_shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32) for x in leaves])
    tokens = rng.integers(0, config.vocab_size, (2, max(LENGTHS) + STEPS))
    expected = jax.jit(model.apply)(params, tokens)

    lengths = np.asarray(LENGTHS)
    prompts = tokens[:, : max(LENGTHS) + 1].copy()
    prompts[0, LENGTHS[0] :] = 0
    logits, cache = jax.jit(functools.partial(model.prefill, capacity=max(LENGTHS) + STEPS))(params, prompts, lengths)
    step = jax.jit(model.step, donate_argnums=3)
    rows = np.arange(2)
    for place in range(STEPS):
        np.testing.assert_allclose(logits, expected[rows, lengths + place - 1], atol=2e-4, rtol=2e-4)
        logits, cache = step(params, tokens[rows, lengths + place], lengths + place, cache)
    np.testing.assert_allclose(logits, expected[rows, lengths + STEPS - 1], atol=2e-4, rtol=2e-4)
