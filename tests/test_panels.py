"""Sums and solutions a panel at a time: right, and in place at widths of which no second matrix should be made."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgptq import executor
from jgptq.hessian import Hessian, waiting_numbers
from jgptq.panels import PANEL, add_product, over_columns, panel_size
from jgptq.solvers import targets
from jgptq.tracing.products import Dot

gptq = importlib.import_module("jgptq.solvers.gptq")  # jgptq.solvers.gptq is the function

WIDE = 28672
MATRIX = 4 * WIDE**2
ROWS = Dot(batch=(), tokens=(0,), contracted=(1,))


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (768, 768), (1024, 1024), (2048, 1024), (11008, 688), (1031, 1031)])
def test_panels_divide_a_width_or_are_all_of_it(n, size):
    assert panel_size(n) == size


@pytest.mark.parametrize("rows", [3, PANEL + 8])
def test_a_product_is_added(rows):
    total, x, y = normal(rows, 5), normal(7, rows), normal(7, 5)
    exact = total.astype(np.float64) + x.T.astype(np.float64) @ y
    np.testing.assert_allclose(add_product(*map(jnp.asarray, (total, x, y))), exact, rtol=1e-5, atol=1e-5)


def test_a_product_with_narrow_inputs_loses_next_to_nothing():
    x, y = jnp.asarray(normal(200, 3)).astype(jnp.bfloat16), normal(200, 5)
    exact = np.asarray(x, np.float64).T @ y
    sizes = np.abs(np.asarray(x, np.float64)).T @ np.abs(y)
    added = add_product(jnp.zeros((3, 5)), x, jnp.asarray(y))
    assert np.max(np.abs(added - exact) / sizes) < 2**-16
    text = str(jax.make_jaxpr(add_product)(jnp.zeros((3, 5)), x, y))
    assert text.count("dot_general") == 2
    assert "f32[200,3]" not in text


@pytest.mark.parametrize("columns", [3, PANEL + 8])
def test_a_function_of_columns_goes_over_all(columns):
    matrix = normal(4, columns)
    np.testing.assert_array_equal(over_columns(lambda part: part - 2 * part, jnp.asarray(matrix)), -matrix)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def wide_hessian():
    return Hessian(struct(WIDE, WIDE), struct(dtype=jnp.int32))


def most(compiled) -> float:
    """What a program takes with its arguments, in matrices of the Hessian's size."""
    sizes = compiled.memory_analysis()
    arguments, results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (arguments + results + sizes.temp_size_in_bytes) / MATRIX


# Nothing runs: 28,672 inputs would take 3.3 GB a matrix.
def test_a_wide_hessian_is_summed_in_one_matrix():
    x = struct(512, WIDE, dtype=jnp.bfloat16)
    assert most(executor._accumulate.lower(wide_hessian(), ROWS, None, x).compile()) < 1.2


def test_a_wide_sum_is_mirrored_in_its_own_place():
    assert most(executor._mirrored.lower(wide_hessian()).compile()) < 1.01


# As estimated, beside the total: the batch's columns, and the blocks that wait to be added.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_takes_what_waits_to_be_added(dtype):
    n, tokens = 2048, 1024
    total = Hessian(struct(n, n), struct(dtype=jnp.int32))
    compiled = executor._accumulate.lower(total, ROWS, None, struct(tokens, n, dtype=dtype)).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 * taken < 4 * (tokens * n + waiting_numbers(n)) < 2 * taken


def test_a_wide_drift_is_summed_in_one_matrix():
    x = struct(512, WIDE, dtype=jnp.bfloat16)
    drift = struct(WIDE, WIDE)
    assert most(executor._accumulate_cross.lower(drift, ROWS, None, (x,), (x,)).compile()) < 1.2


def test_a_wide_factor_takes_one_matrix_beside_the_hessian():
    compiled = gptq._prepare.lower(wide_hessian(), 128, 0.01, "group", 128, struct(WIDE)).compile()
    assert most(compiled) < 2.1


def test_wide_corrections_go_in_the_drifts_place():
    drift = targets.Drift(struct(WIDE, WIDE), {0: struct(WIDE, 1024)})
    compiled = targets.corrections.lower(wide_hessian(), drift, 0.05).compile()
    # The Hessian, the drift, the factor, and one more that XLA's triangular solve makes of it.
    assert most(compiled) < 4.2
