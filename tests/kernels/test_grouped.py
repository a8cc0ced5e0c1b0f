"""grouped_matmul: each row times its own group's matrix, in float64; what it leaves alone; memory; derivatives."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from test_matmul import assert_product
from test_prepack import make_weight

import jgptq
from jgptq import tensor
from jgptq.kernels.grouped import grouped_matmul


def stack(bits=4, inputs=64, outputs=10, group_size=32, symmetric=False, permuted=True, groups=3):
    return make_weight(bits, inputs, outputs, group_size, symmetric, permuted, batch=(groups,))


def exact(x, matrices, counts):
    """Row after row."""
    groups = np.repeat(np.arange(len(counts)), counts)
    result = np.zeros((x.shape[0], matrices.shape[-1]))
    for row, group in enumerate(groups):
        result[row] = np.asarray(x[row]).astype(np.float64) @ matrices[group]
    return result


def assert_grouped(y, x, weight, counts, dtype=jnp.float32):
    """Each group's rows as `assert_product` wants them; zeros behind."""
    matrices = np.asarray(weight.dequantize()).astype(np.float64)
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        assert_product(y[start : start + count], x[start : start + count], matrix, dtype)
        start += count
    assert not np.asarray(y[start:]).any()


def inputs(rows, features, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, features)), dtype)


# A row each; empty groups; fewer rows than groups; one group with all; tiles that are full, filled up and left over;
# rows behind the last group.
COUNTS = [(1, 1, 1), (0, 2, 0), (0, 0, 1), (0, 9, 0), (3, 0, 4), (4, 8, 1), (1, 1, 17), (5, 2, 4), (0, 0, 0)]


@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_meets_its_own_matrix(counts, behind):
    weight, x = stack(), inputs(sum(counts) + behind, 64)
    y = grouped_matmul(x, weight, jnp.asarray(counts, jnp.int32))
    assert y.shape == (sum(counts) + behind, 10)
    assert_grouped(y, x, weight, counts)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_narrow_inputs(dtype):
    weight, x = stack(8, symmetric=True), inputs(7, 64, dtype)
    y = grouped_matmul(x, weight, jnp.asarray((3, 0, 4), jnp.int32))
    assert y.dtype == dtype
    assert_grouped(y, x, weight, (3, 0, 4), dtype)
    wide = grouped_matmul(x, jgptq.prepack(weight), jnp.asarray((3, 0, 4), jnp.int32), preferred_element_type="float32")
    assert wide.dtype == jnp.float32


def test_matrices_of_other_groups_are_not_touched():
    """A product with all of them would give NaN, even with rows of zeros."""
    weight, counts = stack(), (2, 0, 3)
    bad = tensor.QuantizedTensor(**{**vars(weight), "scales": weight.scales.at[1].set(jnp.nan)})
    x = inputs(5, 64)
    y = grouped_matmul(x, bad, jnp.asarray(counts, jnp.int32))
    np.testing.assert_array_equal(y, grouped_matmul(x, weight, jnp.asarray(counts, jnp.int32)))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("counts", [(1, 0, 1), (3, 0, 4)], ids=str)
def test_derivatives(counts):
    weight, x = stack(), inputs(sum(counts), 64)
    sizes, cotangent = jnp.asarray(counts, jnp.int32), inputs(sum(counts), 10)

    def product(x):
        return grouped_matmul(x, weight, sizes)

    y, tangent = jax.jvp(product, (x,), (x[::-1],))
    np.testing.assert_array_equal(y, product(x))
    assert_grouped(tangent, x[::-1], weight, counts)
    (x_cotangent,) = jax.jit(lambda x, c: jax.vjp(product, x)[1](c))(x, cotangent)
    transposed = np.asarray(weight.dequantize()).astype(np.float64).swapaxes(1, 2)
    np.testing.assert_allclose(x_cotangent, exact(cotangent, transposed, counts), rtol=1e-4, atol=1e-4)


