"""Sequential quantization of any function: each weight is solved on the activations of the quantized model so far.

The function's equations run segment by segment over all calibration batches. When a segment ends at products with
weights, their shared input is folded into a Hessian, the weights are solved, and the dequantized results take their
place before the next segment runs. [Frantar et al. 2023, section 4, in which blocks are passed one after another]
"""

import dataclasses
import difflib
import fnmatch
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.grid import Grid
from jgptq.hessian import Hessian, init_hessian, update_hessian
from jgptq.solvers import METHODS, Method
from jgptq.tensor import dequantize
from jgptq.tracing.graph import Product, Site, leaf_paths, trace
from jgptq.tracing.segments import Program
from jgptq.tracing.stream import Stream


class QuantizationWarning(UserWarning):
    """A weight was quantized, but worse than asked for; the report's notes say how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a rule sets for the weights it matches; None keeps the setting of the call."""

    grid: Grid | None = None
    method: str | Method | None = None

    def __post_init__(self):
        _settings(self.grid or Grid(), self.method or "gptq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What quantizing one weight did: its solve's `Info` on the host, and how it was asked to be done.

    notes: everything by which the result may be worse than asked for, in words.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    bits: int
    group_size: int
    symmetric: bool
    nbytes: int
    tokens: int
    loss: float
    relative_error: float
    damp: float
    seconds: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Rows in order of solving; `skipped` (path, reason) of every other float leaf; `programs` distinct programs."""

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    programs: int

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{row.path}: {note}" for row in self.rows for note in row.notes)


Rule = tuple[str | Callable[[Site], bool], Options | None]


def quantize(
    f: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    method: str | Method = "gptq",
    rules: Sequence[Rule] | None = None,
    progress: Callable[[Row, int, int], None] | None = None,
) -> tuple[Any, Report]:
    """Quantizes every weight of f(params, *inputs) that `find_weights` calls quantizable.

    batches: calibration inputs; each is the tuple of f's inputs (anything else stands for a tuple of one).
    grid: Grid() unless given. method: a name in METHODS or a Method value.
    rules: (pattern, options) pairs, the first that matches a weight's path decides: a glob on the path or a predicate
        on the Site; Options, or None to leave the weight as it is.
    progress: called with each finished row, its number from 1 and the number of weights.

    Returns params with a QuantizedTensor for each quantized leaf, and the report. The caller's arrays are only read.
    Warns with QuantizationWarning when a weight came out worse than asked for.
    """
    started = time.perf_counter()
    default = _settings(Grid() if grid is None else grid, method)
    executor = Executor(f, params, batches)
    plan = _plan(executor.sites, *default, rules or ())
    executor.check_weights([site for site in executor.sites if site.leaf in plan])
    rows: list[Row] = []
    quantized_leaves = {}
    for step in executor.steps:
        chosen = [site for site in step if site.leaf in plan]
        if not chosen:
            continue
        clock = time.perf_counter()
        hessian = executor.hessian(chosen[0])
        for site in chosen:
            site_grid, site_method = plan[site.leaf]
            weight, info = site_method.solve(site.layout.to_matrix(executor.leaf(site)), hessian, site_grid)
            weight = dataclasses.replace(weight, layout=site.layout)
            row = _row(site, weight, info, site_grid, site_method, time.perf_counter() - clock)
            executor.replace(site, _dequantize(weight))
            quantized_leaves[site.leaf] = weight
            rows.append(dataclasses.replace(row, seconds=time.perf_counter() - clock))
            if progress:
                progress(rows[-1], len(rows), len(plan))
            clock = time.perf_counter()

    report = Report(
        rows=tuple(rows),
        skipped=tuple(
            (site.path, site.reason if not site.quantizable else "left alone by a rule")
            for site in executor.sites
            if site.leaf not in plan
        ),
        seconds=time.perf_counter() - started,
        programs=executor.programs,
    )
    if report.notes:
        shown = "; ".join(report.notes[:3]) + ("; …" if len(report.notes) > 3 else "")
        warnings.warn(
            f"{len(report.notes)} notes on quantized weights (report.notes has all): {shown}",
            QuantizationWarning,
            stacklevel=2,
        )
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [quantized_leaves.get(i, leaf) for i, leaf in enumerate(leaves)]), report


_dequantize = jax.jit(dequantize)


def _plan(sites, grid: Grid, method: Method, rules: Sequence[Rule]) -> dict[int, tuple[Grid, Method]]:
    """Grid and method of each weight to quantize, by the leaf's number: two leaves may read as one path."""
    candidates = [site for site in sites if site.quantizable]
    if not candidates:
        reasons = "; ".join(f"{site.path}: {site.reason}" for site in sites[:5]) or "it has no floating-point leaf"
        raise ValueError(f"the function has no weight that can be quantized ({reasons}); see jgptq.find_weights")
    plan = {site.leaf: (grid, method) for site in candidates}
    unmatched = dict(plan)
    for pattern, options in _checked_rules(rules):
        matches = pattern if callable(pattern) else lambda site, glob=pattern: fnmatch.fnmatchcase(site.path, glob)
        hits = [site for site in sites if matches(site)]
        if not hits:
            nearest = difflib.get_close_matches(str(pattern), [site.path for site in sites], n=3, cutoff=0.0)
            raise ValueError(f"no weight matches the rule {pattern!r}; the nearest paths are {', '.join(nearest)}")
        if options is not None and not any(site.quantizable for site in hits):
            raise ValueError(
                f"the rule {pattern!r} sets options for {hits[0].path}, which cannot be quantized ({hits[0].reason}); "
                "remove the rule, or give None instead of options"
            )
        for site in hits:
            if unmatched.pop(site.leaf, None) is None:
                continue
            if options is None:
                del plan[site.leaf]
            else:
                plan[site.leaf] = _settings(options.grid or grid, options.method or method)
    return plan


def _checked_rules(rules: Any) -> list[Rule]:
    if isinstance(rules, str | dict) or not isinstance(rules, Iterable):
        raise TypeError(f"rules={rules!r}; give a sequence of (pattern, options) pairs")
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not (isinstance(rule[0], str) or callable(rule[0])):
            raise TypeError(f"{rule!r} in rules; give a pair of a glob on paths, or a predicate, and options")
        if not (rule[1] is None or isinstance(rule[1], Options)):
            raise TypeError(
                f"the rule for {rule[0]!r} has options {rule[1]!r}; give jgptq.Options(...), or None to leave alone"
            )
    return rules


def _settings(grid: Any, method: Any) -> tuple[Grid, Method]:
    """Grid and Method value, checked."""
    if not isinstance(grid, Grid):
        raise TypeError(f"grid={grid!r}; give a jgptq.Grid, such as Grid(bits=4, group_size=128)")
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method={method!r}; choose one of {tuple(METHODS)}, or give a Method value")
        return grid, METHODS[method]
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}; choose one of {tuple(METHODS)}, or give a Method value, such as GPTQ()")
    return grid, method


