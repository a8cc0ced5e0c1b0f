"""One weight of a stack: the product reads it where it is, and is that of the weight by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import tensor

LAYERS, INPUTS, OUTPUTS = 3, 256, 512  # enough codes for the product by codes


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "permuted"])
def stack(request):
    rng = np.random.default_rng(0)
    orders = np.argsort(rng.random((LAYERS, INPUTS)), axis=-1)
    return tensor.from_codes(
        jnp.asarray(rng.integers(0, 16, (LAYERS, INPUTS, OUTPUTS)), jnp.uint8),
        jnp.asarray(rng.normal(size=(LAYERS, 8, OUTPUTS)), jnp.float32),
        jnp.asarray(rng.integers(0, 16, (LAYERS, 8, OUTPUTS)), jnp.uint8),
        grid=jgptq.Grid(bits=4, group_size=32),
        permutation=jnp.asarray(orders, jnp.int32) if request.param else None,
    )


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rows", [2, 9])
def test_products_match_float64(stack, rows):
    x = inputs(rows, INPUTS)
    product = jax.jit(lambda x, index: jgptq.matmul(x, tensor.Element(stack=stack, index=index)))
    weights = np.asarray(stack.dequantize()).astype(np.float64)
    for index in range(LAYERS):
        exact = np.asarray(x).astype(np.float64) @ weights[index]
        # At worst one float32 rounding a term, and products of codes before zeros are taken away.
        bound = INPUTS * 2.0**-24 * 16 * (abs(np.asarray(x)) @ abs(weights[index]) + 1)
        assert (abs(np.asarray(product(x, index)) - exact) <= bound).all()


def test_a_scan_makes_no_copy_of_codes(stack):
    def by_element(x, stack):
        return jax.lax.fori_loop(
            0, LAYERS, lambda k, x: x + jgptq.matmul(x, tensor.Element(stack=stack, index=k))[:, :INPUTS], x
        )

    program = jax.jit(by_element).lower(inputs(1, INPUTS), stack).compile()
    assert program.memory_analysis().temp_size_in_bytes < stack.codes.nbytes / LAYERS


def test_a_slab_is_read_in_the_stack(stack):
    """Of 32 inputs, 4 words; the whole weight has 32."""
    product = jax.jit(lambda x, index: jgptq.matmul(x, tensor.Element(stack=stack, index=index)))
    text = product.lower(inputs(9, INPUTS), 1).as_text()
    assert f"tensor<1x4x{OUTPUTS}xui32>" in text
    assert f"tensor<1x32x{OUTPUTS}xui32>" not in text


def test_derivatives_and_batches(stack):
    x, index = inputs(LAYERS, 2, INPUTS), jnp.arange(LAYERS)

    def loss(x, index):
        return (jgptq.matmul(x, tensor.Element(stack=stack, index=index)) ** 2).sum()

    def plain(x, weight):
        return (jgptq.matmul(x, weight) ** 2).sum()

    found = jax.jit(jax.vmap(jax.grad(loss)))(x, index)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(jax.grad(plain)))(x, stack), rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("without_type_checker")
def test_a_stack_of_stacks_is_refused(stack):
    twice = jax.tree.map(lambda leaf: leaf[None], stack)
    with pytest.raises(ValueError, match=r"weight is a stack or batch of matrices \(codes \(1, 3, 32, 512\)\)"):
        jgptq.matmul(inputs(1, INPUTS), tensor.Element(stack=twice, index=0))
    with pytest.raises(TypeError, match="weight is a ArrayImpl"):
        jgptq.matmul(inputs(1, INPUTS), tensor.Element(stack=inputs(2, INPUTS, 3), index=0))
