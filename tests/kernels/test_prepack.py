"""The Hopper kernel's order of codes: where each code lies, by a plain NumPy loop, and the way back, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import tensor
from jgptq.kernels.prepack import Prepacked, prepack_weight, restore, spread

# (bits, inputs, outputs, group size, symmetric, permuted): groups of each kind, and lengths that fill no tile.
WEIGHTS = [
    (2, 64, 10, 32, True, False),
    (3, 96, 10, 24, False, True),
    (4, 256, 130, 128, False, False),
    (4, 200, 10, None, True, True),
    (4, 200, 10, 128, False, False),
    (4, 160, 10, 64, True, True),
    (4, 600, 10, 300, False, False),
    (8, 72, 10, 32, False, False),
    (8, 2100, 3, 128, True, False),
]


def make_weight(bits, inputs, outputs, group_size, symmetric, permuted, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    groups = -(-inputs // (group_size or inputs))
    permutation = np.argsort(rng.random((*batch, inputs)), axis=-1)
    return tensor.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (*batch, inputs, outputs)), jnp.uint8),
        jnp.asarray(rng.normal(size=(*batch, groups, outputs)), jnp.float32),
        jnp.asarray(rng.integers(0, 2**bits, (*batch, groups, outputs)), jnp.uint8),
        grid=jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric),
        permutation=jnp.asarray(permutation, jnp.int32) if permuted else None,
    )


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module", params=WEIGHTS, ids=str)
def both(request):
    """A weight in the checkpoint's order and in the kernel's."""
    weight = make_weight(*request.param)
    return weight, jax.jit(prepack_weight)(weight)


def test_every_code_is_where_its_thread_looks(both):
    """The left operand of wgmma.m64nNk16, PTX ISA: thread 4 r + c of a warp has, of rows r and r + 8, columns
    2 c, 2 c + 1, and these plus 8; so of 128 inputs pairs at 8 p + 2 c, in 16 registers p."""
    weight, packed = both
    bits, words = packed.stored_bits, np.asarray(packed.codes)
    codes = np.asarray(tensor.unpack_codes(weight)).astype(np.int64)
    rng = np.random.default_rng(1)
    for k, n in zip(rng.integers(0, weight.in_features, 200), rng.integers(0, weight.out_features, 200), strict=True):
        group, within = divmod(int(k), weight.group_size)
        block, place = divmod(group * packed.slots + within, 128)
        p, rest = divmod(place, 8)
        c, half = divmod(rest, 2)
        own = p // (16 // bits)  # of the thread's words
        word = int(words[block * packed.outputs + n, own // 4 * 16 + 4 * c + own % 4])
        assert (word >> (16 * half + bits * (p % (16 // bits)))) % 2**bits == codes[k, n]


def test_there_and_back(both):
    weight, packed = both
    assert_same(jax.jit(restore)(packed), weight)


def test_a_tree_there_and_back():
    params = {"w": make_weight(*WEIGHTS[3]), "b": jnp.ones(3)}
    packed = jgptq.prepack(params)
    assert isinstance(packed["w"], Prepacked)
    assert packed["w"].shape == params["w"].shape
    assert_same(jgptq.unprepack(packed), params)
    np.testing.assert_array_equal(packed["w"].dequantize(), params["w"].dequantize())


def test_a_stack_of_batches_there_and_back():
    weight = make_weight(4, 96, 10, 32, False, True, batch=(2, 3))
    assert_same(restore(prepack_weight(weight)), weight)
    assert_same(jax.jit(jax.vmap(restore))(jax.vmap(prepack_weight)(weight)), weight)


def test_each_input_goes_where_its_codes_are(both):
    weight, packed = both
    x = np.random.default_rng(2).normal(size=(2, weight.in_features)).astype(np.float32)
    places = np.asarray(spread(jnp.asarray(x), packed))
    assert places.shape == (2, packed.codes.shape[0] // packed.outputs * 128)
    group, within = np.divmod(np.arange(weight.in_features), weight.group_size)
    np.testing.assert_array_equal(places[:, group * packed.slots + within], x)
    assert np.count_nonzero(places) == x.size


def test_it_takes_as_much_as_before():
    """4 bits, groups of 128, sizes of whole tiles: not a byte more."""
    weight = make_weight(4, 256, 128, 128, False, False)
    assert prepack_weight(weight).nbytes == weight.nbytes


def test_its_repr():
    weight = make_weight(4, 256, 128, 128, False, False)
    assert repr(prepack_weight(weight)) == "Prepacked(float32[256, 128], 4 bits, group 128, asymmetric)"


@pytest.mark.usefixtures("without_type_checker")
def test_zeros_of_a_foreign_file_stay_in_their_order():
    weight = make_weight(4, 64, 10, 32, False, False)
    weight = tensor.QuantizedTensor(**{**vars(weight), "zeros": weight.zeros.astype(jnp.float32) + 0.5})
    assert jgptq.prepack([weight])[0] is weight
    with pytest.raises(ValueError, match=r"zeros of this weight are float32, .*in which jgptq.matmul takes it too"):
        prepack_weight(weight)
