"""The Flax classes of transformers 4.57 through `jgptq.quantize` on a bare function, with no code for any of them.

transformers 5 has no Flax classes: `make test` runs this file in an environment of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import Grid, QuantizedTensor

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
    pytest.skip(
        "transformers without Flax classes; make test runs this in its own environment", allow_module_level=True
    )

LAYERS = 2
MODELS = {
    "gpt2": (
        "FlaxGPT2LMHeadModel",
        transformers.GPT2Config(n_layer=LAYERS, n_embd=64, n_head=4, vocab_size=128, n_positions=64),
        {"c_attn", "c_proj", "c_fc"},
        4,
        None,
    ),
    "llama": (
        "FlaxLlamaForCausalLM",
        transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=128,
            max_position_embeddings=64,
        ),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        7,
        [("lm_head*", None)],
    ),
}


@pytest.fixture(autouse=True)
def lenient_rank_promotion():
    """The ports themselves broadcast across ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


@pytest.mark.parametrize("name", MODELS)
def test_a_flax_port_is_quantized_and_served(name):
    class_name, config, layers, per_layer, rules = MODELS[name]
    model = getattr(transformers, class_name)(config, seed=0)

    def f(params, ids):
        return model(ids, params=params).logits

    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 128, (4, 32)),) for _ in range(4)]
    losses, packed = {}, {}
    for method in ("rtn", "gptq"):
        packed[method], report = jgptq.quantize(
            f, model.params, batches, grid=Grid(bits=3, group_size=32), method=method, rules=rules
        )
        losses[method] = [row.relative_error for row in report.rows]
        assert len(report.rows) == LAYERS * per_layer
        assert {row.path.split(".")[-2] for row in report.rows} == layers
    assert np.mean(losses["gptq"]) < np.mean(losses["rtn"])
    assert "gather" in dict(report.skipped).get("transformer.wte.embedding", "gather")

    ids = batches[0][0]
    dense = jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, packed["gptq"], is_leaf=is_packed)
    served = jax.jit(jgptq.quantized(f))(packed["gptq"], ids)
    np.testing.assert_allclose(served, f(dense, ids), atol=2e-5)
    assert not jnp.allclose(served, f(model.params, ids), atol=1e-3)
