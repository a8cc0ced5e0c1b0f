"""The Hopper kernel without a Hopper: it lowers; its values in the interpreter are those of float64.

The interpreter runs the kernel's own grid, pipeline, indices and sums; what a thread does with its registers is checked
by test_prepack.py and by benchmarks/gpu.py, on a GPU.
"""

import dataclasses
import functools
import math
import re

import emulated_mosaic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_prepack import make_weight

import jgptq
from jgptq import tensor
from jgptq.kernels import hopper
from jgptq.kernels.grouped import grouped_matmul

MESH = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
)


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import params  # public from JAX 0.11 on

    return params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True))


# (bits, inputs, outputs, group size, symmetric, permuted), rows, programs that share the inputs, the result's dtype
PRODUCTS = [
    ((4, 256, 130, 128, False, False), 3, 1, "float32"),
    ((4, 200, 10, None, True, True), 1, 1, "float32"),
    ((4, 160, 10, 64, False, True), 9, 1, "bfloat16"),
    ((2, 100, 10, 24, False, False), 2, 1, "float16"),
    ((8, 72, 10, 32, False, False), 2, 1, "float32"),
    ((4, 2048, 128, 256, True, False), 5, 4, "bfloat16"),
]


@pytest.mark.parametrize(("parts", "rows", "split", "result"), PRODUCTS, ids=str)
def test_values_match_float64(parts, rows, split, result):
    weight = make_weight(*parts)
    packed = jgptq.prepack(weight)
    assert hopper.Plan.of(rows, packed).split == split
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, weight.in_features)), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(MESH), interpreter():
        y = jax.jit(lambda x, w: hopper.matmul(x, w, result, operations=emulated_mosaic))(x, packed)
    assert y.dtype == result
    exact = np.asarray(x).astype(np.float64), np.asarray(weight.dequantize()).astype(np.float64)
    # Products are exact and summed in float32: at worst one rounding a term; and one of the result.
    bound = weight.in_features * 2.0**-24 * (abs(exact[0]) @ abs(exact[1]) * 4)
    bound += float(jnp.finfo(result).eps) * abs(exact[0] @ exact[1])
    assert (abs(np.asarray(y).astype(np.float64) - exact[0] @ exact[1]) <= bound).all()


def test_one_of_a_stack_is_read_where_it_is():
    parts = (4, 256, 10, 32, False, True)
    stack = jgptq.prepack(make_weight(*parts, batch=(3,)))
    stack = dataclasses.replace(stack, layout=tensor.Layout.dense(*parts[1:3]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, parts[1])), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(MESH), interpreter():
        run = jax.jit(lambda x, w: hopper.matmul(x, w, jnp.float32, operations=emulated_mosaic))
        for index in range(3):
            element = tensor.Element(stack=stack, index=jnp.int32(index))
            np.testing.assert_array_equal(run(x, element), run(x, element.taken()))


# bits, inputs, outputs, group size, symmetric, rows, dtype: each form of decoding, of groups and of plans.
LOWERED = [
    (4, 4096, 4096, 128, False, 1, jnp.bfloat16),
    (4, 4096, 4096, 32, False, 16, jnp.float16),
    (4, 512, 14336, 64, True, 128, jnp.bfloat16),
    (4, 14336, 4096, None, True, 300, jnp.bfloat16),
    (4, 1024, 33792, 128, True, 32, jnp.bfloat16),
    (3, 1000, 200, 128, False, 7, jnp.float16),
    (2, 512, 256, 24, False, 5, jnp.bfloat16),
    (8, 4096, 4096, 128, False, 1, jnp.bfloat16),
    (8, 512, 256, 32, True, 64, jnp.bfloat16),
    (8, 512, 256, 64, False, 8, jnp.float16),
]


