"""Every decoder is seen to treat the rows of a batch apart; sorted experts are not."""

import jax
import jax.numpy as jnp
import pytest
from test_against_transformers import FIRST, torch_config

from jgptq.models import MODELS, LanguageModel
from jgptq.tracing.graph import trace
from jgptq.tracing.rows import treats_rows_apart

SORTED = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_a_decoder_treats_rows_apart(model_type, variant):
    config = MODELS[model_type].parse_config(torch_config(model_type, variant).to_dict())
    model = LanguageModel(architecture=MODELS[model_type], config=config)
    small, large = (
        trace(model.apply, model.parameter_shapes, jax.ShapeDtypeStruct((rows, 8), jnp.int32)) for rows in (2, 5)
    )
    assert treats_rows_apart(small, large, (2, 5), (True,)) == (model_type not in SORTED)
