"""Every decoder is seen to treat the rows of a batch apart; sorted experts are not."""

import jax
import jax.numpy as jnp
import pytest
from test_against_transformers import FIRST, torch_config

from jgptq.models import MODELS, LanguageModel, attention
from jgptq.tracing.graph import trace
from jgptq.tracing.rows import treats_rows_apart

SORTED = ("mixtral", "qwen3_moe")


def traces(model_type, variant):
    """On batches of 2 and of 5 rows."""
    config = MODELS[model_type].parse_config(torch_config(model_type, variant).to_dict())
    model = LanguageModel(architecture=MODELS[model_type], config=config)
    return [trace(model.apply, model.parameter_shapes, jax.ShapeDtypeStruct((rows, 8), jnp.int32)) for rows in (2, 5)]


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_a_decoder_treats_rows_apart(model_type, variant):
    assert treats_rows_apart(*traces(model_type, variant), (2, 5), (True,)) == (model_type not in SORTED)


@pytest.mark.parametrize("model_type", ["bloom", "mistral"])
def test_attention_in_parts_treats_rows_apart(model_type, monkeypatch):
    """Linear biases; groups of heads and windows."""
    for name, number in {"LARGE": 1, "PART": 1, "QUERIES": 5}.items():
        monkeypatch.setattr(attention, name, number)
    found = traces(model_type, dict(FIRST)[model_type])
    assert any(equation.primitive.name == "scan" for equation in found[0].equations)
    assert treats_rows_apart(*found, (2, 5), (True,))
