import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jgptq import checkpoints
from jgptq.models import MODELS, LanguageModel
from jgptq.models.llama import LlamaConfig
from jgptq.models.rotary import Rope

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


def random_tokens(length, batch=2, vocab=96):
    return np.random.default_rng(1).integers(0, vocab, (batch, length)).astype(np.int32)


def test_sharded_checkpoint_gives_the_same_parameters(tmp_path):
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_bias=True))
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = checkpoints.load(tmp_path / "whole")[1], checkpoints.load(tmp_path / "shards")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), whole, shards))


def test_rope_scaling_of_transformers_4_reads_as_rope_parameters():
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    old = LlamaConfig.from_dict({**SIZES, "rope_theta": 500.0, "rope_scaling": scaling})
    assert old == LlamaConfig.from_dict({**SIZES, "rope_parameters": LLAMA3})


def test_default_config_survives_its_own_json():
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    config = LlamaConfig(**sizes)
    assert config.num_key_value_heads == 4
    assert LlamaConfig.from_dict(config.to_dict()) == config


def language_model(**options):
    return LanguageModel(architecture=MODELS["llama"], config=LlamaConfig(**{**SIZES, **options}))


def random_params(model):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), jnp.float32), model.parameter_shapes
    )


def test_init_draws_kernels_at_the_configured_width():
    model = language_model(initializer_range=0.05, vocab_size=2000, attention_bias=True, num_hidden_layers=1)
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
    params = random_params(model)
    tokens = jnp.asarray(random_tokens(12))
    changed = tokens.at[:, 8].add(1)
    before, after = model.apply(params, tokens), model.apply(params, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert jnp.abs(before[:, 8:] - after[:, 8:]).max() > 0


def test_gradient_reaches_every_parameter():
    model = language_model(attention_bias=True, mlp_bias=True, num_hidden_layers=1)
    tokens = jnp.asarray(random_tokens(12))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, tokens)))))(random_params(model))
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
        ({"rope_scaling": {"type": "spiral"}}, "rope_type='spiral' is not supported; known are .*llama3"),
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
