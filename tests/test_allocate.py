"""Bits and group sizes by weight: the best allocation by brute force, sizes as stored, and what runtimes need."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jgptq
from jgptq import Grid, Options
from jgptq.allocate import allocation, stored_bits

GRIDS = tuple(Grid(bits=bits, group_size=size) for bits in (2, 3, 4) for size in (8, 16))


def brute_force(costs, sizes, budget):
    """The least cost of all combinations that fit; inf if none does."""
    every = itertools.product(range(costs.shape[1]), repeat=len(costs))
    rows = np.arange(len(costs))
    return min((costs[rows, c].sum() for c in map(np.array, every) if sizes[rows, c].sum() <= budget), default=math.inf)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_allocation_within_the_budget_costs_less(seed):
    rng = np.random.default_rng(seed)
    costs, sizes = rng.random((4, 5)), rng.integers(1, 40, (4, 5)) * 6
    costs[rng.random(costs.shape) < 0.2] = np.inf
    costs[:, 0] = 5.0
    for budget in (sizes[:, 0].sum(), 300, 500, 10_000, 10**30):
        allowed = np.where(np.isfinite(costs), sizes, 10**9)
        if allowed.min(axis=1).sum() > budget:
            continue
        picked = allocation(costs, sizes, int(budget))
        rows = np.arange(4)
        assert sizes[rows, picked].sum() <= budget
        assert costs[rows, picked].sum() == pytest.approx(brute_force(costs, allowed, budget))


def test_sizes_are_rounded_up_where_there_are_too_many_units():
    rng = np.random.default_rng(0)
    costs, sizes = rng.random((5, 4)), rng.integers(10_000, 40_000, (5, 4))
    for budget in (90_000, 110_001, 140_000):
        picked, rows = allocation(costs, sizes, budget, units=64), np.arange(5)
        assert sizes[rows, picked].sum() <= budget
        # At most a unit for each weight is lost, and one of the budget.
        assert costs[rows, picked].sum() <= brute_force(costs, sizes, budget - 6 * budget / 64)


def test_an_allocation_needs_room_for_the_smallest_choices():
    with pytest.raises(ValueError, match="a budget of 5, but the smallest choices take 6; give more"):
        allocation(np.zeros((2, 2)), np.array([[3, 4], [3, 5]]), 5)
    with pytest.raises(ValueError, match="a finite choice for each"):
        allocation(np.array([[np.inf, np.inf]]), np.ones((1, 2)), 5)


@pytest.mark.parametrize("grid", [Grid(bits=3, group_size=16), Grid(bits=8, group_size=None, symmetric=True)], ids=str)
def test_stored_bits_are_those_of_the_packed_tensor(grid):
    weight, _ = jgptq.rtn(jnp.asarray(np.random.default_rng(0).standard_normal((96, 32)), jnp.float32), grid)
    zeros = 0 if weight.zeros is None else weight.zeros.size * grid.bits
    assert stored_bits(weight.layout, grid) == 8 * (weight.codes.nbytes + weight.scales.nbytes) + zeros


def network(p, x):
    """Two layers of q, k and v; only the last outputs count for much."""
    for layer in p["layers"]:
        q, k, v = (x @ layer[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.T) @ v
    return 10.0 * (x @ p["loud"]), 0.1 * (x @ p["quiet"])


def loss(outputs, inputs):
    return sum(jnp.sum(output**2) for output in outputs)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)

    def normal(out):
        return (rng.standard_normal((32, out)) / 6).astype(np.float32)

    layers = [{name: normal(32) for name in "qkv"} for _ in range(2)]
    batches = [(rng.standard_normal((48, 32)).astype(np.float32),) for _ in range(2)]
    return {"layers": layers, "loud": normal(16), "quiet": normal(16)}, batches


def grids_of(rules):
    return {path: options.grid for path, options in rules if options}


def packed(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jgptq.QuantizedTensor))
    return [leaf for leaf in leaves if isinstance(leaf, jgptq.QuantizedTensor)]


def stored_average(params):
    """Bits a weight, from packed tensors alone."""
    bits = sum(
        8 * (leaf.codes.nbytes + leaf.scales.nbytes) + (0 if leaf.zeros is None else leaf.zeros.size * leaf.bits)
        for leaf in packed(params)
    )
    return bits / sum(math.prod(leaf.shape) for leaf in packed(params))


@pytest.mark.parametrize("with_loss", [False, True])
def test_rules_keep_to_the_average_and_to_one_grid_for_fused_weights(case, with_loss):
    rules = jgptq.allocate(network, *case, average_bits=4.5, grids=GRIDS, loss=loss if with_loss else None)
    params, _ = jgptq.quantize(network, *case, rules=rules, quality="fast")
    assert 4.0 < stored_average(params) <= 4.5
    found = grids_of(rules)
    assert len(found) == 8
    for layer in (0, 1):
        assert len({found[f"layers.{layer}.{name}"] for name in "qkv"}) == 1
    assert len(set(found.values())) > 1


def test_the_loss_says_where_bits_go(case):
    found = grids_of(
        jgptq.allocate(
            network, *case, average_bits=4.0, grids=GRIDS, loss=loss, rules=[("layers.*", None)], together=False
        )
    )
    assert found["loud"].bits > found["quiet"].bits
    at_once = grids_of(
        jgptq.allocate(network, *case, average_bits=4.0, grids=GRIDS, loss=loss, rules=[("layers.*", None)])
    )
    assert at_once["loud"] == at_once["quiet"]  # they read the same activations


def test_awq_solves_the_candidates(case):
    rules = jgptq.allocate(network, *case, average_bits=4.5, grids=GRIDS, method="awq")
    params, _ = jgptq.quantize(network, *case, rules=rules, method="rtn")
    assert 4.0 < stored_average(params) <= 4.5


def test_given_rules_are_kept_and_count(case):
    given = [
        ("loud", Options(grid=Grid(bits=8, group_size=8), method="rtn")),
        ("quiet", None),
        ("*.0.*", Options(method="rtn")),
    ]
    rules = jgptq.allocate(network, *case, average_bits=4.5, grids=GRIDS, rules=given)
    assert rules[-3:] == given
    made = dict(rules[:-3])
    assert set(made) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in "qkv"}
    assert made["layers.0.q"].method == "rtn"
    assert made["layers.1.q"].method is None
    params, report = jgptq.quantize(network, *case, rules=rules, quality="fast")
    assert params["loud"].bits == 8
    assert stored_average(params) <= 4.5
    assert {row.path: row.method for row in report.rows}["layers.0.q"] == "rtn"


def test_a_stack_of_experts_and_a_name_with_brackets():
    rng = np.random.default_rng(1)
    params = {"w[0]": rng.standard_normal((2, 16, 8)).astype(np.float32)}
    batches = [(rng.standard_normal((2, 64, 16)).astype(np.float32),)]

    def experts(p, x):
        return jnp.einsum("eti,eio->eto", x, p["w[0]"])

    for chosen in (None, lambda outputs, inputs: jnp.sum(outputs)):
        rules = jgptq.allocate(experts, params, batches, average_bits=6.0, grids=GRIDS, loss=chosen)
        made, _ = jgptq.quantize(experts, params, batches, rules=rules, quality="fast")
        assert (made["w[0]"].bits, made["w[0]"].group_size) == (4, 16)  # 5.25 bits; groups of 8 would take 6.5


def test_a_module(case):
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(x)

    rules = jgptq.allocate(Model(), case[1], average_bits=3.5, grids=GRIDS)
    assert grids_of(rules) == {"linear.kernel": Grid(bits=2, group_size=16)}  # 3 bits would take 4.19


def test_messages(case):
    with pytest.raises(
        ValueError, match=r"average_bits=2.5; with scales and zeros the smallest choice takes 3.125 bits"
    ):
        jgptq.allocate(network, *case, average_bits=2.5, grids=GRIDS)
    for number in (-1.0, math.inf):
        with pytest.raises(ValueError, match=rf"average_bits={number}; give a positive number"):
            jgptq.allocate(network, *case, average_bits=number, grids=GRIDS)
    with pytest.raises(TypeError, match=r"give a sequence of jgptq\.Grid"):
        jgptq.allocate(network, *case, average_bits=4, grids=())
    bad = [(np.full((48, 32), np.nan, np.float32),)]
    with pytest.raises(ValueError, match=r"layers\.0\.q cannot be solved with Grid.*activations are not finite"):
        jgptq.allocate(network, case[0], bad, average_bits=4, grids=GRIDS)
