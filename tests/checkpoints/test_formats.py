"""AWQ, compressed-tensors and Orbax: known words, whole checkpoints there and back, and what each refuses."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import jgptq
from jgptq import packing, tensor
from jgptq.checkpoints import awq, patterns
from jgptq.checkpoints.patterns import FirstMatch
from jgptq.models import language_model

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}

pack = jax.jit(packing.pack, static_argnames="bits")


def random_weight(
    random, shape, *, bits=4, group_size=32, symmetric=False, permuted=False, scaled=False, dtype="float32"
):
    """A packed weight of random codes, and the float64 matrix it stands for."""
    in_features, out_features = shape
    length = group_size or in_features
    groups = -(-in_features // length)
    codes = random.integers(0, 2**bits, shape)
    scales = random.uniform(0.01, 0.1, (groups, out_features)).astype(np.float16)
    zeros = np.full((groups, out_features), 2 ** (bits - 1))
    if not symmetric:
        zeros = random.integers(0, 2**bits, (groups, out_features))
    group_of = np.arange(in_features) // length
    matrix = scales.astype(np.float64)[group_of] * (codes - zeros[group_of])
    permutation = random.permutation(in_features).astype(np.int32) if permuted else None
    return tensor.QuantizedTensor(
        codes=pack(jnp.asarray(codes, jnp.uint32), bits=bits),
        scales=jnp.asarray(scales),
        zeros=None if symmetric else jnp.asarray(zeros, jnp.uint8),
        permutation=None if permutation is None else jnp.asarray(permutation),
        input_scales=jnp.asarray(random.uniform(0.5, 2, in_features), jnp.float32) if scaled else None,
        bits=bits,
        group_size=length,
        dtype=jnp.dtype(dtype),
        layout=tensor.Layout.dense(*shape),
    ), matrix


@pytest.fixture(scope="module")
def model():
    return language_model(CONFIG)


def packed_params(model, skip=("lm_head",), **options):
    """The model's parameters with random packed kernels, and the kernels' matrices by module."""
    random, matrices = np.random.default_rng(0), {}

    def leaf(keys, spec):
        path = [str(key.key) for key in keys]
        if path[-1] != "kernel" or path[-2] in skip:
            return jnp.asarray(random.normal(0, 0.1, spec.shape), jnp.float32)
        weight, matrices[".".join(path[:-1])] = random_weight(random, spec.shape, **options)
        return weight

    return jax.tree_util.tree_map_with_path(leaf, model.parameter_shapes), matrices


def assert_identical(given, wanted):
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


HELD = {
    "awq": [{}, {"group_size": None}, {"symmetric": True}],
    "compressed-tensors": [
        {},
        {"symmetric": True, "group_size": None},
        {"bits": 3},
        {"bits": 8, "symmetric": True},
        {"bits": 2, "group_size": None},
    ],
    "orbax": [{"bits": 3, "group_size": 40}, {"symmetric": True, "permuted": True, "scaled": True}],
}


@pytest.mark.parametrize(("format", "options"), [(name, options) for name in HELD for options in HELD[name]])
def test_packed_parameters_survive_bit_for_bit(format, options, model, tmp_path):
    params, _ = packed_params(model, **options)
    jgptq.save(tmp_path / "out", model, params, format=format)
    again, read = jgptq.load(tmp_path / "out")
    assert again == model
    assert_identical(read, params)


def fields(words, order):
    """The 4-bit fields of int32 words along the last axis, the field `order` says for each value."""
    words = np.asarray(words).view(np.uint32).astype(np.int64)
    return np.stack([words >> 4 * order.index(k) & 15 for k in range(8)], axis=-1).reshape(len(words), -1)


def test_awq_words_hold_outputs_in_the_order_its_kernels_want(model, tmp_path):
    assert awq._to_words(np.arange(8, dtype=np.uint8)[None]).view(np.uint32) == 0x75316420
    params, matrices = packed_params(model)
    jgptq.save(tmp_path / "out", model, params, format="awq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for module, matrix in matrices.items():
        codes = fields(stored[f"{module}.qweight"], [0, 2, 4, 6, 1, 3, 5, 7])
        zeros = fields(stored[f"{module}.qzeros"], [0, 2, 4, 6, 1, 3, 5, 7])
        group_of = np.arange(len(codes)) // 32
        scales = stored[f"{module}.scales"].astype(np.float64)
        np.testing.assert_array_equal(scales[group_of] * (codes - zeros[group_of]), matrix)


def test_awq_translates_large_weights_some_inputs_at_a_time(model, monkeypatch, tmp_path):
    params, _ = packed_params(model)
    jgptq.save(tmp_path / "whole", model, params, format="awq")
    monkeypatch.setattr(awq, "CODES_AT_ONCE", 40 * 96)  # 96 inputs in runs of 40
    jgptq.save(tmp_path / "runs", model, params, format="awq")
    whole, runs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "runs"))
    assert whole == runs
    assert_identical(jgptq.load(tmp_path / "runs")[1], params)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_the_transposes_of_gptqs(bits, model, tmp_path):
    params, matrices = packed_params(model, bits=bits)
    for format in ("compressed-tensors", "gptq"):
        jgptq.save(tmp_path / format, model, params, format=format)
    ours, gptqs = (load_file(tmp_path / format / "model.safetensors") for format in ("compressed-tensors", "gptq"))
    for module, matrix in matrices.items():
        np.testing.assert_array_equal(ours[f"{module}.weight_packed"], gptqs[f"{module}.qweight"].T)
        np.testing.assert_array_equal(ours[f"{module}.weight_scale"], gptqs[f"{module}.scales"].T)
        np.testing.assert_array_equal(ours[f"{module}.weight_zero_point"], gptqs[f"{module}.qzeros"].T)
        assert ours[f"{module}.weight_shape"].tolist() == list(matrix.T.shape)


def quantization_config(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_compressed_tensors_config_says_which_modules_are_packed_how(model, tmp_path):
    params, _ = packed_params(model, symmetric=True)
    jgptq.save(tmp_path / "one", model, params, format="compressed-tensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert quantization_config(tmp_path / "one") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    attention = params["model"]["layers"][0]["self_attn"]
    attention["q_proj"]["kernel"], _ = random_weight(np.random.default_rng(1), (64, 64), bits=8, group_size=None)
    jgptq.save(tmp_path / "two", model, params, format="compressed-tensors")
    groups = quantization_config(tmp_path / "two")["config_groups"]
    assert ["model.layers.0.self_attn.q_proj"] in [group["targets"] for group in groups.values()]
    assert_identical(jgptq.load(tmp_path / "two")[1], params)


def with_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def test_compressed_tensors_in_order_of_activations_are_read(model, tmp_path):
    """As older versions of llm-compressor wrote them: codes in natural order, and the group of each input."""
    random = np.random.default_rng(2)
    params, matrices = packed_params(model, symmetric=True)
    jgptq.save(tmp_path / "out", model, params, format="compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    for module, matrix in matrices.items():
        order = random.permutation(len(matrix))
        codes = jnp.asarray(np.asarray(tensor.unpack_codes(leaf_of(params, module)))[order], jnp.uint32)
        stored[f"{module}.weight_packed"] = np.ascontiguousarray(np.asarray(pack(codes, bits=4)).T).view(np.int32)
        stored[f"{module}.weight_g_idx"] = (order // 32).astype(np.int32)
        matrices[module] = matrix[order]
    save_file(stored, file)
    with_config(tmp_path / "out", lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"))
    _, read = jgptq.load(tmp_path / "out")
    for module, matrix in matrices.items():
        np.testing.assert_array_equal(jgptq.dequantize(leaf_of(read, module)), matrix)


def leaf_of(params, module):
    for name in module.split("."):
        params = params[int(name) if name.isdigit() else name]
    return params["kernel"]


REFUSED = [
    ("awq", {"bits": 3}, r"_proj and 6 more: 3 bits, where the format has 4"),
    ("awq", {"group_size": 40}, r"its last group is short: 64 inputs in groups of 40"),
    ("awq", {"permuted": True}, r"inputs are in the groups of act_order=True; quantize with act_order='static'"),
    ("compressed-tensors", {"permuted": True}, r"act_order=True"),
    ("compressed-tensors", {"group_size": 40}, r"its last group is short"),
]


@pytest.mark.parametrize(("format", "options", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(format, options, message, model, tmp_path):
    params, _ = packed_params(model, **options)
    with pytest.raises(
        ValueError, match=rf"^'{format}' checkpoints cannot hold these weights as they are: .*{message}"
    ):
        jgptq.save(tmp_path / "out", model, params, format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_zeros_that_are_no_whole_numbers_are_refused(format, model, tmp_path):
    params, _ = packed_params(model)
    mlp = params["model"]["layers"][0]["mlp"]
    kernel = mlp["up_proj"]["kernel"]
    mlp["up_proj"]["kernel"] = dataclasses.replace(kernel, zeros=kernel.zeros + np.float32(0.5))
    with pytest.raises(ValueError, match=r"up_proj: its zeros are no whole numbers"):
        jgptq.save(tmp_path / "out", model, params, format=format)
    jgptq.save(tmp_path / "out", model, params, format="orbax")
    assert_identical(jgptq.load(tmp_path / "out")[1], params)


CONFIGS = [
    ("awq", lambda q: q.update(bits=8), r"bits=8; AWQ checkpoints have 4"),
    ("awq", lambda q: q.update(version="gemv"), r"version='gemv'; of AWQ's layouts this reads 'gemm'"),
    ("awq", lambda q: q.update(group_size=-5), r"group_size=-5"),
    ("awq", lambda q: q.update(group_size=10**9), r"AWQ needs whole groups of 1000000000 inputs"),
    ("awq", lambda q: q.update(meta=3), r"meta and its dtypes must be objects"),
    ("awq", lambda q: q.update(meta={"dtypes": {"a": "evil"}}), r"meta.dtypes has 'evil'; each must be one of"),
    ("awq", lambda q: (q.pop("version"), q.update(checkpoint_format="gemv")), r"version='gemv'"),
    ("awq", lambda q: q.update(quant_method=["awq"]), r"quant_method=\['awq'\] is not supported"),
    ("awq", lambda q: q.update(quant_method="hqq"), r"quant_method='hqq' is not supported; known are \['gptq', 'awq'"),
    ("compressed-tensors", lambda q: q.update(format="int-quantized"), r"format='int-quantized'"),
    ("compressed-tensors", lambda q: q.update(config_groups={}), r"config_groups must be an object with at least one"),
    ("compressed-tensors", lambda q: q["config_groups"]["group_0"].pop("weights"), r"group_0 has no weights"),
    ("compressed-tensors", lambda q: q["config_groups"]["group_0"].update(targets=["re:("]), r"no regular expression"),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"].update(targets=["a.b"]),
        r"no config group .* targets",
    ),
    ("compressed-tensors", lambda q: q["config_groups"]["group_0"].update(targets=3), r"must be a list of names"),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        r"group_0 quantizes activations",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"].update(targets=[r"re:(([a-z_.0-9]+)+)+$x"]),
        r"no config group .* targets",
    ),
    ("compressed-tensors", lambda q: q["config_groups"]["group_0"].update(targets=["re:(?i)a"]), r"has flags"),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"].update(format="int-quantized"),
        r"group_0 has format",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4.0),
        r"4\.0 bits of type 'int'; this reads",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric="false"),
        r"symmetric='false'; true or false",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="dynamic"),
        r"q_proj.weight_g_idx is missing",
    ),
    (
        "compressed-tensors",
        lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}),
        r"weights that are dense",
    ),
    (
        "compressed-tensors",
        lambda q: q.update(transform_config={"config_groups": {"u": {}}}),
        r"rotations of activations",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=5),
        r"5 bits of type 'int'; this reads",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="tensor"),
        r"strategy='tensor'; this reads",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=0),
        r"group_size=0; give a positive integer",
    ),
    (
        "compressed-tensors",
        lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=16),
        r"q_proj.weight_scale has shape \[64, 2\], not \[64, 4\]",
    ),
]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    params, _ = packed_params(model)
    for format in ("awq", "compressed-tensors", "orbax"):
        jgptq.save(directory / format, model, params, format=format)
    return directory


@pytest.mark.parametrize(("format", "change", "message"), CONFIGS)
def test_a_config_that_is_not_understood_is_refused(format, change, message, saved, tmp_path):
    shutil.copytree(saved / format, tmp_path / "out")
    with_config(tmp_path / "out", change)
    (tmp_path / "out" / "quantize_config.json").unlink()
    with pytest.raises(ValueError, match=message):
        jgptq.load(tmp_path / "out")


EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def written_by_transformers_4(config):
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_config": config["quantization_config"],
        "sparsity_config": {},
    }


def written_by_sparseml(config):
    config["compression_config"] = config.pop("quantization_config") | {"quant_method": "sparseml"}


def with_defaults(config):
    config["quantization_config"] |= {"ignore": None, "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}}
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    group["weights"] |= {"actorder": "static", "block_structure": None, "dynamic": False, "observer": "minmax"}


def with_another_group(config):
    """The one of the head, though it comes first, is not that of a class of modules."""
    groups = config["quantization_config"]["config_groups"]
    other = {"group_1": {"targets": ["lm_head"], "weights": EIGHT_BITS}}
    config["quantization_config"]["config_groups"] = other | groups


def with_patterns(config):
    """A name goes before patterns, a pattern before classes, whatever the order of the groups."""
    groups = config["quantization_config"]["config_groups"]
    right, wrong = groups["group_0"]["weights"], EIGHT_BITS
    config["quantization_config"]["config_groups"] = {
        "class": {"targets": ["Linear"], "weights": wrong},
        "pattern": {"targets": [r"re:.*(q|k|v|o|gate|up)_proj$", "re:z.*"], "weights": right},
        "wide": {"targets": ["re:model.*"], "weights": wrong},
        "name": {"targets": ["model.layers.0.mlp.down_proj"], "weights": right},
    }


def written_by_autoawq(config):
    config["quantization_config"] = {
        **{"quant_method": "awq", "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        "modules_to_not_convert": None,
    }


OF_OTHERS = [
    ("compressed-tensors", written_by_transformers_4),
    ("compressed-tensors", written_by_sparseml),
    ("compressed-tensors", with_defaults),
    ("compressed-tensors", with_another_group),
    ("compressed-tensors", with_patterns),
    ("awq", written_by_autoawq),
]


@pytest.mark.parametrize(("format", "change"), OF_OTHERS)
def test_configs_as_others_write_them_are_read(format, change, model, saved, tmp_path):
    shutil.copytree(saved / format, tmp_path / "out")
    (tmp_path / "out" / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert_identical(jgptq.load(tmp_path / "out")[1], packed_params(model)[0])


@pytest.mark.parametrize("beyond", [0, 1])
def test_zero_points_that_older_versions_left_unpacked_are_read(beyond, model, saved, tmp_path):
    shutil.copytree(saved / "compressed-tensors", tmp_path / "out")
    stored, params = load_file(tmp_path / "out" / "model.safetensors"), packed_params(model)[0]
    for name in [name for name in stored if name.endswith("weight_zero_point")]:
        zeros = np.asarray(leaf_of(params, name.rpartition(".")[0]).zeros).T.astype(np.int8) - np.int8(8)
        stored[name] = np.ascontiguousarray(np.where(zeros == 7, zeros + np.int8(beyond), zeros))
    save_file(stored, tmp_path / "out" / "model.safetensors")
    if beyond:
        with pytest.raises(ValueError, match=r"weight_zero_point has values -8 \.\. 8; 4 bits are -8 \.\. 7"):
            jgptq.load(tmp_path / "out")
    else:
        assert_identical(jgptq.load(tmp_path / "out")[1], params)


def test_patterns_match_what_those_of_python_match():
    random = np.random.default_rng(0)
    pieces = [
        *"am1.^$",
        r"\d+",
        r"\.",
        "[a-z_]",
        "[^.]",
        "layers",
        ".*?",
        "(q|k|v)",
        "(?!.*mlp)",
        "(?=m)",
        "(l.|la|lay)+",
    ]
    pieces += ["(a|.)*", ".{3,5}", r"(?:.\.?){2,}", "(|a)", "(a*)*", r"\w", r"[\W]"]
    names = ["model.layers.0.mlp.up_proj", "model.layers.11.self_attn.q_proj", "lm_head", ""]
    matched = 0
    for _ in range(60):
        pattern = "".join(random.choice(pieces, random.integers(1, 6)))
        for name in names:
            wanted = re.match(pattern, name) is not None
            assert (FirstMatch([pattern])(name) == 0) == wanted, (pattern, name)
            matched += wanted
    assert 20 < matched < 220


def test_patterns_that_take_too_long_are_refused(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 2000)
    with pytest.raises(ValueError, match=r"the pattern '.* takes too long to match"):
        FirstMatch(["(.*)*" * 20 + "x"])("model.layers.11.self_attn.q_proj")


def test_the_first_pattern_to_match_counts():
    several = [r"^lm_head$", r"^a\.b$", r".*b", r"^c\.b$"]
    assert [FirstMatch(several)(name) for name in ("a.b", "c.b", "lm_head", "d")] == [1, 2, 0, None]


def test_a_weight_shape_that_disagrees_is_refused(saved, tmp_path):
    shutil.copytree(saved / "compressed-tensors", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_shape"][0] = 7
    save_file(stored, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj.weight_shape says \[7, 64\], but the model has \[96, 64\]"):
        jgptq.load(tmp_path / "out")


def damaged_static(change):
    def damage(directory):
        content = json.loads((directory / "jgptq.json").read_text())
        change(content)
        (directory / "jgptq.json").write_text(json.dumps(content))

    return damage


def first(content):
    return next(iter(content["packed"].values()))


def cut_largest(directory):
    file = max(directory.iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED_ORBAX = [
    (damaged_static(lambda c: c.update(version=2)), r"has format='orbax', version=2; this reads 'orbax', 1"),
    (damaged_static(lambda c: c.update(packed=[])), r"packed must be an object"),
    (damaged_static(lambda c: first(c).update(bits=5)), r"jgptq.json is damaged: .*bits=5"),
    (damaged_static(lambda c: first(c).pop("layout")), r"jgptq.json is damaged: KeyError\('layout'\)"),
    (damaged_static(lambda c: first(c)["layout"].update(in_axes=[7])), r"jgptq.json is damaged"),
    (damaged_static(lambda c: first(c)["layout"].update(factors=[3, 3])), r"jgptq.json is damaged"),
    (damaged_static(lambda c: first(c).update(group_size=8)), r"does not fit its config.json: .*scales is float16"),
    (damaged_static(lambda c: c["packed"].popitem()), r"does not fit its config.json: .*kernel.* is"),
    (lambda d: (d / "params" / "_METADATA").write_text("{"), r"params is no readable Orbax checkpoint"),
    (lambda d: shutil.rmtree(d / "params" / "d"), r"params is no readable Orbax checkpoint"),
    (lambda d: cut_largest(d / "params" / "d"), r"params (is no readable|cannot be restored)"),
    (lambda d: shutil.rmtree(d / "params"), r"params is no readable Orbax checkpoint"),
]


@pytest.mark.usefixtures("orbax_leavings")
@pytest.mark.parametrize(("damage", "message"), DAMAGED_ORBAX)
def test_a_damaged_orbax_directory_is_refused(damage, message, saved, tmp_path):
    shutil.copytree(saved / "orbax", tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        jgptq.load(tmp_path / "out")


def test_orbax_itself_saves_and_restores_packed_pytrees(tmp_path):
    """Any tree of them, of any function: with no file of ours, the tree itself says what is static."""
    weight, _ = random_weight(np.random.default_rng(0), (64, 16))
    params = {"dense": {"kernel": weight, "bias": jnp.ones(16)}}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, params)
        assert_identical(checkpointer.restore(tmp_path / "params", abstract), params)


def test_arrays_are_restored_to_the_shards_asked_for(saved):
    """On four devices, in a process of its own."""
    script = textwrap.dedent(
        f"""
        import jax, numpy as np, jgptq
        from jax.sharding import NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        def sharding(path, spec):
            wide = ".kernel" in path and path.endswith(("codes", "scales", "zeros"))
            return NamedSharding(mesh, P(None, "model") if wide else P())
        for format in ("orbax", "awq"):
            model, params = jgptq.load("{saved}/" + format, sharding=sharding)
            _, plain = jgptq.load("{saved}/" + format)
            kernel = params["model"]["layers"][0]["mlp"]["up_proj"]["kernel"]
            assert kernel.codes.sharding.shard_shape(kernel.codes.shape) == (8, 24), kernel.codes.sharding
            assert all(len(a.sharding.device_set) == 4 for a in jax.tree.leaves(params))
            jax.tree.map(np.testing.assert_array_equal, params, plain)
            tokens = np.arange(12)[None]
            np.testing.assert_allclose(
                jax.jit(model.apply)(params, tokens), jax.jit(model.apply)(plain, tokens), atol=1e-4
            )
            thirds = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("model",))
            try:
                jgptq.load("{saved}/" + format, sharding=NamedSharding(thirds, P("model")))
            except ValueError as error:
                assert "kernel" in str(error) and "cannot have the sharding" in str(error), error
            else:
                raise AssertionError("nothing said")
        print("equal")
        """
    )
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("format", ["gptq", "orbax"])
def test_what_else_a_config_says_is_kept(format, model, tmp_path):
    params, _ = packed_params(model)
    jgptq.save(tmp_path / "first", model, params, format="awq")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    extra = {"transformers_version": "5.23.0", "my_key": [1, {"a": None}]}
    remote = {"auto_map": {"AutoModel": "code.Model"}, "dtype": "float16"}
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, **extra, **remote}))
    read_model, read = jgptq.load(tmp_path / "first")
    jgptq.save(tmp_path / "second", read_model, read, format=format)
    again = json.loads((tmp_path / "second" / "config.json").read_text())
    assert {name: again[name] for name in extra} == extra
    assert not set(remote) & set(again)
    assert again.get("quantization_config", {}).get("quant_method", format) == format


def test_a_stack_of_layouts_that_only_orbax_holds(model, tmp_path):
    params, _ = packed_params(model)
    embedding = params["model"]["embed_tokens"]
    weight, _ = random_weight(np.random.default_rng(3), (64, 48))
    layout = tensor.Layout(shape=(48, 64), factors=(48, 64), in_axes=(1,), out_axes=(0,))
    embedding["embedding"] = dataclasses.replace(weight, layout=layout)
    with pytest.raises(ValueError, match=r"embedding is packed, which only .* choose format='orbax'"):
        jgptq.save(tmp_path / "out", model, params)
    jgptq.save(tmp_path / "out", model, params, format="orbax")
    assert_identical(jgptq.load(tmp_path / "out")[1], params)


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_the_dtype_a_weight_stands_for_is_kept_where_it_is_not_the_models(format, model, tmp_path):
    params, _ = packed_params(model)
    mlp = params["model"]["layers"][0]["mlp"]
    mlp["up_proj"]["kernel"] = dataclasses.replace(mlp["up_proj"]["kernel"], dtype=jnp.dtype("bfloat16"))
    jgptq.save(tmp_path / "out", model, params, format=format)
    assert_identical(jgptq.load(tmp_path / "out")[1], params)


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
def test_scales_that_other_readers_round_are_told(format, model, tmp_path):
    params, _ = packed_params(model)
    mlp = params["model"]["layers"][0]["mlp"]
    kernel = mlp["up_proj"]["kernel"]
    # Half a step between two float16 numbers: 2^-11 of 1.
    scales = jnp.full_like(kernel.scales, 1 + 2**-11, jnp.float32)
    mlp["up_proj"]["kernel"] = dataclasses.replace(kernel, scales=scales)
    with pytest.warns(
        UserWarning, match=r"scales of 1 weights are float32; .* up to 0\.0005 of themselves \(.*up_proj\)"
    ):
        jgptq.save(tmp_path / "out", model, params, format=format)
    assert_identical(jgptq.load(tmp_path / "out")[1], params)


@pytest.mark.parametrize("format", ["gptq", "orbax"])
@pytest.mark.parametrize(
    ("leaf", "message"), [(jnp.zeros((64, 48), jnp.int8), r"is int8; cast"), (1.0, r"is 1\.0, not")]
)
def test_leaves_that_are_no_parameters_are_refused(leaf, message, format, model, tmp_path):
    params, _ = packed_params(model)
    with pytest.raises(ValueError, match=rf"lm_head\.kernel {message}"):
        jgptq.save(tmp_path / "out", model, params | {"lm_head": {"kernel": leaf}}, format=format)


def test_experts_may_have_all_zeros_alike(tmp_path):
    """AWQ does not say that they are symmetric, and the others of their stack are not."""
    sizes = {"num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = language_model({**CONFIG, **sizes, "model_type": "mixtral"})
    random = np.random.default_rng(4)

    def leaf(spec):
        if len(spec.shape) < 3:
            return jnp.zeros(spec.shape, jnp.float32)
        parts = [random_weight(random, spec.shape[1:])[0] for _ in range(2)]
        parts[1] = dataclasses.replace(parts[1], zeros=jnp.full_like(parts[1].zeros, 8))
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)

    params = jax.tree.map(leaf, model.parameter_shapes)
    jgptq.save(tmp_path / "out", model, params, format="awq")
    assert_identical(jgptq.load(tmp_path / "out")[1], params)


def test_a_chat_template_comes_back_from_a_gguf(model, tmp_path):
    params, _ = packed_params(model, symmetric=True)
    jgptq.save(tmp_path / "first", model, params, extra_files={"chat_template.jinja": "{{ messages[0].content }}\n"})
    first, read = jgptq.load(tmp_path / "first")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "first" / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"no tokenizer that llama.cpp reads"):
        jgptq.save(tmp_path / "out.gguf", first, read, format="gguf")
    again, read = jgptq.load(tmp_path / "out.gguf")
    jgptq.save(tmp_path / "second", again, read)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "second" / name).is_file()
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages[0].content }}\n"
    with open(tmp_path / "out.gguf", "rb+") as file:
        content = file.read().replace(
            b"tokenizer.ggml.model\x08\0\0\0\x04\0\0\0\0\0\0\0none",
            b"tokenizer.ggml.model\x08\0\0\0\x04\0\0\0\0\0\0\0else",
        )
        file.seek(0)
        file.write(content.replace(b"tokenizer.huggingface.json", b"tokenizer.huggingface.jsom"))
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*its tokenizer is 'else'"):
        jgptq.save(tmp_path / "third", again, read)
