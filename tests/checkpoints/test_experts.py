"""Experts: one leaf here, one tensor an expert in a checkpoint; transformers is the judge of the files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jgptq
from jgptq.kernels.prepack import Prepacked
from jgptq.models import MODELS, LanguageModel

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def mixtral():
    architecture = MODELS["mixtral"]
    model = LanguageModel(architecture=architecture, config=architecture.parse_config(CONFIG))
    return model, model.init(jax.random.key(0))


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_float_experts_are_written_one_by_one(mixtral, tmp_path):
    model, params = mixtral
    jgptq.save(tmp_path / "out", model, params)
    _, again = jgptq.load(tmp_path / "out")
    assert equal_trees(again, params)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16))
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.apply(params, tokens), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore::jgptq.quantize.QuantizationWarning")
def test_packed_experts_come_back_as_they_were(mixtral, tmp_path):
    model, params = mixtral
    batches = [np.random.default_rng(1).integers(0, 64, (4, 32))]
    packed, report = jgptq.quantize(model.apply, params, batches, grid=jgptq.Grid(group_size=16), method="rtn")
    assert "model.layers.1.block_sparse_moe.experts.w2.kernel" in {row.path for row in report.rows}
    jgptq.save(tmp_path / "out", model, packed)
    _, again = jgptq.load(tmp_path / "out", dtype=jnp.float32)
    assert equal_trees(again, packed)


@pytest.mark.filterwarnings("ignore::jgptq.quantize.QuantizationWarning")
def test_prepacked_experts_are_multiplied_and_saved_as_they_were(mixtral, tmp_path):
    model, params = mixtral
    batches = [np.random.default_rng(1).integers(0, 64, (2, 16))]
    packed, _ = jgptq.quantize(model.apply, params, batches, grid=jgptq.Grid(group_size=16), method="rtn")
    prepacked = jgptq.prepack(packed)
    experts = prepacked["model"]["layers"][0]["block_sparse_moe"]["experts"]
    assert isinstance(experts["w1"]["kernel"], Prepacked)
    np.testing.assert_allclose(model.apply(prepacked, batches[0]), model.apply(packed, batches[0]), atol=1e-5)
    jgptq.save(tmp_path / "out", model, prepacked)
    assert equal_trees(jgptq.load(tmp_path / "out", dtype=jnp.float32)[1], packed)