def test_under_vmap_and_scan():
    """Each layer has its own stack and its own counts."""
    weight = make_weight(4, 64, 10, 32, False, True, batch=(2, 3))
    layers = [jax.tree.map(lambda array, layer=layer: array[layer], weight) for layer in range(2)]
    x, counts = inputs(10, 64).reshape(2, 5, 64), ((1, 4, 0), (2, 0, 3))
    expected = [exact(x[k], np.asarray(layers[k].dequantize()), counts[k]) for k in range(2)]
    sizes = jnp.asarray(counts, jnp.int32)
    mapped = jax.vmap(grouped_matmul)(x, weight, sizes)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)
    scanned = jax.lax.scan(lambda carry, step: (carry, grouped_matmul(*step)), 0, (x, weight, sizes))[1]
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-4)
    chosen = jax.jit(lambda x, index, sizes: grouped_matmul(x, tensor.Element(stack=weight, index=index), sizes))
    for layer in range(2):
        np.testing.assert_array_equal(chosen(x[layer], layer, sizes[layer]), scanned[layer])
    each = jax.vmap(grouped_matmul, in_axes=(0, None, 0))(x, layers[0], sizes)
    np.testing.assert_allclose(
        each[1], exact(x[1], np.asarray(layers[0].dequantize()), counts[1]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rows", [2, 32, 256])
@pytest.mark.parametrize("derivative", [False, True])
def test_no_more_than_a_matrix_is_in_float(rows, derivative):
    weight = jax.eval_shape(lambda: stack(4, 512, 512, 128, permuted=False, groups=8))
    x, counts = jax.ShapeDtypeStruct((rows, 512), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def f(x, weight, counts):
        product = lambda x: (grouped_matmul(x, weight, counts) ** 2).sum()  # noqa: E731
        return jax.grad(product)(x) if derivative else grouped_matmul(x, weight, counts)

    memory = jax.jit(f).lower(x, weight, counts).compile().memory_analysis().temp_size_in_bytes
    assert memory < 512 * 512 * 4 + 12 * rows * 512 * 4


def test_a_program_for_any_number_of_rows():
    (rows,) = jax.export.symbolic_shape("rows")
    weight, counts = stack(), jnp.asarray((3, 0, 4), jnp.int32)
    shapes = jax.ShapeDtypeStruct((rows, 64), jnp.float32), weight, counts
    x = inputs(8, 64)
    assert_grouped(jax.export.export(jax.jit(grouped_matmul))(*shapes).call(x, weight, counts), x, weight, (3, 0, 4))


def test_quantized_serves_ragged_dot():
    """The same program as of the product itself; for a leaf in (experts, out, in) order too."""
    weight, x, counts = stack(), inputs(7, 64), jnp.asarray((3, 0, 4), jnp.int32)
    y = jgptq.quantized(lambda w, x: jax.lax.ragged_dot(x, w, counts))(weight, x)
    np.testing.assert_array_equal(y, grouped_matmul(x, weight, counts))
    layout = tensor.Layout(shape=(3, 10, 64), factors=(3, 10, 64), batch_axes=(0,), in_axes=(2,), out_axes=(1,))
    turned = tensor.QuantizedTensor(**{**vars(weight), "layout": layout})
    y = jgptq.quantized(lambda w, x: jax.lax.ragged_dot(x, w.swapaxes(1, 2), counts))(turned, x)
    np.testing.assert_array_equal(y, grouped_matmul(x, weight, counts))


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    def test_counts(self):
        with pytest.raises(ValueError, match=r"codes \(3, 8, 10\), but there are 2 counts; give a stack of one matrix"):
            grouped_matmul(inputs(2, 64), stack(), jnp.ones(2, jnp.int32))

    def test_features(self):
        with pytest.raises(ValueError, match=r"x has shape \(2, 63\), but the weight takes 64 features"):
            grouped_matmul(inputs(2, 63), stack(), jnp.ones(3, jnp.int32))

    def test_an_array(self):
        with pytest.raises(
            TypeError, match=r"weight is a ArrayImpl; give a QuantizedTensor, or use jax.lax.ragged_dot"
        ):
            grouped_matmul(inputs(2, 64), jnp.ones((3, 64, 10)), jnp.ones(3, jnp.int32))
