"""Whole models as GGUF: saved and loaded again, loaded by transformers, and refused with one clear line."""

import json
import tracemalloc
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf_cases import CASES, DECODER, GRID, assert_identical, model_of, packed, params_of
from tokenizers import Tokenizer

import jgptq
from jgptq import grid, tensor
from jgptq.checkpoints import gguf as gguf_format
from jgptq.checkpoints import gguf_file, read_tokenizer
from jgptq.checkpoints import load as load_directory
from jgptq.checkpoints.gguf_dialects import DIALECTS
from jgptq.models import MODELS, language_model
from jgptq.tensor import QuantizedTensor

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.filterwarnings("ignore:the GGUF file has no tokenizer")
AFFINE = grid.Grid(bits=4, group_size=32)
# What transformers 5.23 loads, and whether it builds the config from the metadata alone (it reads fewer keys).
TRANSFORMERS = {
    "llama": True,
    "llama with biases": False,
    "llama tied, rope of llama3": False,
    "mistral": True,
    "qwen2": False,
    "qwen3": True,
    "qwen3_moe": False,
    "gemma2": True,
    "gemma3_text": True,
    "phi3 with longrope": False,
    "gpt2": False,
    "gpt2 tied": False,
    "bloom": True,
    "falcon": True,
}


def save(file, model, params, **options):
    jgptq.save(file, model, params, format="gguf", **options)
    return file


def load(file, *, dtype=None, lazy=False):
    return jgptq.load(file, dtype=dtype, lazy=lazy)


@pytest.mark.parametrize("name", CASES)
def test_survives_bit_for_bit(name, tmp_path):
    model = model_of(name)
    params = params_of(model, AFFINE)
    file = save(tmp_path / "model.gguf", model, params)
    again, read = load(file)
    assert again == model
    assert again.source == file
    assert_identical(read, params)


@pytest.mark.parametrize("name", ["mixtral", "gemma", "falcon with many heads"])
def test_floats_survive(name, tmp_path):
    model = model_of(name)
    params = params_of(model, None)
    assert_identical(load(save(tmp_path / "model.gguf", model, params))[1], params)