def shapes(bits, inputs, outputs, group_size, symmetric, rows, dtype):
    """x and a permuted prepacked weight, as shapes."""
    group_count = -(-inputs // (group_size or inputs))

    def make(codes, scales):
        grid = jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric)
        return tensor.from_codes(codes, scales, scales.astype(jnp.uint8), grid=grid, permutation=jnp.arange(inputs))

    arrays = jax.ShapeDtypeStruct((inputs, outputs), jnp.uint8), jax.ShapeDtypeStruct((group_count, outputs), dtype)
    weight = jax.eval_shape(lambda *arrays: jgptq.prepack(make(*arrays)), *arrays)
    return jax.ShapeDtypeStruct((rows, inputs), dtype), weight


def lowered(f, *arguments, platform="cuda"):
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return text.count("mosaic_gpu_v2")


@pytest.mark.parametrize("product", LOWERED, ids=str)
def test_it_lowers_for_cuda(product):
    rows = product[-2]
    x, weight = shapes(*product)
    assert kernels(lowered(functools.partial(jgptq.matmul, implementation="hopper"), x, weight)) == -(-rows // 128)


@pytest.mark.parametrize("rows", [16, 128])
def test_a_kernel_that_shares_no_inputs_writes_the_result(rows):
    """Nothing is added, turned or rounded behind it."""
    x, weight = shapes(4, 512, 14336, 64, True, rows, jnp.float16)
    text = lowered(functools.partial(jgptq.matmul, implementation="hopper"), x, weight)
    result = f"tensor<{rows}x14336xf16>"
    assert re.search(rf"(%\d+) = stablehlo.custom_call @mosaic_gpu_v2.*-> {result}\n\s+return \1 : {result}", text)


SMALL = (4, 256, 128, 32, False, 4, jnp.bfloat16)


class TestDispatch:
    """Which programs hold the kernel."""

    def test_by_platform(self):
        assert kernels(lowered(jgptq.matmul, *shapes(*SMALL))) == 1
        assert kernels(lowered(jgptq.matmul, *shapes(*SMALL), platform="cpu")) == 0
        assert kernels(lowered(jgptq.matmul, *shapes(*SMALL), platform="tpu")) == 0

    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("prepacked", [True, False])
    def test_another_gpu_multiplies_codes(self, rows, prepacked):
        """And asks for no matrix product, whose operand would be the weight, written out. benchmarks/sass.py has the
        memory that this takes on an A100."""
        x, weight = shapes(4, 512, 256, 32, False, rows, jnp.bfloat16)
        weight = weight if prepacked else jax.eval_shape(jgptq.unprepack, weight)
        ampere = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=ampere)):
            text = jax.jit(jgptq.matmul).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
        assert kernels(text) == 0
        assert "dot_general" not in text

    def test_not_where_xla_would_have_to_divide_it(self):
        """XLA divides no kernel between devices: there it is for what shard_map has divided."""
        several = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=MESH.abstract_device)
        one = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=MESH.abstract_device)
        for mesh, count in ((several, 0), (one, 1)):
            with jax.sharding.use_abstract_mesh(mesh):
                traced = jax.jit(jgptq.matmul).trace(*shapes(*SMALL))
                assert kernels(traced.lower(lowering_platforms=("cuda",)).as_text()) == count

    def test_by_rows_and_dtype(self):
        x, weight = shapes(*SMALL)
        many = jax.ShapeDtypeStruct((129, x.shape[1]), x.dtype)
        wide = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        assert kernels(lowered(jgptq.matmul, many, weight)) == 0
        assert kernels(lowered(jgptq.matmul, wide, weight)) == 0

    def test_vmap_over_x_is_one_product(self):
        x, weight = shapes(*SMALL)
        x = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        text = lowered(jax.vmap(jgptq.matmul, in_axes=(0, None)), x, weight)
        assert kernels(text) == 1
        assert "stablehlo.while" not in text

    def test_stacks_under_vmap_and_scan(self):
        x, weight = shapes(*SMALL)
        stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), (x, weight))

        def scanned(x, weight):
            return jax.lax.scan(lambda carry, both: (carry, jgptq.matmul(*both)), 0, (x, weight))[1]

        for f in (jax.vmap(jgptq.matmul), scanned):
            text = lowered(f, *stack)
            assert kernels(text) == 1
            assert "stablehlo.while" in text

    def test_one_of_a_stack_is_not_sliced(self):
        """Slices of inputs there are, but none of 32-bit words."""
        x, weight = shapes(*SMALL)
        stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), weight)

        def scanned(x, stack):
            def step(x, index):
                return x, jgptq.matmul(x, tensor.Element(stack=stack, index=index))

            return jax.lax.scan(step, x, jnp.arange(3))[1]

        text = lowered(scanned, x, stack)
        assert kernels(text) == 1
        assert "stablehlo.while" in text
        used = [line for line in text.splitlines() if "dynamic_slice" in line and "ui32" in line]
        assert used == [], used

    @pytest.mark.parametrize("layers", [None, 3])
    @pytest.mark.parametrize("rows", [2, 32])
    def test_experts(self, rows, layers):
        """One after another, in a loop over their rows; the kernel is given all codes, those of all layers too."""
        x, weight = shapes(*SMALL)
        lead = (8,) if layers is None else (layers, 8)
        stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), weight)
        x, counts = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype), jax.ShapeDtypeStruct((8,), jnp.int32)

        def product(x, stack, counts, layer):
            weight = stack if layers is None else tensor.Element(stack=stack, index=layer)
            return grouped_matmul(x, weight, counts)

        text = lowered(product, x, stack, counts, jax.ShapeDtypeStruct((), jnp.int32))
        (kernel,) = (line for line in text.splitlines() if "mosaic_gpu_v2" in line)
        words, width = weight.codes.shape
        assert f"tensor<{math.prod(lead) * words}x{width}xui32>" in kernel
        assert "stablehlo.while" in text
        used = [line for line in text.splitlines() if "dynamic_slice" in line and "ui32" in line]
        assert used == [], used

    def test_under_derivatives(self):
        x, weight = shapes(*SMALL)
        for f in (
            lambda x, weight: jax.jvp(lambda x: jgptq.matmul(x, weight), (x,), (x,)),
            lambda x, weight: jax.value_and_grad(lambda x: jgptq.matmul(x, weight).sum())(x),
        ):
            assert kernels(lowered(f, x, weight)) == 1


