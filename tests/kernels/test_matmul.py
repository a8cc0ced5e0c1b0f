"""jgptq.matmul: every implementation against a float64 product of the raw fields; derivatives; bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import tensor
from jgptq.kernels import xla

# Those that run on a CPU, each and as chosen; test_hopper.py and test_tpu.py have the others.
IMPLEMENTATIONS = (None, "xla", "xla_slabs", "xla_codes")
# (bits, group size, symmetric, permuted): each width, a short last group, one group, and both zeros and orders.
WEIGHTS = [
    (2, 32, True, False),
    (3, 24, False, True),
    (4, 32, False, False),
    (4, None, True, True),
    (8, 24, False, False),
    (4, 48, False, True),
    (3, 32, True, False),
]
# Unit roundoff: of the product's result and, in narrow types, of the dequantized weight, each rounded once.
ROUNDOFF = {jnp.float32: 2.0**-24, jnp.bfloat16: 2.0**-9, jnp.float16: 2.0**-12}


def make_weight(bits, group_size, symmetric, permuted, inputs=64, outputs=10):
    rng = np.random.default_rng(0)
    rows = group_size or inputs
    groups = -(-inputs // rows)
    return tensor.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (inputs, outputs)), jnp.uint8),
        jnp.asarray(rng.normal(size=(groups, outputs)), jnp.float32),
        jnp.asarray(rng.integers(0, 2**bits, (groups, outputs)), jnp.uint8),
        grid=jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric),
        permutation=jnp.asarray(rng.permutation(inputs), jnp.int32) if permuted else None,
    )


def exact_matrix(weight) -> np.ndarray:
    return reference.dequantize(
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.permutation,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=64,
    )


def inputs_of(shape, dtype):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32).astype(dtype)


def assert_product(y, x, w, dtype):
    """y = x @ w to within rounding: bounded by the product of magnitudes, as float sums are."""
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    # One rounding of the weight, one of the result, and at worst one a term in the float32 sum.
    bound = (np.abs(x) @ np.abs(w)) * (2 * ROUNDOFF[dtype] + x.shape[-1] * 2.0**-24)
    assert (np.abs(y - x @ w) <= bound).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("parts", WEIGHTS, ids=str)
def test_products_match_float64(parts, dtype, implementation):
    weight = make_weight(*parts)
    x = inputs_of((2, 3, 64), dtype)
    y = jgptq.matmul(x, weight, implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 3, 10), dtype)
    assert_product(y, x, exact_matrix(weight), dtype)


def test_a_permuted_weight_in_bfloat16_under_jit():
    """XLA on CPUs cannot do every bfloat16 product that it makes of a gather and a product."""
    weight, x = make_weight(4, 32, True, True, outputs=64), inputs_of((9, 64), jnp.bfloat16)
    assert_product(jax.jit(jgptq.matmul)(x, weight), x, exact_matrix(weight), jnp.bfloat16)


@pytest.mark.parametrize("order", [lambda weight: weight, jgptq.prepack], ids=["stored", "prepacked"])
@pytest.mark.parametrize("bits", [3, 4])
def test_under_vmap_in_a_choice(bits, order):
    """vmap of a cond maps constants of its branches too, which a custom_vmap would not take."""
    weight, x = make_weight(bits, 32, False, True), inputs_of((2, 3, 64), jnp.float32)

    def f(used, x, weight):
        return jax.lax.cond(used, lambda x: jgptq.matmul(x, weight), lambda x: jnp.zeros((3, 10)), x)

    y = jax.vmap(f, in_axes=(0, 0, None))(jnp.array([True, False]), x, order(weight))
    assert_product(y[0], x[0], exact_matrix(weight), jnp.float32)
    assert not y[1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 0, 64), (2, 1, 5, 64)])
def test_any_leading_shape(shape, implementation):
    weight = make_weight(*WEIGHTS[1])
    x = inputs_of(shape, jnp.float32)
    y = jgptq.matmul(x, weight, implementation=implementation)
    assert y.shape == (*shape[:-1], 10)
    assert_product(y, x, exact_matrix(weight), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=lambda dtype: dtype.__name__)
def test_gradient_and_jvp_are_those_of_the_product(dtype, implementation):
    weight = make_weight(*WEIGHTS[1])
    w = exact_matrix(weight)
    x, tangent, cotangent = inputs_of((3, 64), dtype), inputs_of((3, 64), dtype)[::-1], inputs_of((3, 10), dtype)

    def product(x):
        return jgptq.matmul(x, weight, implementation=implementation)

    _, y_tangent = jax.jvp(product, (x,), (tangent,))
    assert y_tangent.dtype == dtype
    assert_product(y_tangent, tangent, w, dtype)
    (x_cotangent,) = jax.jit(lambda x, c: jax.vjp(product, x)[1](c))(x, cotangent)
    assert x_cotangent.dtype == dtype
    assert_product(x_cotangent, cotangent, w.T, dtype)


def program(f, rows, bits=4, group_size=128, dtype=jnp.float32):
    """f of x and a (512, 1024) weight, compiled."""
    grid = jgptq.Grid(bits=bits, group_size=group_size)
    arrays = (512, 1024), (-(-512 // (group_size or 512)), 1024)
    codes, scales = (
        jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(arrays, ("uint8", "float16"), strict=True)
    )
    weight = jax.eval_shape(
        lambda codes, scales: tensor.from_codes(codes, scales, scales.astype(jnp.uint8), grid=grid), codes, scales
    )
    return jax.jit(f).lower(jax.ShapeDtypeStruct((rows, 512), dtype), weight).compile()


DERIVATIVES = {
    "product": jgptq.matmul,
    "gradient": lambda x, weight: jax.vjp(lambda x: jgptq.matmul(x, weight), x)[1](jnp.ones((x.shape[0], 1024)))[0],
    "value and gradient": lambda x, weight: jax.value_and_grad(lambda x: (jgptq.matmul(x, weight) ** 2).sum())(x),
    "tangent": lambda x, weight: jax.jvp(lambda x: jgptq.matmul(x, weight), (x,), (x[::-1],)),
    "each row's gradient": lambda x, weight: jax.vmap(jax.grad(lambda x: (jgptq.matmul(x, weight) ** 2).sum()))(x),
}


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_few_rows_take_no_memory_of_the_weights_size(name, rows):
    """Beyond what inputs and results take, at most an eighth of what the dequantized weight would."""
    memory = program(DERIVATIVES[name], rows).memory_analysis().temp_size_in_bytes
    assert memory < 512 * 1024 * 4 / 8 + 4 * rows * 1024 * 4


def test_what_takes_memory_of_the_weights_size():
    forced = program(lambda x, weight: jgptq.matmul(x, weight, implementation="xla"), 4)
    assert forced.memory_analysis().temp_size_in_bytes >= 512 * 1024 * 4


@pytest.mark.parametrize(
    ("bits", "inputs", "group_size", "symmetric"),
    [(2, 100, 32, False), (3, 150, 64, True), (4, 72, 24, False), (4, 40, None, True), (8, 30, 4, False)],
)
def test_words_as_gpus_take_them(bits, inputs, group_size, symmetric):
    """CPUs, on which all this runs, take them in another way."""
    weight, x = make_weight(bits, group_size, symmetric, False, inputs=inputs), inputs_of((3, inputs), jnp.float32)
    w = np.asarray(weight.dequantize()).astype(np.float64)
    most = np.abs(np.asarray(weight.scales)).max() * 2.0 ** (bits + 1)  # of a code and its zero: they are summed apart
    error = np.abs(np.asarray(xla._by_word(x, weight)) - np.asarray(x).astype(np.float64) @ w)
    assert (error <= np.abs(np.asarray(x)).sum(axis=1, keepdims=True) * most * inputs * 2.0**-24).all()


# bits, inputs, group size: a last slab that is short, slabs in a group, groups in a slab, one group, no slab.
@pytest.mark.parametrize(
    ("bits", "inputs", "group_size", "length"),
    [(4, 1100, 128, 64), (3, 544, 64, 32), (2, 2048, 32, 128), (8, 1000, None, 32), (4, 96, 24, 96), (4, 30, None, 30)],
)
def test_slabs(bits, inputs, group_size, length):
    weight = make_weight(bits, group_size, False, True, inputs=inputs)
    assert xla._slab_length(weight) == length
    x, w = inputs_of((5, inputs), jnp.float32), np.asarray(weight.dequantize()).astype(np.float64)
    y, pull = jax.vjp(lambda x: xla.by_slabs(x, weight, jnp.float32), x)
    assert_product(y, x, w, jnp.float32)
    assert_product(pull(y)[0], y, w.T, jnp.float32)


def test_it_is_the_product_with_the_dequantized_weight():
    weight = make_weight(*WEIGHTS[1])
    x = inputs_of((3, 64), jnp.float32)
    # The same float32 products, summed in stored instead of natural order.
    np.testing.assert_allclose(jgptq.matmul(x, weight), x @ jgptq.dequantize(weight), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("without_type_checker")
class TestMessages:
    def test_another_width(self):
        message = r"x has shape \(3, 63\), but the weight takes 64 features; reshape x to \(..., 64\)"
        with pytest.raises(ValueError, match=message):
            jgptq.matmul(jnp.ones((3, 63)), make_weight(*WEIGHTS[0]))

    def test_no_axis(self):
        with pytest.raises(ValueError, match=r"x has shape \(\), but the weight takes 64 features"):
            jgptq.matmul(jnp.ones(()), make_weight(*WEIGHTS[0]))

    def test_integers(self):
        with pytest.raises(TypeError, match=r"x has dtype int32; give a floating-point array"):
            jgptq.matmul(jnp.ones((3, 64), jnp.int32), make_weight(*WEIGHTS[0]))

    def test_a_stack(self):
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), make_weight(*WEIGHTS[0]))
        with pytest.raises(ValueError, match=r"stack or batch of matrices .*use jax.vmap over x and weight"):
            jgptq.matmul(jnp.ones((3, 64)), stack)

    def test_a_plain_array(self):
        with pytest.raises(TypeError, match=r"give a QuantizedTensor, or use x @ weight for an array"):
            jgptq.matmul(jnp.ones((3, 64)), jnp.ones((64, 10)))

    def test_an_unknown_implementation(self):
        with pytest.raises(ValueError, match=r"implementation='cuda'; choose one of \(.*'xla'.*\), or None"):
            jgptq.matmul(jnp.ones((3, 64)), make_weight(*WEIGHTS[0]), implementation="cuda")
