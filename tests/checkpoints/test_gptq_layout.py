"""The GPTQ tensors of one module: against known words, and there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq import grid, packing, tensor
from jgptq.checkpoints import gptq

# Codes (7 i + 3) mod 2**bits, i = 0 .. 31, as GPTQModel's own packer writes them.
WORDS = {
    2: "1b1b1b1b 1b1b1b1b",
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    8: "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
}
SYMMETRIC_ZEROS = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}


from_codes = jax.jit(tensor.from_codes, static_argnames=("grid", "layout", "dtype"))


def weight(*, in_features, out_features, bits, symmetric=False, group_size=None, permuted=False, scale_dtype="float16"):
    random = np.random.default_rng(bits)
    own = grid.Grid(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    length = own.group_length(in_features)
    groups = -(-in_features // length)
    permutation = None
    if permuted:
        g_idx = random.permutation(np.arange(in_features) // length)
        permutation = jnp.asarray(np.argsort(g_idx, kind="stable").astype(np.int32))
    zeros = random.integers(0, 2**bits, (groups, out_features))
    zeros[0, 0] = 0
    return from_codes(
        jnp.asarray(random.integers(0, 2**bits, (in_features, out_features)), jnp.uint32),
        jnp.asarray(random.uniform(0.01, 0.1, (groups, out_features)), jnp.float32),
        None if symmetric else jnp.asarray(zeros, jnp.uint8),
        grid=own,
        permutation=permutation,
    )


def settings_of(one, **changes):
    return gptq.parse({**gptq.describe({"layer": one}, [], jnp.dtype("float32")), **changes})


def assert_identical(given, wanted):
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", WORDS)
def test_qweight_holds_the_words_gptqmodel_writes(bits):
    codes = np.repeat(((7 * np.arange(32) + 3) % 2**bits)[:, None], 5, axis=1)
    one = from_codes(jnp.asarray(codes, jnp.uint32), jnp.ones((1, 5)), None, grid=grid.Grid(bits=bits, symmetric=True))
    tensors = gptq.encode(settings_of(one), one)
    assert tensors["qweight"].dtype == np.int32
    assert " ".join(f"{word:08x}" for word in tensors["qweight"].view(np.uint32)[:, 3]) == WORDS[bits]


@pytest.mark.parametrize("bits", SYMMETRIC_ZEROS)
def test_symmetric_zeros_are_stored_less_one(bits):
    one = weight(in_features=32, out_features=64, bits=bits, symmetric=True)
    qzeros = gptq.encode(settings_of(one), one)["qzeros"]
    assert qzeros.shape == (1, 64 * bits // 32)
    assert (qzeros.view(np.uint32) == SYMMETRIC_ZEROS[bits]).all()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group_size", [32, 96, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", grid.BITS)
def test_a_module_survives_bit_for_bit(bits, symmetric, group_size, permuted):
    # 172 = 5 groups of 32 and one of 12; 172 and 13 codes end inside a word at every width but 8 bits.
    one = weight(
        in_features=172,
        out_features=13,
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        permuted=permuted and group_size is not None,
    )
    settings = settings_of(one)
    assert settings.version == ("gptq" if symmetric else "gptq_v2")
    tensors = gptq.encode(settings, one)
    expected = gptq.expected(settings, "layer", 172, 13)
    assert {part: array.shape for part, array in tensors.items()} == {p: want.shape for p, want in expected.items()}
    assert_identical(gptq.decode(settings, "layer", one.shape, tensors, "float32"), one)


@pytest.mark.parametrize("scale_dtype", grid.SCALE_DTYPES)
def test_scales_keep_their_dtype(scale_dtype):
    one = weight(in_features=64, out_features=8, bits=4, group_size=32, scale_dtype=scale_dtype)
    tensors = gptq.encode(settings_of(one), one)
    assert tensors["scales"].dtype == jnp.dtype(scale_dtype)
    assert_identical(gptq.decode(settings_of(one), "layer", one.shape, tensors, "float32"), one)


def test_permuted_codes_lie_in_the_natural_order_of_the_inputs():
    one = weight(in_features=64, out_features=8, bits=4, group_size=32, permuted=True)
    tensors = gptq.encode(settings_of(one), one)
    words, scales, groups = tensors["qweight"].view(np.uint32), tensors["scales"].astype(np.float32), tensors["g_idx"]
    codes = np.stack([(words >> (4 * k)) & 15 for k in range(8)], axis=1).reshape(64, 8)
    zeros = np.stack([(tensors["qzeros"].view(np.uint32) >> (4 * k)) & 15 for k in range(8)], axis=2).reshape(2, 8)
    values = scales[groups] * (codes.astype(np.float32) - zeros.astype(np.float32)[groups])
    np.testing.assert_array_equal(one.dequantize(), values)


@pytest.mark.parametrize(("stored", "label"), [(8, "gptq"), (7, "gptq_v2"), (8, "gptq_v2"), (7, "gptq")])
def test_symmetric_zeros_are_known_whatever_the_label(stored, label):
    one = weight(in_features=32, out_features=16, bits=4, symmetric=True)
    settings = settings_of(one, checkpoint_format=label)
    tensors = gptq.encode(settings, one)
    tensors["qzeros"] = np.full((1, 2), stored * 0x11111111, np.uint32).view(np.int32)
    assert_identical(gptq.decode(settings, "layer", one.shape, tensors, "float32"), one)


def first_version(words, *, bits=4, quantizer=None, out_features=8):
    """The zeros read from one row of words labelled "gptq"."""
    one = weight(in_features=32, out_features=out_features, bits=bits)
    settings = settings_of(one, checkpoint_format="gptq", meta={"quantizer": quantizer})
    tensors = gptq.encode(dataclasses.replace(settings, version="gptq_v2"), one)
    tensors["qzeros"] = np.array([words], np.uint32).view(np.int32)
    return np.asarray(gptq.decode(settings, "layer", one.shape, tensors, None).zeros)[0].tolist()


def test_asymmetric_zeros_of_the_first_version_gain_one():
    assert first_version([0x01234567]) == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_zero_of_0_from_gptqmodel_has_borrowed_across_the_word():
    assert first_version([0x61820DF7], quantizer=["gptqmodel:5.0.0"]) == [8, 0, 15, 1, 3, 9, 2, 7]


def test_a_zero_of_0_in_3_bits_from_gptqmodel_wraps_in_its_field():
    fields = [7, 0, 1, 2, 3, 4, 5, 6]
    word = sum(field << 3 * k for k, field in enumerate(fields))
    assert first_version([word], bits=3, quantizer="gptqmodel:5.0.0") == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_zero_of_0_from_an_unknown_writer_is_refused():
    with pytest.raises(ValueError, match=r"layer.qzeros holds a zero of 0.*convert the checkpoint to 'gptq_v2'"):
        first_version([0x61820EF7])


def test_group_numbers_that_fill_no_groups_are_refused():
    one = weight(in_features=64, out_features=8, bits=4, group_size=32)
    settings = settings_of(one)
    for damaged in (np.zeros(64, np.int32), np.arange(64, dtype=np.int32) // 16, np.full(64, -1, np.int32)):
        tensors = gptq.encode(settings, one) | {"g_idx": damaged}
        with pytest.raises(ValueError, match=r"layer.g_idx: values .* do not put 32 of the 64 inputs in each"):
            gptq.decode(settings, "layer", one.shape, tensors, None)


def test_config_names_the_weights_that_differ():
    weights = {
        "a": weight(in_features=64, out_features=8, bits=4, group_size=32),
        "b": weight(in_features=96, out_features=8, bits=4, group_size=32),
        "c.x": weight(in_features=64, out_features=8, bits=8, group_size=None),
        "d": weight(in_features=64, out_features=8, bits=4, group_size=32, symmetric=True, permuted=True),
        "short": weight(in_features=16, out_features=8, bits=4, group_size=32),
    }
    config = gptq.describe(weights, ["left.alone", "lm_head"], jnp.dtype("float32"))
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, False, True)
    assert (config["quant_method"], config["checkpoint_format"], config["lm_head"]) == ("gptq", "gptq_v2", False)
    assert config["dynamic"] == {
        r"+:^c\.x$": {"bits": 8, "group_size": -1, "sym": False},
        r"+:^d$": {"bits": 4, "group_size": 32, "sym": True},
        r"-:^left\.alone$": {},
    }
    settings = gptq.parse(config)
    for module, one in weights.items():
        own = settings.of(module)
        assert (own.bits, own.symmetric) == (one.bits, one.symmetric)
        assert own.group_length(one.in_features) == one.group_size


def test_config_has_overrides_by_the_names_of_fused_modules_where_all_parts_agree():
    one = weight(in_features=32, out_features=8, bits=4, symmetric=True)
    other = weight(in_features=32, out_features=8, bits=8, symmetric=True)
    weights = {"0.q_proj": other, "0.k_proj": other, "0.v_proj": other, "0.gate_proj": other, "0.up_proj": one}
    weights |= {f"1.{name}": one for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    dynamic = gptq.describe(weights, [], jnp.dtype("float32"))["dynamic"]
    names = [f"0\\.{name}" for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "qkv_proj")]
    assert dynamic == {f"+:^{name}$": {"bits": 8, "group_size": -1, "sym": True} for name in names}


def test_config_says_which_modules_of_a_block_are_packed():
    one = weight(in_features=32, out_features=8, bits=4, symmetric=True)
    packed = {f"model.layers.{k}.{name}": one for k in (0, 1) for name in ("attn.q_proj", "mlp.up_proj")}
    left = [f"model.layers.{k}.attn.o_proj" for k in (0, 1)]

    def blocks(weights, left):
        return gptq.describe(weights, left, jnp.dtype("float32")).get("modules_in_block_to_quantize")

    assert blocks(packed, left) == [["attn.q_proj", "mlp.up_proj"]]
    assert blocks(packed, ["lm_head"]) is None
    assert blocks({"lm_head": one}, left) == [["lm_head"]]
    del packed["model.layers.0.attn.q_proj"]
    assert blocks(packed, ["model.layers.0.attn.q_proj"]) == [list(packed)]


@pytest.mark.parametrize("columns", [1, 5])
def test_act_order_is_read_and_written_some_columns_at_a_time(columns, monkeypatch):
    one = weight(in_features=64, out_features=8, bits=3, group_size=32, permuted=True)
    tensors = gptq.encode(settings_of(one), one)
    sizes = []

    def counted(words, **options):
        codes = packing.unpack(words, **options)
        sizes.append(codes.size)
        return codes

    monkeypatch.setattr(gptq, "unpack", counted)
    monkeypatch.setattr(gptq, "CODES_AT_ONCE", columns * 64)
    for part, array in gptq.encode(settings_of(one), one).items():
        np.testing.assert_array_equal(array, tensors[part])
    assert_identical(gptq.decode(settings_of(one), "layer", (64, 8), tensors, "float32"), one)
    assert max(sizes) == columns * 64
    assert sum(sizes) == 2 * 64 * 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 5}, r"bits=5; this reads \(2, 3, 4, 8\)"),
        ({}, "bits=None"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"bits": 4, "sym": "false"}, "sym='false'; true or false is allowed"),
        ({"bits": 4, "meta": {"dtypes": ["layer"]}}, "meta and its dtypes must be objects"),
        ({"bits": 4, "meta": {"dtypes": {"layer": "int8"}}}, r"meta.dtypes has .int8.; each must be one of"),
        ({"bits": 4, "group_size": 0}, "group_size=0; a positive integer is allowed, or -1"),
        ({"bits": 4, "checkpoint_format": "gptq_p"}, r"checkpoint_format='gptq_p'; this reads \('gptq', 'gptq_v2'\)"),
        ({"bits": 4, "pack_dtype": "int64"}, "pack_dtype='int64'; this reads int32"),
        ({"bits": 4, "dynamic": [1]}, "dynamic, each of its values, and meta must be objects"),
        ({"bits": 4, "meta": "x"}, "dynamic, each of its values, and meta must be objects"),
        ({"bits": 4, "dynamic": {"+:(": {}}}, r"dynamic: .*no regular expression"),
        ({"bits": 4, "dynamic": {"(a+)\\1": {}}}, r"dynamic: "),
    ],
)
def test_unreadable_configs_say_what_is_read(config, message):
    with pytest.raises(ValueError, match=message):
        gptq.parse(config)


def test_a_pattern_that_backtracks_for_ever_ends():
    settings = gptq.parse({"bits": 4, "dynamic": {"+:(([a-z_.0-9]+)+)+$x": {"bits": 8}, r".*\.up_proj": {"bits": 3}}})
    assert settings.of("model.layers.0.mlp.down_proj.with.a.long.name").bits == 4
    assert settings.of("model.layers.0.mlp.up_proj").bits == 3