@pytest.mark.parametrize("transform", ["plain", "grad", "vmap", "quantized"])
def test_on_a_cpu_a_prepacked_weight_gives_what_it_gave_before(transform):
    """With an asymmetric, permuted weight, for which XLA serves both orders."""
    weight = make_weight(4, 160, 10, 64, False, True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 160)), jnp.float32)
    f = {
        "plain": jgptq.matmul,
        "grad": jax.grad(lambda x, weight: (jgptq.matmul(x, weight) ** 2).sum()),
        "vmap": lambda x, weight: jax.vmap(jgptq.matmul)(x, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), weight)),
        "quantized": lambda x, weight: jgptq.quantized(lambda w, x: x @ w)(weight, x),
    }[transform]
    np.testing.assert_array_equal(jax.jit(f)(x, jgptq.prepack(weight)), jax.jit(f)(x, weight))


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    def test_another_order(self):
        weight = make_weight(4, 64, 10, 32, False, False)
        with pytest.raises(ValueError, match=r"the weight is a QuantizedTensor; give jgptq.prepack\(weight\)"):
            jgptq.matmul(jnp.ones((3, 64), jnp.bfloat16), weight, implementation="hopper")

    def test_another_dtype(self):
        weight = jgptq.prepack(make_weight(4, 64, 10, 32, False, False))
        with pytest.raises(ValueError, match=r"x is float32; cast it to one of \('bfloat16', 'float16'\)"):
            jgptq.matmul(jnp.ones((3, 64)), weight, implementation="hopper")
