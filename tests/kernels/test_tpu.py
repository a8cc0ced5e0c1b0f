"""The TPU kernel without a TPU: it lowers; its values in the interpreter are those of float64.

benchmarks/tpu.py compiles it for the machine itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_hopper import shapes
from test_prepack import make_weight

import jgptq
from jgptq import tensor
from jgptq.kernels import tpu

DEVICE = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
MESH = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
force = functools.partial(jgptq.matmul, implementation="tpu")


@pytest.fixture
def interpreter():
    """What lies outside an array, and what nothing was written to, is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


# (bits, inputs, outputs, group size, symmetric, permuted), rows, dtype: groups that share a chunk, fill several, or are
# one; inputs, outputs and rows that fill no tile; several steps along each axis of the grid.
PRODUCTS = [
    ((4, 256, 130, 128, False, False), 3, jnp.bfloat16),
    ((4, 200, 10, None, True, True), 1, jnp.float32),
    ((4, 160, 10, 64, False, True), 9, jnp.bfloat16),
    ((8, 72, 10, 32, False, False), 2, jnp.float32),
    ((8, 328, 10, 128, True, False), 2, jnp.bfloat16),
    ((4, 4112, 520, 256, True, False), 5, jnp.bfloat16),
    ((4, 96, 10, 32, False, True), 130, jnp.bfloat16),
]


def assert_product(y, x, weight):
    x, w = np.asarray(x).astype(np.float64), np.asarray(weight.dequantize()).astype(np.float64)
    step = np.abs(np.asarray(weight.scales).astype(np.float64)).max(axis=0)
    # Products, of inputs and 128 + code, or 17 times 128 + code, are exact. A chunk's 128 are added in 7 levels, in
    # float32, and corrected.
    most = {4: 128 + 2 * 15, 8: 17 * 128 + 2 * 255}[weight.bits]
    bound = np.abs(x).sum(axis=1, keepdims=True) * step * most * 2.0**-24 * 8
    assert (np.abs(np.asarray(y) - x @ w) <= bound).all()
    assert (bound < 0.05 * np.abs(x) @ np.abs(w)).all()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("parts", "rows", "dtype"), PRODUCTS, ids=str)
def test_values_match_float64(parts, rows, dtype):
    weight = make_weight(*parts)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, weight.in_features)), dtype)
    assert_product(jax.jit(functools.partial(force, preferred_element_type=jnp.float32))(x, weight), x, weight)


@pytest.mark.usefixtures("interpreter")
def test_a_stack_and_a_gradient():
    weight = make_weight(4, 64, 10, 32, False, False, batch=(2,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 64)), jnp.float32)
    y, pull = jax.vjp(lambda x: jax.vmap(force)(x, weight), x)
    dense = weight.dequantize()
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    np.testing.assert_allclose(pull(y)[0], y @ dense.mT, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 2.0**-14, 6e-5, -(2.0**-24), 65504.0, -1e-6])
def test_float16_from_its_bits(value):
    half = jnp.full((8, 128), value, jnp.float16)
    found = tpu._as_float32(jax.lax.bitcast_convert_type(half, jnp.int16), jnp.float16)
    np.testing.assert_array_equal(found, half.astype(jnp.float32))


# bits, inputs, outputs, group size, symmetric, rows, dtype
LOWERED = [
    (4, 4096, 4096, 128, True, 1, jnp.bfloat16),
    (4, 4096, 14336, 128, False, 16, jnp.bfloat16),
    (4, 14336, 4096, 32, False, 128, jnp.bfloat16),
    (4, 1000, 200, None, True, 7, jnp.float32),
    (4, 512, 512, 64, False, 300, jnp.bfloat16),
    (8, 4096, 4096, 64, False, 8, jnp.float32),
    (8, 1000, 300, 32, True, 33, jnp.bfloat16),
    (8, 1024, 10, 256, True, 2, jnp.bfloat16),
]


def natural(*product):
    x, weight = shapes(*product)
    return x, jax.eval_shape(jgptq.unprepack, weight)


def lowered(f, *arguments, mesh=MESH):
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def kernels(text):
    return text.count("tpu_custom_call")


@pytest.mark.parametrize("product", LOWERED, ids=str)
def test_it_lowers_for_tpu(product):
    assert kernels(lowered(force, *natural(*product))) == 1


SMALL = (4, 256, 128, 32, False, 4, jnp.bfloat16)


class TestDispatch:
    """Which programs hold the kernel."""

    def test_for_a_tpu(self):
        assert kernels(lowered(jgptq.matmul, *natural(*SMALL))) == 1
        with jax.sharding.use_abstract_mesh(MESH):
            text = jax.jit(jgptq.matmul).trace(*natural(*SMALL)).lower(lowering_platforms=("cpu",)).as_text()
        assert kernels(text) == 0

    @pytest.mark.parametrize(
        "product",
        [
            (3, 256, 128, 32, False, 4, jnp.bfloat16),
            (4, 256, 128, 24, False, 4, jnp.bfloat16),
            (4, 256, 128, 32, False, 4, jnp.float16),
            (4, 256, 128, 32, False, 129, jnp.bfloat16),
        ],
        ids=["3 bits", "groups of 24", "float16", "129 rows"],
    )
    def test_not_for_what_it_does_not_serve(self, product):
        assert kernels(lowered(jgptq.matmul, *natural(*product))) == 0

    @pytest.mark.parametrize(("checked", "count"), [(None, 0), (False, 1), (True, 0)])
    def test_among_several_where_shard_map_divides(self, checked, count):
        """XLA divides no kernel, and a checked shard_map wants to know along which axes results vary."""
        several = jax.sharding.AbstractMesh((4,), ("x",), abstract_device=DEVICE)
        f, (x, weight) = jgptq.matmul, natural(*SMALL)
        if checked is not None:
            rows = jax.sharding.PartitionSpec("x")
            specs = {"in_specs": (rows, jax.sharding.PartitionSpec()), "out_specs": rows}
            f = jax.shard_map(jgptq.matmul, mesh=several, check_vma=checked, **specs)
            x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(several, rows))
        assert kernels(lowered(f, x, weight, mesh=several)) == count


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    @pytest.mark.parametrize(
        ("weight", "dtype", "reason"),
        [
            ((3, 64, 10, 32), jnp.bfloat16, "the weight has 3 bits, and 4 or 8 are served; leave the choice to None"),
            ((4, 64, 10, 24), jnp.bfloat16, "the weight has groups of 24, and 32, 64, multiples of 128 and one group"),
            ((4, 64, 10, 32), jnp.float16, "x is float16; cast it to bfloat16 or float32"),
        ],
    )
    def test_what_it_does_not_serve(self, weight, dtype, reason):
        message = f'implementation="tpu" cannot serve this product: {reason}'
        with pytest.raises(ValueError, match=message):
            force(jnp.ones((3, 64), dtype), make_weight(*weight, False, False))

    def test_another_order(self):
        weight = jgptq.prepack(make_weight(4, 64, 10, 32, False, False))
        with pytest.raises(ValueError, match=r"the weight is Prepacked, for a GPU; give jgptq.unprepack\(weight\)"):
            force(jnp.ones((3, 64)), weight)

    def test_zeros_of_a_foreign_file(self):
        weight = make_weight(4, 64, 10, 32, False, False)
        weight = tensor.QuantizedTensor(**{**vars(weight), "zeros": weight.zeros.astype(jnp.float32) + 0.5})
        with pytest.raises(ValueError, match=r"the weight's zeros are float32, and uint8 ones are served"):
            force(jnp.ones((3, 64)), weight)
