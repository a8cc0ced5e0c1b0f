"""What a quantization will take, before it begins: weights, bytes, peak memory and time, from shapes alone.

The peak is that of `quantize`'s own arrays by the model in docs/memory.md, in which every term is a line here; the
libraries' own memory, and what compilers take while they compile, come on top. Time is floating-point operations over
the rate of one matrix product, measured here, in which what goes element by element counts as so many; reading,
compiling and writing come on top.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.executor import checked_batches, is_lazy, part_key
from jgptq.grid import SHRINKS, Grid
from jgptq.hessian import waiting_numbers
from jgptq.panels import PANEL
from jgptq.partition import common_mesh
from jgptq.quantize import check_offload
from jgptq.rules import Rule, checked_rules, chosen_sites, completed, settings_of
from jgptq.solvers import AWQ, GPTQ, OBQ, RTN, Method
from jgptq.solvers.gptq import tile_of
from jgptq.solvers.method import TILE, outputs_at_once
from jgptq.solves import at_once, stacked
from jgptq.tensor import QuantizedTensor, from_codes
from jgptq.tracing.batching import Room, as_given, largest
from jgptq.tracing.costs import elements, flops, last_reads, parts_read, waiting_bytes, working_bytes
from jgptq.tracing.graph import Graph, Part, Site, Step, as_abstract, leaf_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A weight to be quantized. nbytes: as it is; packed_nbytes: as codes, scales and zeros."""

    path: str
    shape: tuple[int, ...]
    bits: int
    group_size: int
    nbytes: int
    packed_nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a quantization will take.

    weights: in no order of solving; skipped: (path, reason) of every other float leaf. nbytes, packed_nbytes: of all
    parameters before and after. peak: (what, bytes), the largest first, of the moment with most memory; peak_at: the
    weights solved then. flops, seconds: by phase; seconds of a matrix product's measured rate, `rate` a second.
    """

    weights: tuple[Planned, ...]
    skipped: tuple[tuple[str, str], ...]
    nbytes: int
    packed_nbytes: int
    peak: tuple[tuple[str, int], ...]
    peak_at: str
    flops: tuple[tuple[str, float], ...]
    seconds: tuple[tuple[str, float], ...]
    rate: float

    @property
    def peak_nbytes(self) -> int:
        return sum(size for _, size in self.peak)

    @property
    def total_seconds(self) -> float:
        return sum(seconds for _, seconds in self.seconds)


def estimate(
    f: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    method: str | Method = "gptq",
    quality: str = "balanced",
    rules: Sequence[Rule] | None = None,
    offload: str | None = None,
    lazy: bool | None = None,
    kept: bool = True,
) -> Estimate:
    """What `quantize` with the same arguments will take on one device; nothing is read, and one small product computed.

    params, batches: as for `quantize`, or jax.ShapeDtypeStructs in place of arrays; batches are joined and cut as
    there without a loss, and inputs that are shapes count as equal in all batches where they have no rows. A Flax NNX
    module takes the place of f and params.
    lazy: whether parameters are read when needed; None: each leaf of params as it is, shapes counting as lazy.
    kept: whether `quantize` keeps packed weights in memory, as it does without `finished=`.
    """
    grid, method = settings_of(Grid() if grid is None else grid, method, quality)
    check_offload(offload)
    rules = [(pattern, completed(options, grid, method, quality)) for pattern, options in checked_rules(rules or ())]
    batches = checked_batches(batches, shapes=True)
    leaves = [leaf for _, leaf in leaf_paths(params)]
    read_late = [is_lazy(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) if lazy is None else lazy for leaf in leaves]
    methods = [method, *(options.method for _, options in rules if options)]
    room = Room(
        parameters=sum(_nbytes(leaf) for leaf, late in zip(leaves, read_late, strict=True) if not late),
        models=2 if any(map(_follows, methods)) else 1,
        on_host=offload == "host",
    )
    on_mesh = common_mesh(batches, params) is not None
    cuts = as_given(f, params, batches) if on_mesh else largest(f, params, batches, room)
    graphs, counts = [cut.graph for cut in cuts], [len(cut.pieces) for cut in cuts]
    sites = graphs[0].sites
    plan = chosen_sites(sites, grid, method, rules)
    chosen = {site.leaf: site for site in sites if site.leaf in plan}
    packed = {(leaf, part.index): _packed_bytes(part, plan[leaf][0]) for leaf in chosen for part in chosen[leaf].parts}
    model = _Memory(
        graphs, counts, leaves, packed, plan, lazy=read_late, kept=kept, on_host=offload == "host", on_mesh=on_mesh
    )
    steps = [list(step) for step in zip(*(graph.steps(plan) for graph in graphs), strict=True)]
    peak, at, work = {}, "", {"advance": 0.0, "hessian": 0.0, "targets": 0.0, "solve": 0.0}
    for number, own in enumerate(steps):
        for moment in model.moments(steps, number):
            if sum(moment.values()) > sum(peak.values()):
                peak, at = moment, ", ".join(chosen[part.leaf].name(part) for part in own[0].parts)
        for phase, count in _work(graphs, counts, steps, number, plan).items():
            work[phase] += count
    rate = matmul_rate()
    before = sum(_nbytes(leaf) for leaf in leaves)
    taken = sum(packed.values()) - sum(_nbytes(leaves[leaf]) for leaf in chosen)
    return Estimate(
        weights=tuple(_planned(site, leaves[site.leaf], plan[site.leaf][0], packed) for site in chosen.values()),
        skipped=tuple(
            (site.path, "left alone by a rule" if site.quantizable else site.reason)
            for site in sites
            if site.leaf not in plan
        ),
        nbytes=before,
        packed_nbytes=before + taken,
        peak=tuple(sorted(((name, size) for name, size in peak.items() if size), key=lambda item: -item[1])),
        peak_at=at,
        flops=tuple(work.items()),
        seconds=tuple((phase, count / rate) for phase, count in work.items()),
        rate=rate,
    )


def matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """Floating-point operations a second of one float32 product of (4 size, size) and (size, size) matrices."""
    product = jax.jit(lambda x, w: x @ w)
    x, w = jnp.ones((4 * size, size)), jnp.ones((size, size))
    product(x, w).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, w).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 8 * size**3 / best


def _nbytes(leaf: Any) -> int:
    return math.prod(np.shape(as_abstract(leaf))) * _itemsize(leaf)


def _packed_bytes(part: Part, grid: Grid) -> int:
    """Of a part's codes, scales and zeros, as `quantize` makes them."""
    packed = packed_shape(part.layout.in_features, part.layout.out_features, grid)
    return sum(map(_nbytes, jax.tree.leaves(packed))) * math.prod(part.layout.sizes(part.layout.batch_axes))


