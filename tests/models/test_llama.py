import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jgptq import checkpoints, grid, tensor
from jgptq.models import MODELS, LanguageModel
from jgptq.models.llama import LlamaConfig
from jgptq.models.rotary import Rope

# Float32 sums in another order; logits here are of order 1 to 10.
TOLERANCE = 1e-4

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu"},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn options": {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "mscale": 1.0, "truncate": False}},
    "yarn scale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}},
}


def torch_llama(seed=0, **options):
    """A PyTorch Llama whose every parameter, norms and biases too, is far from its initial value."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def random_tokens(length, batch=2, vocab=96):
    return np.random.default_rng(1).integers(0, vocab, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, tmp_path):
    reference = torch_llama(**VARIANTS[name])
    reference.save_pretrained(tmp_path / "model")
    model, params = checkpoints.load(tmp_path / "model")
    apply = jax.jit(model.apply)
    for length in (40, 90):  # Within and beyond max_position_embeddings, which changes "dynamic".
        tokens = random_tokens(length)
        expected = torch_logits(reference, tokens)
        logits = apply(params, jnp.asarray(tokens))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(logits), expected, atol=TOLERANCE)


def test_sharded_checkpoint_gives_the_same_parameters(tmp_path):
    reference = torch_llama(attention_bias=True)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = checkpoints.load(tmp_path / "whole")[1], checkpoints.load(tmp_path / "shards")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), whole, shards))


def test_bfloat16_checkpoint_keeps_its_dtype_and_computes_in_it(tmp_path):
    torch_llama().bfloat16().save_pretrained(tmp_path / "model")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model, params = checkpoints.load(tmp_path / "model")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = random_tokens(16)
    # The same rounded weights in float32 are exact in both libraries.
    expected = torch_logits(reference, tokens)
    wide = checkpoints.load(tmp_path / "model", dtype="float32")[1]
    np.testing.assert_allclose(model.apply(wide, jnp.asarray(tokens)), expected, atol=TOLERANCE)
    narrow = model.apply(params, jnp.asarray(tokens))
    assert narrow.dtype == jnp.float32
    # 8 significant bits and some 20 roundings on the way: a few per cent of the logits' spread.
    assert np.abs(np.asarray(narrow) - expected).mean() < 0.05 * expected.std()


def test_rope_scaling_of_transformers_4_reads_as_rope_parameters():
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    old = LlamaConfig.from_dict({**SIZES, "rope_theta": 500.0, "rope_scaling": scaling})
    assert old == LlamaConfig.from_dict({**SIZES, "rope_parameters": LLAMA3})


@pytest.mark.parametrize("name", VARIANTS)
def test_config_survives_its_own_json(name):
    config = LlamaConfig.from_dict({**SIZES, **VARIANTS[name], "eos_token_id": [2, 3]})
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_default_config_survives_its_own_json():
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    config = LlamaConfig(**sizes)
    assert config.num_key_value_heads == 4
    assert LlamaConfig.from_dict(config.to_dict()) == config


def language_model(**options):
    return LanguageModel(architecture=MODELS["llama"], config=LlamaConfig(**{**SIZES, **options}))


def test_init_draws_kernels_at_the_configured_width():
    model = language_model(initializer_range=0.05, vocab_size=2000, attention_bias=True)
    params = model.init(jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.parameter_shapes)
    # 64,000 draws: the standard deviation is known to 0.3 %.
    assert float(jnp.std(params["model"]["embed_tokens"]["embedding"])) == pytest.approx(0.05, rel=0.02)
    assert float(jnp.std(params["lm_head"]["kernel"])) == pytest.approx(0.05, rel=0.02)
    assert not params["model"]["layers"][0]["self_attn"]["q_proj"]["bias"].any()
    assert (params["model"]["norm"]["scale"] == 1).all()
    other = model.init(jax.random.key(1))
    assert not jnp.array_equal(other["lm_head"]["kernel"], params["lm_head"]["kernel"])


def test_model_is_hashable_and_forgets_its_source():
    assert language_model() == dataclasses.replace(language_model(), source=Path("elsewhere"))
    assert hash(language_model()) == hash(dataclasses.replace(language_model(), source=Path("elsewhere")))
    assert language_model() != language_model(head_dim=16)


def test_logits_see_no_later_token():
    model = language_model()
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(random_tokens(12))
    changed = tokens.at[:, 8].add(1)
    before, after = model.apply(params, tokens), model.apply(params, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert jnp.abs(before[:, 8:] - after[:, 8:]).max() > 0


def test_packed_kernels_give_the_logits_of_the_arrays_they_stand_for():
    model = language_model(attention_bias=True)
    params = model.init(jax.random.key(0))
    random = np.random.default_rng(0)

    def packed(keys, leaf):
        if keys[-1].key != "kernel":
            return leaf
        own = grid.Grid(bits=4, group_size=16)
        groups = -(-leaf.shape[0] // 16)
        return tensor.from_codes(
            jnp.asarray(random.integers(0, 16, leaf.shape), jnp.uint32),
            jnp.asarray(random.uniform(0.01, 0.02, (groups, leaf.shape[1])), jnp.float32),
            jnp.asarray(random.integers(0, 16, (groups, leaf.shape[1])), jnp.uint8),
            grid=own,
        )

    params_q = jax.tree_util.tree_map_with_path(packed, params)
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, tensor.QuantizedTensor) else leaf,
        params_q,
        is_leaf=lambda leaf: isinstance(leaf, tensor.QuantizedTensor),
    )
    tokens = jnp.asarray(random_tokens(12))
    expected = model.apply(dense, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(params_q, tokens), expected, atol=TOLERANCE)
    np.testing.assert_allclose(model.apply(params_q, tokens), expected, atol=TOLERANCE)


def test_gradient_reaches_every_parameter():
    model = language_model(attention_bias=True, mlp_bias=True)
    params = model.init(jax.random.key(0))
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, jnp.asarray(random_tokens(12))))))(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_layers_trace_to_equal_text():
    # One dot_general with a weight for each of the 7 kernels a layer, 2 in attention, 1 head: nothing else is unrolled.
    lines = {}
    for layers in (1, 2, 3):
        model = language_model(num_hidden_layers=layers)
        jaxpr = jax.make_jaxpr(model.apply)(model.parameter_shapes, jax.ShapeDtypeStruct((2, 8), jnp.int32))
        assert len(jaxpr.consts) <= 1  # the rotary frequencies
        lines[layers] = len(jaxpr.eqns)
    assert lines[3] - lines[2] == lines[2] - lines[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": None}, r"needs \['vocab_size', .*\['hidden_size'\] is missing"),
        ({"hidden_size": "32"}, "hidden_size='32'; give int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; give a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_act": "snake"}, "hidden_act='snake' is not supported; choose one of .*silu"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type='spiral' is not supported; choose one of .*llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, r"'llama3' needs .*'high_freq_factor'\] is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor=-1.0; give a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "give one flat object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
    ],
)
def test_config_errors_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**SIZES, **options})


def test_rope_frequency_limits_must_be_in_order():
    with pytest.raises(ValueError, match=r"high_freq_factor=1.0 must be above low_freq_factor=2.0"):
        Rope(rope_type="llama3", low_freq_factor=2.0, high_freq_factor=1.0)


@pytest.mark.parametrize("tokens", [jnp.zeros(8, jnp.int32), jnp.zeros((2, 8))])
def test_tokens_of_another_shape_or_dtype_are_refused(tokens):
    model = language_model()
    with pytest.raises(Exception, match="tokens") as error:
        model.apply(model.parameter_shapes, tokens)
    # beartype speaks first where it is on, as in this test run.
    assert type(error.value).__name__ in ("ValueError", "TypeCheckError")