@pytest.fixture
def without_accelerate(monkeypatch):
    """transformers asks for accelerate before it opens a GGUF file, and then has no need of it here."""
    monkeypatch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *version: True)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_same_model(name, tmp_path, without_accelerate):
    model = model_of(name)
    params = params_of(model, GRID)
    save(tmp_path / "model.gguf", model, params)
    config = None
    if not TRANSFORMERS[name]:
        fields = json.loads(json.dumps(model.config.to_dict()))
        config = transformers.AutoConfig.for_model(**fields | {"pad_token_id": 0})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager", config=config
    ).eval()
    weights = theirs.state_dict()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
    ):
        stored, transposed = model.architecture.tensor_name(tuple(key.key for key in keys))
        if stored in weights:  # transformers keeps experts in one tensor, and shares tied ones
            values = np.asarray(tensor.dequantize(leaf) if isinstance(leaf, QuantizedTensor) else leaf)
            np.testing.assert_array_equal(weights[stored].numpy(), values.T if transposed else values)
    if config is None:
        for field in DIALECTS[model.architecture.model_type].keys:
            read = getattr(theirs.config, field, None)
            assert read is None or read == pytest.approx(getattr(model.config, field), rel=1e-6)
        if hasattr(model.config, "rope") and name != "gemma3_text":  # which has a rope for each kind of layer
            assert theirs.config.rope_parameters["rope_theta"] == model.config.rope.theta
    if name == "qwen3_moe":
        experts = params["model"]["layers"][1]["mlp"]["experts"]
        halves = [np.swapaxes(experts[half]["kernel"].dequantize(), 1, 2) for half in ("gate_proj", "up_proj")]
        fused = weights["model.layers.1.mlp.experts.gate_up_proj"].numpy()
        np.testing.assert_array_equal(fused, np.concatenate(halves, axis=1))
    if name != "llama":
        return
    tokens = np.arange(20)[None] * 3 % 96
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    # Float32 sums in another order; logits are of order 1 to 10.
    np.testing.assert_allclose(model.apply(params, jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_the_gguf_package_reads_the_dequantized_weights(name, tmp_path):
    """Also those that transformers does not: experts as stacks, and Gemma's norms, which hold 1 + scale."""
    model = model_of(name)
    params = params_of(model, AFFINE)
    reader = gguf.GGUFReader(save(tmp_path / "model.gguf", model, params))
    read = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    layer = params["model"]["layers"][1]
    if name == "mixtral":
        experts = layer["block_sparse_moe"]["experts"]["w2"]["kernel"]
        expected = np.swapaxes(experts.dequantize(), 1, 2)
        np.testing.assert_array_equal(read["blk.1.ffn_down_exps.weight"], expected)
    else:
        np.testing.assert_array_equal(read["blk.1.ffn_down.weight"].T, layer["mlp"]["down_proj"]["kernel"].dequantize())
    norm = np.asarray(layer["input_layernorm"]["scale"])
    np.testing.assert_array_equal(read["blk.1.attn_norm.weight"], norm + (name == "gemma2"))


def test_half_precision_floats_stay_but_for_norms(tmp_path):
    model = model_of("llama with biases")
    params = params_of(model, GRID, leave=("k_proj",), dtype=jnp.bfloat16)
    file = save(tmp_path / "model.gguf", model, params)
    kinds = {name: stored.kind for name, stored in gguf_file.read_file(file).tensors.items()}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_k.weight"]) == ("BF16", "BF16")
    assert (kinds["blk.0.attn_norm.weight"], kinds["blk.0.attn_k.bias"]) == ("F32", "F32")
    assert_identical(load(file, dtype=jnp.bfloat16)[1], params)


def test_lazy_parameters_read_what_is_asked_for(tmp_path):
    model = model_of("mixtral")
    params = params_of(model, GRID, leave=("experts", "q_proj"))
    _, lazy = load(save(tmp_path / "model.gguf", model, params), lazy=True)
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    for keys, wanted in flat:
        leaf = lazy
        for key in keys:
            leaf = leaf[key.key]
        if isinstance(wanted, QuantizedTensor):
            assert_identical(leaf, wanted)
            continue
        assert (leaf.shape, leaf.ndim, leaf.dtype, leaf.nbytes) == (
            wanted.shape,
            wanted.ndim,
            wanted.dtype,
            wanted.nbytes,
        )
        wanted = np.asarray(wanted)
        for index in (..., slice(1, 3), *((1, (slice(None), slice(2, 5))) if wanted.ndim > 1 else ())):
            np.testing.assert_array_equal(leaf[index], wanted[index])
    # Lazy parameters are saved as they are.
    again = save(tmp_path / "again.gguf", model, lazy)
    assert again.read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_saving_lazy_parameters_holds_one_leaf_at_a_time(tmp_path):
    model = language_model(DECODER | {"model_type": "llama", "num_hidden_layers": 8, "intermediate_size": 2048})
    save(tmp_path / "model.gguf", model, params_of(model, None))
    _, lazy = load(tmp_path / "model.gguf", lazy=True)
    leaf, total = 64 * 2048 * 4, (tmp_path / "model.gguf").stat().st_size
    tracemalloc.start()
    save(tmp_path / "again.gguf", model, lazy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A leaf, its transpose and a run of rows; the file has 24 such leaves.
    assert peak < 6 * leaf < total / 2


def test_other_types_are_read_as_floats_and_named(tmp_path):
    model = model_of("llama")
    params = params_of(model, GRID)
    file = save(tmp_path / "model.gguf", model, params)
    original = gguf_file.read_file(file)
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.1, original.tensors[name].shape).astype(np.float32) for name in original.tensors}
    chosen = {"token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "Q5_0", "blk.1.attn_q.weight": "Q5_1"}
    raw = {name: gguf.quants.quantize(values[name], gguf.GGMLQuantizationType[kind]) for name, kind in chosen.items()}
    specs, arrays = {}, {}
    for name, stored in original.tensors.items():
        specs[name] = gguf_file.Spec(shape=stored.shape, kind=chosen.get(name, stored.kind))
        arrays[name] = raw.get(name, stored.read_bytes(0, stored.rows))
    gguf_file.write_file(tmp_path / "other.gguf", original.metadata, specs, arrays.items())
    with pytest.warns(UserWarning, match=r"read as floats.*1 of Q5_0") as caught:
        _, read = load(tmp_path / "other.gguf")
    assert len(caught) == 1
    expected = {
        name: gguf.quants.dequantize(raw[name], gguf.GGMLQuantizationType[kind]) for name, kind in chosen.items()
    }
    np.testing.assert_array_equal(read["model"]["embed_tokens"]["embedding"], expected["token_embd.weight"])
    kernel = read["model"]["layers"][0]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, expected["blk.0.ffn_up.weight"].T)
    # Queries are in pairs in the file: rows 0, 1 are features 0 and 8 of a head of 16.
    queries = np.asarray(read["model"]["layers"][1]["self_attn"]["q_proj"]["kernel"]).T
    np.testing.assert_array_equal(queries[[0, 8, 1, 9]], expected["blk.1.attn_q.weight"][:4])


CODED = [name for name, *_ in gguf_file.kinds().values() if name not in gguf_file.PLAIN and gguf_file.readable(name)]


def test_llama_cpps_usual_types_are_read():
    assert {"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"} <= set(CODED)
    assert not {"I8", "I32"} & set(CODED)


@pytest.mark.parametrize("kind", CODED)
def test_every_type_of_ggml_is_read_by_rows(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 64, (3, 2 * block_bytes), dtype=np.uint8)
    specs = {"t": gguf_file.Spec(shape=(3, 2 * block), kind=kind)}
    gguf_file.write_file(tmp_path / "t.gguf", {}, specs, [("t", raw)])
    stored = gguf_file.read_file(tmp_path / "t.gguf").tensors["t"]
    expected = gguf.quants.dequantize(raw, number)
    np.testing.assert_array_equal(stored.read(1, 3).astype(np.float32), expected[1:])


def test_blocks_are_decoded_a_run_of_rows_at_a_time(tmp_path):
    raw = np.random.default_rng(0).integers(0, 64, (4096, 2048 // 32 * 34), dtype=np.uint8)
    specs = {"t": gguf_file.Spec(shape=(4096, 2048), kind="Q8_0")}
    gguf_file.write_file(tmp_path / "t.gguf", {}, specs, [("t", raw)])
    stored = gguf_file.read_file(tmp_path / "t.gguf").tensors["t"]
    leaf = gguf_format.LazyParameter(stored=stored, dtype=np.dtype(np.float16), transposed=True, order=None, offset=0.0)
    tracemalloc.start()
    values = leaf[...]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All at once would be 4 times the result: the numbers in float32, twice.
    assert peak < 2.5 * values.nbytes
    np.testing.assert_array_equal(leaf[...][:, 7], stored.read(7, 8)[0].astype(np.float16))


def test_a_foreign_minimum_is_kept_as_a_float_zero(tmp_path):
    """What llama.cpp's own quantizer makes: minima that are no multiples of the scale."""
    model = model_of("gpt2 tied")
    file = save(tmp_path / "model.gguf", model, params_of(model, AFFINE))
    original = gguf_file.read_file(file)
    values = np.random.default_rng(0).normal(0.03, 0.1, (96, 64)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    arrays = {name: stored.read_bytes(0, stored.rows) for name, stored in original.tensors.items()}
    arrays["blk.0.ffn_up.weight"] = raw
    specs = {name: gguf_file.Spec(shape=stored.shape, kind=stored.kind) for name, stored in original.tensors.items()}
    gguf_file.write_file(tmp_path / "other.gguf", original.metadata, specs, arrays.items())
    _, read = load(tmp_path / "other.gguf")
    kernel = read["transformer"]["h"][0]["mlp"]["c_fc"]["kernel"]
    assert not tensor.has_integer_zeros(kernel)
    assert kernel.zeros.dtype == jnp.float32
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_allclose(kernel.dequantize().T, expected, rtol=0, atol=1e-6)
    again = save(tmp_path / "again.gguf", model, read)
    assert again.read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_rounded_minima_are_told_once(tmp_path):
    model = model_of("llama")
    params = params_of(model, AFFINE, leave=("mlp",))
    wide = np.random.default_rng(0).uniform(0.01, 0.1, 500).astype(np.float16)
    kernel = packed(np.random.default_rng(1), (64, 96), AFFINE, scales=wide)
    params["model"]["layers"][1]["mlp"]["up_proj"]["kernel"] = kernel
    with pytest.warns(UserWarning, match=r"minimum of 1 asymmetric weights .*0\.00\d of a step \(model\.layers\.1"):
        file = save(tmp_path / "model.gguf", model, params)
    assert_identical(load(file)[1], params)


def test_everything_that_cannot_be_held_is_named_before_writing(tmp_path):
    model = language_model(DECODER | {"model_type": "llama", "intermediate_size": 48})
    params = params_of(model, GRID, leave=("down_proj",))
    layers = params["model"]["layers"]
    layers[0]["self_attn"]["q_proj"]["kernel"] = packed(np.random.default_rng(0), (64, 64), grid.Grid(bits=8))
    layers[1]["mlp"]["down_proj"]["kernel"] = packed(np.random.default_rng(0), (48, 64), GRID)
    with pytest.raises(ValueError, match="cannot be saved as GGUF") as caught:
        save(tmp_path / "model.gguf", model, params)
    for part in (
        "model.layers.0.self_attn.q_proj.kernel is asymmetric with 8 bits",
        "model.layers.1.mlp.down_proj.kernel has 48 inputs",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' of a llama"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope.rope_type='dynamic'"),
        (
            "qwen2",
            {"rope_parameters": {**DECODER, "rope_type": "yarn", "factor": 2.0, "mscale": 0.5}},
            "rope.mscale=0.5",
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("gemma", {"tie_word_embeddings": False}, "lm_head.kernel has no place"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar=99"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ("falcon", {"alibi": True}, "alibi=True"),
    ],
)
def test_config_that_gguf_cannot_say_is_refused_by_name(name, changes, message, tmp_path):
    model = language_model(CASES[name] | changes)
    with pytest.raises(ValueError, match=r"GGUF cannot|saved as GGUF") as caught:
        save(tmp_path / "model.gguf", model, params_of(model, None))
    assert message in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_model_types_without_an_architecture_are_refused_by_name(tmp_path):
    assert set(MODELS) - set(DIALECTS) == {"opt", "gpt_neo"}
    model = language_model(
        {"model_type": "opt", "vocab_size": 32, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2}
    )
    with pytest.raises(ValueError, match="a opt has no architecture in GGUF"):
        save(tmp_path / "model.gguf", model, params_of(model, None))


@pytest.mark.parametrize(
    ("given", "said"), [(-1, None), ((7,), 7), ((7, 7), 7), ((7, 5), (7, 5)), ((7, 5, 3), (7, 5, 3))]
)
def test_tokens_at_which_texts_end(given, said, tmp_path):
    model = language_model(CASES["gpt2 tied"] | {"eos_token_id": given})
    assert load(save(tmp_path / "model.gguf", model, params_of(model, None)), lazy=True)[0].config.eos_token_id == said


def test_more_ends_than_gguf_has_words_for_are_refused(tmp_path):
    model = language_model(CASES["gpt2 tied"] | {"eos_token_id": (2, 3, 4, 5)})
    with pytest.raises(ValueError, match=r"eos_token_id=\(2, 3, 4, 5\)"):
        save(tmp_path / "model.gguf", model, params_of(model, None))


def test_other_spellings_of_one_function_are_said(tmp_path):
    model = language_model(CASES["gpt2"] | {"activation_function": "gelu_pytorch_tanh", "n_inner": 256})
    again, _ = load(save(tmp_path / "model.gguf", model, params_of(model, None)))
    assert (again.config.activation_function, again.config.n_inner) == ("gelu_new", None)


def test_frequency_factors_of_no_known_rule_are_kept(tmp_path):
    """A Llama's rope_freqs from another rule than llama3: the same angles at every length."""
    model = model_of("llama tied, rope of llama3")
    file = save(tmp_path / "model.gguf", model, params_of(model, None))
    original = gguf_file.read_file(file)
    arrays = {name: stored.read_bytes(0, stored.rows) for name, stored in original.tensors.items()}
    arrays["rope_freqs.weight"] = np.array([1, 1.5, 1, 2, 1, 3, 1, 4], np.float32)
    specs = {name: gguf_file.Spec(shape=stored.shape, kind=stored.kind) for name, stored in original.tensors.items()}
    gguf_file.write_file(tmp_path / "other.gguf", original.metadata, specs, arrays.items())
    rope = load(tmp_path / "other.gguf", lazy=True)[0].config.rope
    changed = {**original.metadata, "llama.rope.scaling.factor": 2.0}
    gguf_file.write_file(tmp_path / "both.gguf", changed, specs, arrays.items())
    with pytest.raises(ValueError, match=r"both rope_freqs.weight and llama.rope.scaling.factor"):
        load(tmp_path / "both.gguf")
    assert rope.short_factor == rope.long_factor == (1, 1.5, 1, 2, 1, 3, 1, 4)
    assert (rope.rope_type, rope.attention_factor) == ("longrope", 1.0)


@pytest.mark.parametrize("name", ["tinystories-656k-as-qwen2", "stories260K", "anton-charstories-gpt2"])
def test_real_models(name, tmp_path):
    directory = DATA / name
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    model, params = load_directory(directory)
    if "gpt2" in name:
        with pytest.raises(ValueError, match="GGUF cannot say activation_function='relu' of a gpt2"):
            save(tmp_path / "model.gguf", model, params)
        return
    # stories260K has 172 features in its MLPs, which no block of 32 divides.
    params = params_of(model, GRID, leave=("down_proj",))
    again, read = load(save(tmp_path / "model.gguf", model, params))
    assert again == model
    assert_identical(read, params)
    kept = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert read_tokenizer(again.source).to_str() == kept.to_str()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of a llama, its metadata, specs and arrays."""
    file = tmp_path_factory.mktemp("small") / "model.gguf"
    model = model_of("llama")
    with pytest.warns(UserWarning, match="no tokenizer"):
        save(file, model, params_of(model, None))
    read = gguf_file.read_file(file)
    specs = {name: gguf_file.Spec(shape=stored.shape, kind=stored.kind) for name, stored in read.tensors.items()}
    return read.metadata, specs, {name: stored.read_bytes(0, stored.rows) for name, stored in read.tensors.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "bert"}, "general.architecture is 'bert'"),
        ({"general.architecture": 3}, "general.architecture is None"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.block_count": 10**9}, "block_count is 1000000000, but it has tensors of 2 blocks"),
        ({"llama.block_count": 1}, "12 tensors are not used|tensors are not used by this model"),
        ({"llama.embedding_length": 2**31}, "no tensor is wider than 96"),
        ({"llama.embedding_length": "wide"}, "llama.embedding_length is 'wide'"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
        ({"llama.embedding_length": 32}, r"token_embd.weight has shape \[96, 64\], not \[96, 32\]"),
        ({"llama.attention.head_count": 3}, "num_key_value_heads"),
        ({"llama.attention.head_count": np.array([4, 4])}, "a value for each layer"),
        ({"llama.attention.head_count": 90, "llama.attention.key_length": 90}, "wider than any tensor"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "a finite float32"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type is 'su'"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.attn_factor": 2.0,
            },
            r"is 'yarn' with \['rope.scaling.attn_factor'\]",
        ),
        ({"llama.rope.dimension_count": 17}, "rope.dimension_count is 17"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor"),
        ({"llama.context_length": 2.5}, "max_position_embeddings=2.5"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id is 'two'"),
        ({"split.count": 3}, "part of a split model"),
        ({"llama.expert_count": 4}, "lacks llama.expert_used_count"),
    ],
)
def test_metadata_that_does_not_fit_is_one_clear_error(changes, message, small, tmp_path):
    metadata, specs, arrays = small
    changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    gguf_file.write_file(tmp_path / "bad.gguf", changed, specs, arrays.items())
    if "not used" in message:
        with pytest.warns(UserWarning, match=message):
            load(tmp_path / "bad.gguf", lazy=True)
        return
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "bad.gguf")
    assert "bad.gguf cannot be read: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_all_named(small, tmp_path):
    metadata, specs, arrays = small
    specs, arrays = dict(specs), dict(arrays)
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        del specs[name], arrays[name]
    specs["blk.1.ffn_norm.weight"] = gguf_file.Spec(shape=(64,), kind="I32")
    specs["blk.1.attn_norm.weight"] = gguf_file.Spec(shape=(8, 8), kind="F32")
    gguf_file.write_file(tmp_path / "bad.gguf", metadata, specs, arrays.items())
    with pytest.raises(ValueError, match="does not fit its own metadata") as caught:
        load(tmp_path / "bad.gguf")
    for part in (
        "blk.0.attn_q.weight is missing",
        "output_norm.weight is missing",
        "blk.1.ffn_norm.weight is of type I32",
        "blk.1.attn_norm.weight has shape [8, 8], not [64]",
    ):
        assert part in str(caught.value)


def test_every_mutation_of_the_metadata_is_read_or_refused(small, tmp_path):
    metadata, specs, arrays = small
    random, keys = np.random.default_rng(0), [key for key in metadata if not key.startswith("general.quant")]
    values = [0, 1, 2, 2**32 - 1, -1.0, 1e-45, float("inf"), "", "linear", True, ["a"], np.arange(3, dtype=np.int32)]
    named = 0
    for _ in range(60):
        changed = dict(metadata)
        for key in random.choice(keys, 2):
            changed[key] = values[random.integers(len(values))]
        gguf_file.write_file(tmp_path / "mutant.gguf", changed, specs, arrays.items())
        try:
            load(tmp_path / "mutant.gguf", lazy=True)
        except ValueError as error:
            named += "mutant.gguf" in str(error)
        except UserWarning:
            named += 1
        else:
            named += 1
    assert named == 60


def test_what_is_recognized(small, tmp_path):
    metadata, specs, arrays = small
    for place in ("one", "two", "both"):
        (tmp_path / place).mkdir()
    for name in ("one/a.gguf", "two/a.gguf", "two/b.gguf", "both/a.gguf", "named.bin"):
        gguf_file.write_file(tmp_path / name, metadata, specs, arrays.items())
    (tmp_path / "both" / "config.json").write_text("{}")
    (tmp_path / "damaged.gguf").write_bytes(b"nothing")
    (tmp_path / "text.txt").write_text("text")
    recognized = {
        name: gguf_format.recognizes(tmp_path / name) for name in ("one", "both", "two", "named.bin", "text.txt")
    }
    assert recognized == {"one": True, "both": False, "two": True, "named.bin": True, "text.txt": False}
    assert gguf_format.recognizes(tmp_path / "damaged.gguf")
    assert not gguf_format.recognizes(tmp_path / "absent.gguf")
    assert load(tmp_path / "one", lazy=True)[0].source == tmp_path / "one" / "a.gguf"
    with pytest.raises(ValueError, match=r"two holds a\.gguf, b\.gguf; give the path of one"):
        load(tmp_path / "two")
