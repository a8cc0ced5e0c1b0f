"""Weights solved as one where they share their inputs, against the same weights solved for themselves."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jgptq
from jgptq import AWQ, GPTQ, OBQ, RTN, Grid, Hessian, Options, solves

GRID = Grid(bits=3, group_size=8)
PLAIN = GPTQ(scale_search=None, sweeps=0)
WIDTHS = {"q": 24, "k": 8, "v": 8, "wide": 40}


@dataclasses.dataclass(frozen=True)
class Spy:
    """A method that notes the widths of what it is given at once."""

    seen: list = dataclasses.field(hash=False, compare=False)
    name = "spy"
    separable = True

    def solve(self, w, hessian, grid):
        return RTN().solve(w, hessian, grid)

    def solve_all(self, weights, hessian, grid):
        self.seen.append([w.shape[1] for w in weights])
        return [self.solve(w, hessian, grid) for w in weights]


def f(params, x):
    x = jnp.tanh(x @ params["first"])
    return sum(jnp.sum(x @ params[name], axis=-1) for name in WIDTHS)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    widths = {"first": 16} | WIDTHS
    params = {name: jnp.asarray(rng.standard_normal((16, width)), jnp.float32) for name, width in widths.items()}
    return params, [rng.standard_normal((64, 16)).astype(np.float32)]


def same(packed, expected):
    assert jax.tree.structure(packed) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
        if one.dtype == jnp.float32:
            np.testing.assert_allclose(one, other, rtol=1e-6)
        else:
            np.testing.assert_array_equal(one, other)


def widths_solved(given, **options):
    method = Spy([])
    jgptq.quantize(f, *given, grid=GRID, method=method, **options)
    return method.seen


def test_outputs_side_by_side_fill_the_device_and_no_more(given, monkeypatch):
    assert widths_solved(given) == [[16], [24], [8], [8], [40]]
    monkeypatch.setattr(solves, "OUTPUTS", {"cpu": 40})
    assert widths_solved(given) == [[16], [24, 8, 8], [40]]
    other = [("v", Options(grid=Grid(bits=8, group_size=8)))]
    assert widths_solved(given, rules=other) == [[16], [24, 8], [8], [40]]


@pytest.mark.parametrize(
    "method",
    [GPTQ(sweeps=1), dataclasses.replace(PLAIN, act_order=True), AWQ(solver=PLAIN, points=2), OBQ(), RTN()],
    ids=lambda method: method.name,
)
def test_weights_solved_as_one_are_as_for_themselves(given, method, monkeypatch):
    alone, report = jgptq.quantize(f, *given, grid=GRID, method=method)
    monkeypatch.setattr(solves, "OUTPUTS", {})
    together, other = jgptq.quantize(f, *given, grid=GRID, method=method)
    same(together, alone)
    for row, expected in zip(other.rows, report.rows, strict=True):
        assert row.path == expected.path
        assert row.shape == expected.shape
        for measure in ("loss", "relative_error", "rtn_error", "damp"):
            np.testing.assert_allclose(getattr(row, measure), getattr(expected, measure), rtol=2e-4)


def test_a_run_interrupted_between_weights_of_one_solve_ends_with_the_same_bits(given, monkeypatch):
    monkeypatch.setattr(solves, "OUTPUTS", {})
    finished = {}
    whole, _ = jgptq.quantize(f, *given, grid=GRID, method=PLAIN, finished=finished)
    before = dict(finished)
    del finished["k"], finished["wide"]
    resumed, _ = jgptq.quantize(f, *given, grid=GRID, method=PLAIN, finished=finished)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert all(finished[name] is before[name] for name in ("first", "q", "v"))


@pytest.fixture
def forgotten():
    """What is compiled does not see that ONE_BY_ONE is another."""
    solves._solve_batch.clear_cache()
    yield
    solves._solve_batch.clear_cache()


def matrices_factored():
    """Of each factorization in the program that solves 24 experts of 8 inputs: 1 where it is of a single matrix."""
    w, hessian = jnp.zeros((24, 8, 8)), Hessian(jnp.zeros((24, 8, 8)), jnp.zeros(24, jnp.int32))
    jaxpr = str(jax.make_jaxpr(lambda w, hessian: solves._solve_batch(w, w, hessian, None, GRID, PLAIN))(w, hessian))
    shapes = re.findall(r"f32\[([\d,]+)\] = cholesky", jaxpr)
    assert shapes
    return {shape.removesuffix("8,8").rstrip(",") or "1" for shape in shapes}


@pytest.mark.parametrize("method", [PLAIN, AWQ(solver=PLAIN, points=2)], ids=lambda method: method.name)
def test_experts_solved_at_once_are_as_one_after_another(method, forgotten, monkeypatch):
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.standard_normal((24, 8, 8)), jnp.float32) for name in ("up", "down")}
    x = rng.standard_normal((24, 40, 8)).astype(np.float32)

    def experts(params, x):
        return jnp.einsum("etd,edf->etf", jax.nn.relu(jnp.einsum("etd,edf->etf", x, params["up"])), params["down"])

    expected, report = jgptq.quantize(experts, params, [x], grid=GRID, method=method)
    assert matrices_factored() == {"1"}
    solves._solve_batch.clear_cache()
    monkeypatch.setattr(solves, "ONE_BY_ONE", ())
    at_once, other = jgptq.quantize(experts, params, [x], grid=GRID, method=method)
    assert matrices_factored() == {"3"}
    same(at_once, expected)
    np.testing.assert_allclose([row.loss for row in other.rows], [row.loss for row in report.rows], rtol=1e-5)