@functools.cache
def packed_shape(in_features: int, out_features: int, grid: Grid) -> QuantizedTensor:
    """A packed weight without values, as `quantize` would make it."""
    codes = jax.ShapeDtypeStruct((in_features, out_features), np.uint32)
    scales = jax.ShapeDtypeStruct((-(-in_features // grid.group_length(in_features)), out_features), grid.scale_dtype)
    zeros = None if grid.symmetric else scales
    return jax.eval_shape(lambda *arrays: from_codes(*arrays, grid=grid), codes, scales, zeros)


def _planned(site: Site, leaf: Any, grid: Grid, packed: dict) -> Planned:
    return Planned(
        path=site.path,
        shape=site.shape,
        bits=grid.bits,
        group_size=grid.group_length(site.layout.in_features),
        nbytes=_nbytes(leaf),
        packed_nbytes=sum(packed[site.leaf, part.index] for part in site.parts),
    )


def _follows(method: Any) -> bool:
    return bool(getattr(method, "targets", None) or getattr(method, "bias_correction", False))


class _Memory:
    """Bytes that `quantize` holds, by what they are, at the moments of a step that take most."""

    def __init__(
        self, graphs, counts, leaves, packed, plan, *, lazy: list[bool], kept: bool, on_host: bool, on_mesh: bool
    ):
        self.graphs, self.counts, self.packed, self.plan = graphs, counts, packed, plan
        self.lazy, self.kept, self.on_mesh = lazy, kept, on_mesh
        # Where the device is a CPU, the host's memory is its own.
        self.elsewhere = on_host and jax.default_backend() != "cpu"
        self.sizes = [_itemsize(leaf) for leaf in leaves]
        self.models = 2 if any(_follows(method) for _, method in plan.values()) else 1
        self.whole = sum(_nbytes(leaf) for leaf, late in zip(leaves, lazy, strict=True) if not late)
        self.last_reads = [last_reads(graph) for graph in graphs]

    def moments(self, steps: list[list[Step]], number: int) -> list[dict[str, int]]:
        own = steps[number]
        step = own[0]
        before = steps[number - 1] if number else None
        held = {"parameters": self.whole, "packed weights": self._finished(steps, number)}
        replaced = self._replaced(steps, number)
        n, square, batch = _sizes(step.parts[0])
        hessian = 4 * square * batch
        drift = residuals = 0
        if self.models == 2 and number:
            residuals = sum(4 * n * part.layout.out_features for part in step.parts if any(r.added for r in part.reads))
            drift = hessian + residuals
        waiting = max(waiting_numbers(n), min(n, PANEL) * n if drift else 0)
        return [
            held | replaced | self._advancing(before, own),
            held
            | replaced
            | {"activations": self._waiting(own), "Hessian": hessian, "drift": drift}
            | {"inputs in float32": self._rows(own), "sums": 4 * waiting * batch},
            held
            | replaced
            | {"activations": self._waiting(own), "Hessian": hessian, "drift": drift}
            | {"factor": 4 * square + (4 * square if drift else 0)},
            held
            | replaced
            | {"activations": self._waiting(own), "Hessian": hessian, **self._factoring(step, bool(drift))},
            held
            | replaced
            | {"activations": self._waiting(own), **self._solving(step, bool(drift))}
            | {"factor": 4 * square * self._factors(step), "Hessian": hessian if batch > 1 else 0}
            | {"read ahead": self._ahead(steps, number)},
        ]

    def _finished(self, steps: list[list[Step]], number: int) -> int:
        done = [part_key(part) for own in steps[:number] for part in own[0].parts]
        return sum(self.packed[key] for key in done) if self.kept else 0

    def _replaced(self, steps: list[list[Step]], number: int) -> dict[str, int]:
        """Quantized values of solved parts that equations still to run read, and what the float model has there."""
        start = [step.start for step in steps[number - 1 if number else 0]]
        keys = {part_key(part) for own in steps[:number] for part in own[0].parts}
        needed = [
            key for key in keys if any(last.get(key, -1) >= at for last, at in zip(self.last_reads, start, strict=True))
        ]
        size = sum(self._part_bytes(key) for key in needed)
        return {"quantized values": size, "float values": self._late_bytes(needed) if self.models == 2 else 0}

    def _late_bytes(self, keys: Iterable[tuple[int, tuple]]) -> int:
        """Of those that are read when needed."""
        return sum(self._part_bytes(key) for key in keys if self.lazy[key[0]])

    def _part_bytes(self, key: tuple[int, tuple]) -> int:
        leaf, index = key
        return self.sizes[leaf] * math.prod(stop - start for start, stop in index)

    def _advancing(self, before: list[Step] | None, own: list[Step]) -> dict[str, int]:
        """While batches go from the last step to this one: those still there, those here, and the one under way."""
        waiting = working = read = 0
        for place, (graph, count) in enumerate(zip(self.graphs, self.counts, strict=True)):
            start, stop = (0 if before is None else before[place].start), own[place].start
            one = max(waiting_bytes(graph, start), waiting_bytes(graph, stop))
            waiting += (1 if self.elsewhere else count) * one
            working = max(working, working_bytes(graph, start, stop))
            read = max(read, self._late_bytes(parts_read(graph, start, stop)))
        known = self._late_bytes(map(part_key, before[0].parts)) if before else 0
        return {"activations": self.models * waiting, "one batch": working, "weights": max(0, read - known)}

    def _waiting(self, own: list[Step]) -> int:
        if self.elsewhere:
            return 0
        parts = zip(self.graphs, self.counts, own, strict=True)
        return self.models * sum(count * waiting_bytes(graph, step.start) for graph, count, step in parts)

    def _rows(self, own: list[Step]) -> int:
        """One batch's inputs in float32, twice where two models are compared."""
        largest = max(
            4 * math.prod(atom.aval.shape) for step in own for read in step.reads for atom in read.activations
        )
        return largest * (2 if self.models == 2 else 1)

    def _solving(self, step: Step, moved: bool) -> dict[str, int]:
        weights = [4 * math.prod(part.layout.shape) for part in step.parts]
        keys = list(map(part_key, step.parts))
        return {
            "targets": sum(weights) if moved else 0,
            "weights": self._late_bytes(keys),
            "one solve": max(
                _solve_bytes(stack, self.plan[stack[0].leaf][1])
                for stack in stacked(step.parts, self.plan, on_mesh=self.on_mesh)
            ),
            "quantized values of the step": sum(map(self._part_bytes, keys)),
        }

    def _factoring(self, step: Step, moved: bool) -> dict[str, int]:
        """Beside the Hessian: its factors, for AWQ a scaled Hessian as well, and what weights are solved towards."""
        scaled = any(isinstance(self.plan[part.leaf][1], AWQ) for part in step.parts)
        square = 4 * _sizes(step.parts[0])[1]
        return {
            "factor": square * self._factors(step),
            "scaled Hessian": square if scaled else 0,
            "targets": sum(4 * math.prod(part.layout.shape) for part in step.parts) if moved else 0,
        }

    def _factors(self, step: Step) -> int:
        """Of a step's Hessian at a time, one for each order that is tried."""
        orders = max(_orders(self.plan[part.leaf][1]) for part in step.parts)
        return orders * at_once(_sizes(step.parts[0])[-1])

    def _ahead(self, steps: list[list[Step]], number: int) -> int:
        """Of the next step's weights, which wait in the host's memory: that of the device only if it is a CPU."""
        if jax.default_backend() != "cpu" or number + 1 == len(steps):
            return 0
        return self._late_bytes(map(part_key, steps[number + 1][0].parts))


# What one solve takes, in float32 copies of its weight: on a CPU of the whole, and of what the outputs that go at a
# time have of it, with scale search or sweeps and without; elsewhere all go at once.
WHOLE_COPIES, SEARCH_COPIES, TILE_COPIES, SOLVE_COPIES_AT_ONCE = 0.65, 6.4, 2.3, 5.0


def _solve_bytes(stack: Sequence[Part], method: Any) -> int:
    """Of parts that are solved as one."""
    outputs = sum(part.layout.out_features for part in stack)
    tile = _tile(method)
    copies = SOLVE_COPIES_AT_ONCE
    if jax.default_backend() == "cpu":
        own = SEARCH_COPIES if tile == TILE else TILE_COPIES
        copies = WHOLE_COPIES + own * outputs_at_once(outputs, tile) / outputs
    size = sum(4 * math.prod(part.layout.shape) for part in stack)
    # Of several orders the best solution so far waits: codes of a byte, and as much for grids in groups of 32.
    return int((copies + (0.5 if _orders(method) > 1 else 0.0)) * size)


def _tile(method: Any) -> int:
    """Outputs solved at once on a CPU, where they can be divided."""
    if isinstance(method, AWQ):
        return _tile(method.solver)
    return tile_of(method.scale_search, method.sweeps) if isinstance(method, GPTQ) else TILE


def _itemsize(leaf: Any) -> int:
    """Of a number; keys of random numbers count as nothing."""
    dtype = getattr(as_abstract(leaf), "dtype", None)
    return dtype.itemsize if isinstance(dtype, np.dtype) else 0


def _sizes(part: Part) -> tuple[int, int, int]:
    """Inputs, elements of a Hessian, and Hessians in the batch."""
    n = part.layout.in_features
    return n, n * n, math.prod(part.layout.sizes(part.layout.batch_axes))


def _work(graphs: list[Graph], counts: list[int], steps: list[list[Step]], number: int, plan: dict) -> dict[str, float]:
    """Floating-point operations of one step, by phase."""
    own, step = steps[number], steps[number][0]
    follows = any(_follows(plan[part.leaf][1]) for part in step.parts)
    n, square, batch = _sizes(step.parts[0])
    work = {"advance": 0.0, "hessian": 0.0, "targets": 0.0, "solve": 0.0}
    for place, (graph, count) in enumerate(zip(graphs, counts, strict=True)):
        start = steps[number - 1][place].start if number else 0
        equations = graph.equations[start : own[place].start]
        once = flops(equations) + ELEMENT * elements(equations)
        work["advance"] += (2 if follows else 1) * count * once
        for place_of_read, read in enumerate(own[place].reads):
            rows = count * math.prod(read.activations[0].aval.shape) / (n * batch)
            written = sum(part.layout.out_features for part in own[place].parts if part.reads[place_of_read].added)
            work["hessian"] += 2 * rows * square * batch
            if follows and number:
                work["hessian"] += 2 * rows * (square * batch + n * written)
    if follows and number:
        outputs = sum(part.layout.out_features for part in step.parts)
        work["targets"] = batch * (n**3 / 3 + 2 * square * n + 2 * square * outputs)
    settings = [(plan[part.leaf], part.layout.out_features) for part in step.parts]
    # Weights of one step share what is prepared of their Hessian.
    work["solve"] = batch * sum(_prepare_work(method, n) for _, method in {own for own, _ in settings})
    work["solve"] += batch * sum(_solve_work(n, outputs, grid, method) for (grid, method), outputs in settings)
    return work


def _orders(method: Any) -> int:
    """How many orders of inputs are tried."""
    return _orders(method.solver) if isinstance(method, AWQ) else getattr(method, "orders", 1)


def _prepare_work(method: Any, n: int) -> float:
    """The Hessian's factor in each order, for AWQ one for each scaling that is judged by a solve as well."""
    if isinstance(method, AWQ):
        return _prepare_work(method.solver, n) + method.points * _prepare_work(method.judge, n)
    return _orders(method) * n**3 / 3 if hasattr(method, "prepare") else 0.0


def _solve_work(n: int, outputs: int, grid: Grid, method: Any) -> float:
    """Of a weight (n, outputs), what is prepared at hand; AWQ's as if its scales could go somewhere.

    GPTQ: the feedback of earlier inputs and two output energies; the loop over columns; and each group's other solves.
    Of these there are CANDIDATES where scales are chosen in the loop, and half as many in a sweep over the groups; it
    also takes two products of each group with all others.
    """
    search = getattr(method, "scale_search", None)
    if isinstance(method, AWQ):
        own = _solve_work(n, outputs, grid, method.solver)
        if method.judge is not None:
            return own + method.points * _solve_work(n, outputs, grid, method.judge)
        searched = getattr(method.solver, "scale_search", None) is not None
        return own + method.points * outputs * n * (n + _rounding_work(searched))
    if isinstance(method, RTN):
        return outputs * n * (2 * n + _rounding_work(search is not None))
    if isinstance(method, OBQ):
        return GREEDY * outputs * n**3
    sweeps = getattr(method, "sweeps", 0)
    solves = (CANDIDATES if search == "in_loop" else 0) + sweeps * CANDIDATES / 2
    loop = COLUMN_LOOP + SEARCH * solves * grid.group_length(n)
    return _orders(method) * outputs * n * (3 * n + 4 * n * sweeps + loop)


def _rounding_work(searched: bool) -> float:
    """Of rounding a weight to nearest: a number's part in it."""
    return ELEMENT * (ROUNDING + (len(SHRINKS) if searched else 0))


# What goes element by element, in as many operations of a product as take its time, on 2 cores of a Xeon whose products
# make 240 GFLOP/s: a result of an elementwise equation, a weight in the solver's loop over columns, and one in a
# candidate's solve of a group, for each input of the group.
ELEMENT, COLUMN_LOOP, SEARCH, CANDIDATES = 200.0, 15_000.0, 14, 16
# Elementwise equations of rounding to nearest, and OBQ's operations for each element of the inverse it changes; both at
# 140 GFLOP/s.
ROUNDING, GREEDY = 10, 60.0
