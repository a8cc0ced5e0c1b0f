"""QuantizedTensor: what it stands for, its bytes, and that every transformation of JAX carries it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq import tensor
from jgptq.tensor import Layout, QuantizedTensor


def random_tensor(bits=3, group_size=24, symmetric=False, permuted=False, layout=None, seed=0, dtype=jnp.float32):
    """A tensor of random fields, (64, 10) unless a layout says otherwise."""
    rng = np.random.default_rng(seed)
    layout = layout or Layout.dense(64, 10)
    batch = layout.sizes(layout.batch_axes)
    rows, out = layout.in_features, layout.out_features
    groups = -(-rows // group_size)
    return tensor.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (*batch, rows, out)), jnp.uint8),
        jnp.asarray(rng.normal(size=(*batch, groups, out)), jnp.float32),
        None if symmetric else jnp.asarray(rng.integers(0, 2**bits, (*batch, groups, out)), jnp.uint8),
        grid=jgptq.Grid(bits=bits, group_size=group_size, symmetric=symmetric),
        permutation=jnp.asarray(rng.permutation(rows), jnp.int32) if permuted else None,
        layout=layout,
        dtype=dtype,
    )


def oracle(weight: QuantizedTensor) -> np.ndarray:
    return reference.dequantize(
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.permutation,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "permuted"), [(False, True), (True, False)])
def test_dequantize_matches_raw_fields(bits, symmetric, permuted):
    weight = random_tensor(bits=bits, symmetric=symmetric, permuted=permuted)
    # A float16 scale times an integer below 2^9 is exact in float32.
    np.testing.assert_array_equal(jgptq.dequantize(weight), oracle(weight))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_exactly_those_of_the_parts(bits):
    weight = random_tensor(bits=bits, group_size=32)
    assert weight.nbytes == 64 * 10 * bits // 8 + 2 * 10 * 2 + 2 * 10
    assert random_tensor(bits=bits, group_size=32, symmetric=True).nbytes == 64 * 10 * bits // 8 + 2 * 10 * 2
    assert random_tensor(bits=bits, group_size=32, permuted=True).nbytes == weight.nbytes + 64 * 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logical_dtype_is_that_of_the_array_replaced(dtype):
    weight = random_tensor(dtype=dtype)
    assert (weight.shape, weight.dtype, weight.ndim) == ((64, 10), dtype, 2)
    np.testing.assert_array_equal(weight.dequantize(), jnp.asarray(oracle(weight), jnp.float32).astype(dtype))


def test_transformations_carry_it():
    weight = random_tensor(permuted=True)
    expected = np.asarray(weight.dequantize())
    leaves, structure = jax.tree.flatten(weight)
    assert len(leaves) == 4
    for passed in (
        jax.jit(lambda q: q)(weight),
        jax.device_put(weight, jax.devices()[0]),
        jax.tree.map(lambda leaf: leaf, weight),
        jax.tree.unflatten(structure, leaves),
        jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), {"kernel": weight})["kernel"],
    ):
        assert isinstance(passed, QuantizedTensor)
        np.testing.assert_array_equal(jax.jit(jgptq.dequantize)(passed), expected)
    assert hash(structure) == hash(jax.tree.structure(random_tensor(permuted=True, seed=1)))


def test_eval_shape_gives_shapes_without_arrays():
    weight = random_tensor(symmetric=True)
    shape = jax.eval_shape(lambda q: q, weight)
    assert (shape.shape, shape.dtype, shape.codes.shape, shape.zeros) == ((64, 10), jnp.float32, (6, 10), None)
    assert jax.eval_shape(jgptq.dequantize, weight).shape == (64, 10)
    assert repr(shape) == "QuantizedTensor(float32[64, 10], 3 bits, group 24, symmetric)"


@pytest.mark.parametrize("leaf", [None, object()])
def test_unflattens_with_leaves_that_are_no_arrays(leaf):
    leaves, structure = jax.tree.flatten(random_tensor(permuted=True))
    odd = jax.tree.unflatten(structure, [leaf] * len(leaves))
    assert odd.codes is leaf
    assert "float32[64, 10]" in repr(odd)


def test_a_stack_scans_and_vmaps():
    weights = [random_tensor(permuted=True, seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    expected = np.stack([oracle(weight) for weight in weights])
    assert stack.shape == (3, 64, 10)
    np.testing.assert_array_equal(stack.dequantize(), expected)
    np.testing.assert_array_equal(jax.vmap(jgptq.dequantize)(stack), expected)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
    _, scanned = jax.lax.scan(lambda carry, weight: (carry, jgptq.matmul(x, weight)), None, stack)
    np.testing.assert_allclose(scanned, np.asarray(x) @ expected, rtol=1e-5, atol=1e-4)
    mapped = jax.vmap(jgptq.matmul, in_axes=(None, 0))(x, stack)
    np.testing.assert_allclose(mapped, np.asarray(x) @ expected, rtol=1e-5, atol=1e-4)


# Leaf shape, its layout, and the product x · leaf as an einsum on the leaf itself.
LAYOUTS = {
    "transposed": (Layout(shape=(10, 64), factors=(10, 64), in_axes=(1,), out_axes=(0,)), "ni,oi->no"),
    "heads": (Layout(shape=(64, 5, 2), factors=(64, 5, 2), in_axes=(0,), out_axes=(1, 2)), "ni,ihd->nhd"),
    "output projection": (Layout(shape=(4, 16, 10), factors=(4, 16, 10), in_axes=(0, 1), out_axes=(2,)), "nhd,hde->ne"),
    "inputs apart and out of order": (
        Layout(shape=(16, 10, 4), factors=(16, 10, 4), in_axes=(2, 0), out_axes=(1,)),
        "nhd,deh->ne",
    ),
    "experts": (
        Layout(shape=(3, 10, 64), factors=(3, 10, 64), batch_axes=(0,), in_axes=(2,), out_axes=(1,)),
        "eni,eoi->eno",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree_with_einsum(name):
    layout, product = LAYOUTS[name]
    rng = np.random.default_rng(0)
    leaf = jnp.asarray(rng.normal(size=layout.shape), jnp.float32)
    matrix = layout.to_matrix(leaf)
    np.testing.assert_array_equal(layout.from_matrix(matrix), leaf)
    stack = jnp.stack([leaf, -leaf])
    np.testing.assert_array_equal(layout.to_matrix(stack)[1], -matrix)
    np.testing.assert_array_equal(layout.from_matrix(layout.to_matrix(stack)), stack)

    x_axes, leaf_axes = product.split("->")[0].split(",")
    x = rng.normal(size=[dict(zip(leaf_axes, layout.shape, strict=True)).get(axis, 7) for axis in x_axes])
    batch = layout.sizes(layout.batch_axes)
    leaf = np.asarray(leaf, np.float64)
    through_matrix = x.reshape(*batch, 7, layout.in_features) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(through_matrix.ravel(), np.einsum(product, x, leaf).ravel(), rtol=1e-12, atol=1e-12)

    weight = random_tensor(layout=layout)
    assert weight.shape == layout.shape == weight.dequantize().shape
    np.testing.assert_array_equal(layout.to_matrix(weight.dequantize()), tensor.matrix(weight))


def test_a_factored_axis_may_play_two_roles():
    # (heads * head_dim, embed) seen as heads of (head_dim, embed) matrices.
    layout = Layout(shape=(12, 5), factors=(3, 4, 5), batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    leaf = jnp.arange(60.0).reshape(12, 5)
    np.testing.assert_array_equal(layout.to_matrix(leaf), leaf.reshape(3, 4, 5))
    np.testing.assert_array_equal(layout.from_matrix(leaf.reshape(3, 4, 5)), leaf)


STACK = Layout(shape=(3, 64, 10), factors=(3, 64, 10), batch_axes=(0,), in_axes=(1,), out_axes=(2,))
CUTS = {  # layout, axis, start, stop
    "a layer of a stack": (STACK, 0, 1, 2),
    "layers of a stack": (STACK, 0, 1, 3),
    "a layer of a stack inside": (
        Layout(shape=(64, 3, 10), factors=(64, 3, 10), batch_axes=(1,), in_axes=(0,), out_axes=(2,)),
        1,
        2,
        3,
    ),
    "outputs": (Layout.dense(64, 10), 1, 3, 8),
    "outputs of a transposed leaf": (Layout(shape=(10, 64), factors=(10, 64), in_axes=(1,), out_axes=(0,)), 0, 3, 8),
    "heads": (Layout(shape=(64, 4, 10), factors=(64, 4, 10), in_axes=(0,), out_axes=(1, 2)), 1, 2, 4),
    "whole pieces of a factored axis": (
        Layout(shape=(12, 5), factors=(3, 4, 5), batch_axes=(0,), in_axes=(1,), out_axes=(2,)),
        0,
        4,
        8,
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_a_slice_of_the_dequantized_array(name):
    layout, axis, start, stop = CUTS[name]
    weight = random_tensor(layout=layout, group_size=4)
    part = tensor.cut(weight, axis, start, stop)
    expected = jax.lax.slice_in_dim(weight.dequantize(), start, stop, axis=axis)
    assert part.shape == expected.shape
    np.testing.assert_array_equal(part.dequantize(), expected)


def test_a_cut_through_the_inputs_cannot_stay_packed():
    assert tensor.cut(random_tensor(), 0, 0, 32) is None
    factored = Layout(shape=(12, 5), factors=(3, 4, 5), batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    assert tensor.cut(random_tensor(layout=factored, group_size=4), 0, 2, 6) is None


JOINS = {  # shape of the leaf, the parts' cuts along each axis, roles of each axis in a part
    "layers": ((3, 64, 10), ([0, 1, 2, 3], [0, 64], [0, 10]), ("out", "in", "out")),
    "layers along an inner axis": ((64, 3, 10), ([0, 64], [0, 1, 2, 3], [0, 10]), ("in", "out", "out")),
    "uneven outputs": ((64, 10), ([0, 64], [0, 5, 7, 10]), ("in", "out")),
    "layers of uneven outputs": ((2, 64, 10), ([0, 1, 2], [0, 64], [0, 6, 10]), ("out", "in", "out")),
    "halves of the inputs": ((64, 10), ([0, 32, 64], [0, 10]), ("in", "out")),
    "experts in layers": ((2, 3, 64, 10), ([0, 1, 2], [0, 3], [0, 64], [0, 10]), ("out", "batch", "in", "out")),
}


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_are_joined_to_the_leaf_they_are_parts_of(name, symmetric):
    shape, cuts, roles = JOINS[name]
    expected = np.zeros(shape, np.float32)
    layouts, parts = {}, {}
    for number, index in enumerate(itertools.product(*map(itertools.pairwise, cuts))):
        own = tuple(stop - start for start, stop in index)
        axes = {role: [a for a, r in enumerate(roles) if r == role and own[a] > 1] for role in ("batch", "in", "out")}
        ones = [axis for axis, size in enumerate(own) if size == 1]
        layouts[index] = Layout(
            shape=own,
            factors=own,
            batch_axes=tuple(axes["batch"]),
            in_axes=tuple(axes["in"]),
            out_axes=(*axes["out"], *ones),
        )
        parts[index] = random_tensor(layout=layouts[index], group_size=16, seed=number, symmetric=symmetric)
        expected[tuple(slice(*bounds) for bounds in index)] = parts[index].dequantize()
    layout = tensor.join_layouts(shape, layouts)
    leaf = tensor.join(layout, parts)
    assert leaf.shape == shape
    np.testing.assert_array_equal(leaf.dequantize(), expected)
    assert leaf.nbytes == sum(part.nbytes for part in parts.values())


def test_a_joined_stack_scans_by_itself():
    layouts = {
        ((i, i + 1), (0, 64), (0, 10)): Layout(shape=(1, 64, 10), factors=(1, 64, 10), in_axes=(1,), out_axes=(2, 0))
        for i in range(3)
    }
    parts = {index: random_tensor(layout=layout, seed=index[0][0]) for index, layout in layouts.items()}
    leaf = tensor.join(tensor.join_layouts((3, 64, 10), layouts), parts)
    assert leaf.layout == Layout.dense(64, 10)
    rows = jax.lax.map(lambda weight: weight.dequantize(), leaf)
    np.testing.assert_array_equal(rows, leaf.dequantize())


@pytest.mark.parametrize(
    "bounds",
    [
        [((0, 64), (0, 4)), ((0, 64), (6, 10))],  # a gap
        [((0, 64), (0, 6)), ((0, 64), (4, 10))],  # an overlap
        [((0, 20), (0, 10)), ((20, 64), (0, 10))],  # inputs in unequal pieces
        [((0, 32), (0, 10)), ((32, 64), (0, 5)), ((32, 64), (5, 10))],  # no grid
    ],
)
def test_parts_that_make_no_leaf_are_told(bounds):
    layouts = {index: Layout.dense(*(stop - start for start, stop in index)) for index in bounds}
    assert tensor.join_layouts((64, 10), layouts) is None


def test_parts_side_by_side_must_be_permuted_alike():
    layouts = {((0, 64), (0, 5)): Layout.dense(64, 5), ((0, 64), (5, 10)): Layout.dense(64, 5)}
    parts = {i: random_tensor(layout=layout, permuted=True, seed=i[1][0]) for i, layout in layouts.items()}
    with pytest.raises(ValueError, match=r'permuted differently.*use act_order="group" or "static"'):
        tensor.join(tensor.join_layouts((64, 10), layouts), parts)
    alike = {
        i: dataclasses.replace(part, permutation=parts[next(iter(parts))].permutation) for i, part in parts.items()
    }
    leaf = tensor.join(tensor.join_layouts((64, 10), layouts), alike)
    expected = jnp.concatenate([part.dequantize() for part in alike.values()], axis=1)
    np.testing.assert_array_equal(leaf.dequantize(), expected)


def test_columns_are_unpacked_alone():
    weight = random_tensor(permuted=True, dtype=jnp.bfloat16)
    wanted = jnp.asarray([[3, 0], [9, 3]])
    got = tensor.unpack_columns(weight, wanted)
    np.testing.assert_array_equal(got, weight.dequantize().T[wanted])
    assert got.dtype == jnp.bfloat16
