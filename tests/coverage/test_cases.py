"""Every way of reading a weight in `cases`: found, quantized, and served as a dense forward would compute it."""

import functools
import warnings

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import CASES, Case
from coverage_table import BIASES
from flax import nnx
from modules import NNX

import jgptq
from jgptq import GPTQ, Grid, Options, QuantizationWarning, QuantizedTensor
from jgptq.tracing.graph import leaf_paths

GRID = Grid(bits=3, group_size=16)
# Algorithm 1 itself, so that nothing but the Hessian tells it from rounding to nearest.
PLAIN = GPTQ(act_order=False, scale_search=None, sweeps=0, targets=None)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


dequantize = jax.jit(jgptq.dequantize)


def dense(params):
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_packed(leaf) else leaf, params, is_leaf=is_packed)


def rounded(params, packed):
    """Float parameters with what is packed rounded to nearest, by the float64 oracle."""

    def round_leaf(weight, leaf):
        if not is_packed(weight):
            return leaf
        matrices = np.asarray(weight.layout.to_matrix(leaf))
        results = [
            reference.rtn(w, bits=GRID.bits, group_size=GRID.group_size, symmetric=False).weight
            for w in matrices.reshape(-1, *matrices.shape[-2:])
        ]
        return weight.layout.from_matrix(jnp.asarray(np.reshape(results, matrices.shape), leaf.dtype))

    return jax.tree.map(round_leaf, packed, params, is_leaf=is_packed)


def jit(case: Case):
    """Equinox modules hold functions, which jax.jit does not take."""
    return equinox.filter_jit if case.framework == "Equinox" else jax.jit


def quantize(*arguments, method):
    """Of (f, params, batches) or (module, batches)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)
        return jgptq.quantize(*arguments, grid=GRID, method=method)


@functools.cache
def solved(case: Case):
    f, params, _ = case.build()
    return f, params, *quantize(f, params, case.calibration(), method=PLAIN)


@every_case
def test_every_leaf_is_found_or_left_for_its_reason(case):
    f, params, _ = case.build()
    sites = {site.path: site for site in jgptq.find_weights(f, params, *case.held_out())}
    assert {path for path, site in sites.items() if site.quantizable} == case.quantized
    for path, words in case.left.items():
        assert words in sites[path].reason
    assert {path.split(".")[-1] for path in set(sites) - case.quantized - set(case.left)} <= BIASES


@every_case
def test_quantized_as_asked_and_served_as_a_dense_forward(case):
    if not case.quantized:
        f, params, _ = case.build()
        with pytest.raises(ValueError, match="no weight that can be quantized"):
            jgptq.quantize(f, params, case.calibration(), grid=GRID, quality="fast")
        return
    f, params, packed, report = solved(case)
    assert {path for path, leaf in leaf_paths(packed) if is_packed(leaf)} == case.quantized
    assert {row.path.partition("[")[0] for row in report.rows} == case.quantized
    assert set(case.left) <= set(dict(report.skipped))

    x, compiled = case.held_out(), jit(case)(f)
    served, expected = jit(case)(jgptq.quantized(f))(packed, *x), compiled(dense(packed), *x)
    # Products in bfloat16 are rounded to 8 bits in an order of XLA's choosing.
    tolerance = 3e-2 if "bfloat16" in case.name else 3e-5
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), served, expected)

    exact = compiled(params, *x)
    error, rtn_error = (squared_error(compiled(p, *x), exact) for p in (dense(packed), rounded(params, packed)))
    assert 0 < error < rtn_error
    assert sum(row.relative_error for row in report.rows) < sum(row.rtn_error for row in report.rows)


def squared_error(got, exact) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    return sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)


# Scans.


def equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("case", [case for case in CASES if case.scans], ids=lambda case: case.id)
def test_a_scan_is_served_as_a_scan_over_packed_layers(case):
    f, params, packed, _ = solved(case)
    traced = [
        list(equations(jit_free(function, tree, case).jaxpr))
        for function, tree in ((f, params), (jgptq.quantized(f), packed))
    ]
    plain, served = ([e.params["length"] for e in part if e.primitive.name == "scan"] for part in traced)
    assert len(plain) == case.scans
    # A product with experts has a scan of its own.
    assert served == plain or ("ragged_dot" in case.name and set(plain) <= set(served))
    stacks = [leaf.size for path, leaf in leaf_paths(params) if path in case.quantized and leaf.ndim > 2]
    floats = [var.aval.size for e in traced[1] for var in e.outvars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    assert not stacks or max(floats) < max(stacks)


def jit_free(f, params, case: Case):
    """The jaxpr of f with what is no array in params closed over."""
    arrays, static = equinox.partition(params, equinox.is_array)
    return jax.make_jaxpr(lambda arrays, *x: f(equinox.combine(arrays, static), *x))(arrays, *case.held_out())


# NNX modules as they are.

nnx_layers = [case for case in CASES if case.framework == "NNX" and case.name in NNX]


@pytest.mark.parametrize("case", nnx_layers, ids=lambda case: case.id)
def test_an_nnx_module_is_quantized_and_served_as_its_function_is(case):
    f, _, packed, report = solved(case)
    module = case.build()[2]
    packed_module, module_report = quantize(module, case.calibration(), method=PLAIN)
    assert [row.path for row in module_report.rows] == [row.path for row in report.rows]
    leaves = dict(leaf_paths(nnx.to_pure_dict(nnx.state(packed_module, nnx.Param))))
    for path in case.quantized:
        assert jnp.array_equal(leaves[path].codes, dict(leaf_paths(packed))[path].codes)
    x = case.held_out()
    np.testing.assert_array_equal(jgptq.quantized(packed_module)(*x), jgptq.quantized(f)(packed, *x))


# Tied embeddings, asked for.


@pytest.mark.parametrize("case", [case for case in CASES if case.inputs == "tokens"], ids=lambda case: case.id)
def test_both_uses_of_a_tied_embedding_are_served_when_asked_for(case):
    f, params, _ = case.build()
    (path,) = case.left
    packed, report = jgptq.quantize(
        f, params, case.calibration(), grid=GRID, method=PLAIN, rules=[(path, Options(tied=True))]
    )
    assert {row.path for row in report.rows} == case.quantized | {path}
    assert is_packed(dict(leaf_paths(packed))[path])
    x = case.held_out()
    served = jax.jit(jgptq.quantized(f))(packed, *x)
    np.testing.assert_allclose(served, f(dense(packed), *x), atol=3e-5, rtol=3e-5)