def _checked_batches(batches: Any) -> list[tuple]:
    """Each batch as the tuple of the function's inputs."""
    if isinstance(batches, dict | str) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; give a list of batches, each the tuple of the function's inputs: "
            "[(x,), ...]"
        )
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ValueError("no calibration data: batches is empty; give at least one batch of the function's inputs")
    for number, batch in enumerate(batches):
        for leaf in jax.tree.leaves(batch):
            if not _has_values(leaf):
                raise TypeError(
                    f"batch {number} holds a {type(leaf).__name__}; its inputs are arrays or numbers: "
                    "bind anything else to the function with functools.partial"
                )
    return batches


def _has_values(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
        return False
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def _row(site: Site, weight, info, grid: Grid, method: Method, seconds: float) -> Row:
    info = jax.device_get(info)
    if not info.finite:
        raise ValueError(
            f"the activations that reach {site.path} in calibration contain NaN or infinity; "
            "check the calibration inputs and the function's dtype (bfloat16 or float32 rather than float16)"
        )
    if info.failed:
        raise ValueError(
            f"the Hessian of {site.path} could not be factored with any damping up to {float(info.damp):g}; "
            "calibrate on more tokens, or leave this weight alone with a rule"
        )
    notes = []
    tokens, in_features = int(info.tokens), weight.in_features
    dead = int(info.dead_inputs)
    if dead == in_features:
        notes.append("its inputs were zero throughout calibration: rounded to nearest")
    elif tokens < in_features:
        notes.append(f"saw {tokens} tokens, fewer than its {in_features} inputs: calibrate on more")
    asked = getattr(method, "damp", 0.0)
    if info.damp > 1.001 * asked:
        notes.append(f"damping raised from {asked:g} to {float(info.damp):g}: the factorization failed below")
    if info.scales_at_limit:
        notes.append(
            f"{int(info.scales_at_limit)} scales are outside the range of {grid.scale_dtype}: "
            'use Grid(scale_dtype="float32")'
        )
    return Row(
        path=site.path,
        shape=site.shape,
        method=method.name,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        nbytes=weight.nbytes,
        tokens=tokens,
        loss=float(info.loss),
        relative_error=float(info.relative_error),
        damp=float(info.damp),
        seconds=seconds,
        notes=tuple(notes),
    )


class Executor:
    """Runs a function's equations over all batches at once, in segments that end at products with weights."""

    def __init__(self, f: Callable, params: Any, batches: Iterable[Any], *, keep_outputs: bool = False):
        batches = _checked_batches(batches)
        self._leaves = []
        for path, leaf in leaf_paths(params):
            if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
                raise TypeError(f"{path} is a {type(leaf).__name__}, with no values; give arrays, outside of jit")
            self._leaves.append(leaf)
        self._solved: list[Site] = []
        self._programs: dict[Program, Program] = {}
        by_shape: dict[Any, list] = {}
        for batch in batches:
            by_shape.setdefault(_signature(batch), []).append(batch)
        self._streams = [
            Stream(trace(f, params, *group[0]), group, self._leaves, self._programs, keep_outputs)
            for group in by_shape.values()
        ]
        self.sites = self._streams[0].graph.sites
        self.steps = self._streams[0].steps
        paths = [[site.path for site in step] for step in self.steps]
        for stream in self._streams[1:]:
            if [[site.path for site in step] for step in stream.steps] != paths:
                raise ValueError(
                    "the function uses other weights, or in another order, on batches of other shapes; "
                    "give calibration batches of one shape"
                )

    @property
    def programs(self) -> int:
        """Distinct programs compiled so far."""
        return len(self._programs)

    def leaf(self, site: Site) -> jax.Array:
        return jnp.asarray(self._leaves[site.leaf])

    def replace(self, site: Site, leaf: jax.Array) -> None:
        """Puts a leaf in place of a weight for all equations still to run."""
        self._leaves[site.leaf] = leaf
        self._solved.append(site)

    def check_weights(self, sites: Sequence[Site]) -> None:
        flags = [_all_finite(self.leaf(site)) for site in sites]
        bad = [site.path for site, finite in zip(sites, flags, strict=True) if not finite]
        if bad:
            raise ValueError(f"NaN or infinity in {', '.join(bad[:5])}; repair or leave alone such weights with a rule")

    def hessian(self, site: Site) -> Hessian:
        """Advances all batches to the first use of the site's activation, and sums its Hessian."""
        step = next(i for i, step in enumerate(self.steps) if site in step)
        hessian = init_hessian(site.layout.in_features)
        for stream in self._streams:
            stream.advance(stream.steps[step][0].position)
            first = stream.steps[step][0]
            for x in stream.values(first.activation):
                hessian = _accumulate(hessian, x, first.product)
        self._drop_spent()
        return hessian

    def _drop_spent(self) -> None:
        """Forgets the replacements whose one product every batch has passed."""
        for site in self._solved:
            if all(stream.has_passed(site.leaf) for stream in self._streams):
                self._leaves[site.leaf] = None
        self._solved = [site for site in self._solved if self._leaves[site.leaf] is not None]

    def outputs(self) -> list[Any]:
        """The function's outputs for each batch (batches of one shape together); needs keep_outputs."""
        results = []
        for stream in self._streams:
            results += stream.outputs()
        return results


def _signature(batch: tuple) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


def _accumulate_step(hessian: Hessian, x: jax.Array, product: Product) -> Hessian:
    rows = product.matrix(x)
    return update_hessian(hessian, rows) if len(rows) else hessian


_accumulate = jax.jit(_accumulate_step, static_argnames="product", donate_argnames="hessian")
