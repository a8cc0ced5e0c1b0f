"""Sequential quantization of any function: each weight is solved on the activations of the quantized model so far.

The function's equations run segment by segment over all calibration batches. When a segment ends at products with
weights, their shared input is folded into a Hessian, the weights are solved, and the dequantized results take their
place before the next segment runs. [Frantar et al. 2023, section 4, in which blocks are passed one after another]
"""

import dataclasses
import difflib
import fnmatch
import functools
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.grid import Grid, Levels, levels
from jgptq.hessian import HIGHEST, Hessian
from jgptq.solvers import METHODS, RTN, Info, Method, nearest
from jgptq.solvers.method import over_outputs, relative
from jgptq.targets import Drift, Targets, corrections, moved
from jgptq.tensor import Index, QuantizedTensor, dequantize, join
from jgptq.tracing.graph import Part, Read, Site, Step, leaf_paths, trace
from jgptq.tracing.products import Dot, Product, empty_hessian
from jgptq.tracing.residual import Added, Outputs
from jgptq.tracing.segments import Program
from jgptq.tracing.stream import Stream


class QuantizationWarning(UserWarning):
    """A weight was quantized, but worse than asked for; the report's notes say how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a rule sets for the weights it matches; None keeps the setting of the call.

    tied: quantize also those used elsewhere than in products, such as an embedding that is the output head as well.
    """

    grid: Grid | None = None
    method: str | Method | None = None
    tied: bool = False

    def __post_init__(self):
        _settings(self.grid or Grid(), self.method or "gptq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What quantizing one weight, or one part of a leaf, did: its solve's `Info` on the host, and how it was asked for.

    path: of the leaf, with the part in brackets: `layers.kernel[3]`. shape: of the part. relative_error: output error
    energy over output energy; rtn_error: what rounding to nearest on the same grid would have given.
    For a batch of matrices (experts), sums over the batch and mean errors weighted by output energy.
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
    rtn_error: float
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
    finished: MutableMapping[str, tuple[QuantizedTensor, Row]] | None = None,
    offload: Literal["host"] | None = None,
) -> tuple[Any, Report]:
    """Quantizes every weight of f(params, *inputs) that `find_weights` calls quantizable.

    A Flax NNX module takes the place of f and params: quantize(module, batches, …) gives a module with packed weights.

    params: any pytree. A leaf may be lazy: no array, but with `shape`, `dtype` and a `__getitem__` that gives NumPy
        arrays; it is read when first needed and again dropped.
    batches: calibration inputs; each is the tuple of f's inputs (anything else stands for a tuple of one).
    grid: Grid() unless given. method: a name in METHODS or a Method value.
    rules: (pattern, options) pairs, the first that matches a weight's path decides: a glob on the path or a predicate
        on the Site; Options, or None to leave the weight as it is.
    progress: called with each finished row, its number from 1 and the number of rows.
    finished: weights and rows by row path. What it holds is not solved again, and each new weight goes into it at
        once and is not kept otherwise: give a mapping on disk to bound memory, and to go on after an interruption.
    offload: "host" keeps activations in the host's memory between segments; slower, for what the device cannot hold.

    Returns params with a QuantizedTensor for each quantized leaf, and the report. The caller's arrays are only read.
    Warns with QuantizationWarning when a weight came out worse than asked for.
    """
    started = time.perf_counter()
    default = _settings(Grid() if grid is None else grid, method)
    if offload not in (None, "host"):
        raise ValueError(f'offload={offload!r}; give "host", or None to keep activations on the device')
    methods = [default[1], *(options.method for _, options in _checked_rules(rules or ()) if options)]
    executor = Executor(
        f, params, batches, on_host=offload == "host", follow_float=any(map(_targets, filter(None, methods)))
    )
    plan = _plan(executor.sites, *default, rules or ())
    sites = {site.leaf: site for site in executor.sites if site.leaf in plan}
    executor.check_weights(list(sites.values()))
    steps = executor.choose(plan)
    names = {_key(part): sites[part.leaf].name(part) for step in steps for part in step.parts}
    if finished is not None:
        _check_finished(finished, steps, names, sites, plan)
    _check_permutations(steps, sites, plan)
    rows: list[Row] = []
    packed: dict[int, dict[Index, QuantizedTensor]] = defaultdict(dict)
    for step in steps:
        todo = [part for part in step.parts if finished is None or names[_key(part)] not in finished]
        if todo:
            hessian, drift = executor.moments(step)
            targets = _all_targets(executor, step, todo, hessian, drift, plan)
            shared = _prepared(hessian, {part.leaf: plan[part.leaf] for part in todo})
            hessian = drift = None
        else:
            executor.advance(step)
        for part in step.parts:
            clock = time.perf_counter()
            site, name = sites[part.leaf], names[_key(part)]
            if finished is not None and name in finished:
                weight, row = finished[name]
                weight = jax.tree.map(lambda array: jnp.asarray(array[...]), weight)
            else:
                weight, row = _solve_part(
                    executor, site, part, targets.pop(_key(part), None), shared[part.leaf], *plan[part.leaf]
                )
                row = dataclasses.replace(row, seconds=time.perf_counter() - clock)
                if finished is not None:
                    finished[name] = weight, row
            executor.replace(part, _dequantize(weight))
            if finished is None:
                packed[part.leaf][part.index] = weight
            rows.append(row)
            if progress:
                progress(row, len(rows), len(names))
        shared = None  # before the next step makes its own

    leaves, tree = jax.tree.flatten(params)
    for leaf, site in sites.items():
        parts = packed.pop(leaf, None) or {part.index: finished[names[_key(part)]][0] for part in site.parts}
        leaves[leaf] = _joined(site, parts)
    report = Report(
        rows=tuple(rows),
        skipped=tuple(
            (site.path, "left alone by a rule" if site.quantizable else site.reason)
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
    return jax.tree.unflatten(tree, leaves), report


def _check_finished(finished: Any, steps: Sequence[Step], names: dict, sites: dict[int, Site], plan: dict) -> None:
    """Finished weights must be what this run would make."""
    if len(set(names.values())) < len(names):
        raise ValueError("two weights have the same path, so `finished` cannot tell them apart; rename one")
    for part in (part for step in steps for part in step.parts):
        name, (grid, _) = names[_key(part)], plan[part.leaf]
        if name not in finished:
            continue
        weight, _ = finished[name]
        given = (weight.layout, weight.bits, weight.group_size, weight.symmetric, jnp.dtype(weight.scales.dtype))
        length = grid.group_length(part.layout.in_features)
        if given != (part.layout, grid.bits, length, grid.symmetric, jnp.dtype(grid.scale_dtype)) or (
            jnp.dtype(weight.dtype) != sites[part.leaf].dtype
        ):
            raise ValueError(
                f"finished[{name!r}] is a {weight}, which is not what {grid} makes of this weight of shape "
                f"{part.layout.shape}; remove it, or use the settings it was made with"
            )


def _check_permutations(steps: Sequence[Step], sites: dict[int, Site], plan: dict) -> None:
    """Outputs side by side share a permutation of the inputs, so they must see the same inputs."""
    seen: dict[Any, int] = {}
    for number, step in enumerate(steps):
        for part in step.parts:
            layout = sites[part.leaf].layout
            cell = (part.leaf, *(part.index[layout.axes[k]] for k in layout.batch_axes))
            if getattr(plan[part.leaf][1], "act_order", None) is True and seen.setdefault(cell, number) != number:
                raise ValueError(
                    f"{sites[part.leaf].path} is used through slices that see different inputs, which act_order=True "
                    'would permute differently; use act_order="group" or "static", or leave it alone with a rule'
                )


_dequantize = jax.jit(dequantize)
NOT_FINITE = "NaN or infinity in {}; repair or leave alone such weights with a rule"


def _key(part: Part) -> tuple[int, Index]:
    return part.leaf, part.index


def _joined(site: Site, parts: dict[Index, QuantizedTensor]) -> QuantizedTensor:
    """The leaf's QuantizedTensor from those of its parts."""
    if len(parts) == 1:
        (weight,) = parts.values()
        return dataclasses.replace(weight, layout=site.layout.unstacked())
    return join(site.layout, {index: jax.tree.map(lambda a: a[...], weight) for index, weight in parts.items()})


def _prepared(hessian: Hessian, plan: dict[int, tuple[Grid, Method]]) -> dict[int, Any]:
    """What the solves of a step take, by leaf: the Hessian, or what the method prepares in its place."""
    prepared: dict[Any, Any] = {}

    def of(grid: Grid, method: Method) -> Any:
        if hessian.total.ndim != 2 or not hasattr(method, "prepare"):
            return hessian
        key = grid.group_length(hessian.in_features), method
        if key not in prepared:
            # Done with the Hessian before a weight takes memory beside it.
            prepared[key] = jax.block_until_ready(method.prepare(hessian, grid))
        return prepared[key]

    return {leaf: of(*settings) for leaf, settings in plan.items()}


def _targets(method: str | Method) -> Targets | None:
    method = METHODS[method] if isinstance(method, str) else method
    return getattr(method, "targets", None)


def _all_targets(
    executor: "Executor", step: Step, todo: Sequence[Part], hessian: Hessian, drift: Drift | None, plan: dict
) -> dict[tuple[int, Index], jax.Array]:
    """What the parts of a step are to be solved towards, where that is not the parts themselves."""
    found: dict[tuple[int, Index], jax.Array] = {}
    if drift is None:
        return found
    wanted = {_key(part): _targets(plan[part.leaf][1]) for part in todo}
    if hessian.total.ndim == 3:
        hessian, drift = _share(hessian), drift._replace(inputs=_share_sums(hessian, drift.inputs))
    by_ridge = {ridge: corrections(hessian, drift, ridge) for ridge in {t.ridge for t in wanted.values() if t}}
    for number, part in enumerate(step.parts):
        if targets := wanted.get(_key(part)):
            correction = by_ridge[targets.ridge]
            w = part.layout.to_matrix(executor.leaf(part.leaf, part.index))
            matrices = w.reshape(-1, *w.shape[-2:]) if w.ndim > 2 else w
            strengths = jnp.array([targets.inputs, targets.residual], jnp.float32)
            target = moved(matrices, correction.inputs, correction.residuals.get(number), strengths)
            found[_key(part)] = target.reshape(w.shape)
    return found


def _solve_part(
    executor: "Executor", site: Site, part: Part, target: Any, shared: Any, grid: Grid, method: Method
) -> tuple[QuantizedTensor, Row]:
    """target: what to solve towards; None: the weight itself. shared: of `_prepared`."""
    w = part.layout.to_matrix(executor.leaf(part.leaf, part.index))
    target = w if target is None else target
    if w.ndim == 2:
        weight, info = method.solve(target, shared, grid)
        same = isinstance(method, RTN) and target is w
        error = info.relative_error if same else _rtn_error(w, target, shared, info, grid)
    else:
        matrices, targets = (matrix.reshape(-1, *w.shape[-2:]) for matrix in (w, target))
        weight, info, error = _solve_batch(matrices, targets, _share(shared), grid, method)
        weight = jax.tree.map(lambda array: array.reshape(*w.shape[:-2], *array.shape[1:]), weight)
    weight = dataclasses.replace(weight, layout=part.layout, dtype=w.dtype)
    row = _row(site.name(part), part, weight, w, info, error, shared.tokens, grid, method)
    return weight, row


@functools.partial(jax.jit, static_argnames=("grid", "method"))
def _solve_batch(w: jax.Array, target: jax.Array, hessian: Hessian, grid: Grid, method: Method) -> Any:
    """One matrix after another, each on its own Hessian: only one factor is in memory."""

    def solve(operands):
        w, target, hessian = operands
        weight, info = method.solve(target, hessian, grid)
        return weight, info, _rtn_error(w, target, hessian, info, grid)

    return jax.lax.map(solve, (w, target, hessian))


@jax.jit
def _share(hessian: Hessian) -> Hessian:
    """A matrix that saw fewer tokens than it has inputs gets the Hessian of all."""
    tokens = jnp.where(_starved(hessian), jnp.sum(hessian.tokens), hessian.tokens)
    return Hessian(_share_sums(hessian, hessian.total), tokens)


@jax.jit
def _share_sums(hessian: Hessian, sums: jax.Array) -> jax.Array:
    return jnp.where(_starved(hessian)[:, None, None], jnp.sum(sums, axis=0), sums)


def _starved(hessian: Hessian) -> jax.Array:
    return hessian.tokens < hessian.in_features


def _rtn_error(w: jax.Array, target: jax.Array, shared: Any, info: Info, grid: Grid) -> jax.Array:
    """The relative output error of rounding to nearest."""
    return _rounding_error(w, target, shared, info.output, levels(grid))


@jax.jit
def _rounding_error(w: jax.Array, target: jax.Array, shared: Any, output: jax.Array, grid: Levels) -> jax.Array:
    def error(both):
        w, target = both[:w_in], both[w_in:]
        return shared.energy(target - nearest(w, grid)[-1])

    w_in = w.shape[0]
    both = jnp.concatenate([w.astype(jnp.float32), target.astype(jnp.float32)])
    return relative(jnp.sum(over_outputs(error, both)), output)


def _plan(sites, grid: Grid, method: Method, rules: Sequence[Rule]) -> dict[int, tuple[Grid, Method]]:
    """Grid and method of each weight to quantize, by the leaf's number: two leaves may read as one path."""
    if not any(site.quantizable or (rules and site.tied) for site in sites):
        reasons = "; ".join(f"{site.path}: {site.reason}" for site in sites[:5]) or "it has no floating-point leaf"
        raise ValueError(f"the function has no weight that can be quantized ({reasons}); see jgptq.find_weights")
    plan = {site.leaf: (grid, method) for site in sites if site.quantizable}
    undecided = {site.leaf for site in sites}
    for pattern, options in _checked_rules(rules):
        matches = pattern if callable(pattern) else lambda site, glob=pattern: fnmatch.fnmatchcase(site.path, glob)
        hits = [site for site in sites if matches(site)]
        if not hits:
            nearest = difflib.get_close_matches(str(pattern), [site.path for site in sites], n=3, cutoff=0.0)
            raise ValueError(f"no weight matches the rule {pattern!r}; the nearest paths are {', '.join(nearest)}")
        able = [site for site in hits if options and (site.quantizable or (site.tied and options.tied))]
        if options and not able:
            raise ValueError(
                f"the rule {pattern!r} sets options for {hits[0].path}, which cannot be quantized ({hits[0].reason}); "
                "remove the rule, or give None instead of options"
            )
        for site in hits:
            if site.leaf not in undecided:
                continue
            undecided.remove(site.leaf)
            if options is None:
                plan.pop(site.leaf, None)
            elif site in able:
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


def _row(name: str, part: Part, weight, w, info, rtn_error, tokens, grid: Grid, method: Method) -> Row:
    """The row of a solve; for a batch of matrices its arguments have a leading axis."""
    info, rtn_error, tokens = jax.tree.map(np.atleast_1d, jax.device_get((info, rtn_error, tokens)))
    if not info.finite.all():
        if not _all_finite(w):
            raise ValueError(NOT_FINITE.format(name))
        raise ValueError(
            f"the activations that reach {name} in calibration contain NaN or infinity; "
            "check the calibration inputs and the function's dtype (bfloat16 or float32 rather than float16)"
        )
    damp = float(info.damp.max())
    if info.failed.any():
        raise ValueError(
            f"the Hessian of {name} could not be factored with any damping up to {damp:g}; "
            "calibrate on more tokens, or leave this weight alone with a rule"
        )
    notes = []
    in_features, batch = weight.in_features, len(tokens)
    dead = info.dead_inputs == in_features
    starved = tokens < in_features
    if dead.all():
        notes.append("its inputs were zero throughout calibration: rounded to nearest")
    elif batch == 1 and starved.any():
        notes.append(f"saw {tokens[0]} tokens, fewer than its {in_features} inputs: calibrate on more")
    elif starved.any():
        numbers, counts = (", ".join(map(str, values)) for values in (np.flatnonzero(starved), tokens[starved]))
        notes.append(
            f"of its {batch} matrices (experts), {numbers} saw fewer tokens ({counts}) than their {in_features} "
            "inputs: solved on the tokens of all"
        )
    asked = getattr(method, "damp", 0.0)
    if damp > 1.001 * asked:
        notes.append(f"damping raised from {asked:g} to {damp:g}: the factorization failed below")
    at_limit = int(info.scales_at_limit.sum())
    if at_limit:
        notes.append(f'{at_limit} scales are outside the range of {grid.scale_dtype}: use Grid(scale_dtype="float32")')
    share = info.output / max(info.output.sum(), np.finfo(np.float32).tiny)
    return Row(
        path=name,
        shape=part.layout.shape,
        method=method.name,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=weight.symmetric,
        nbytes=weight.nbytes,
        tokens=int(tokens.sum()),
        loss=float(info.loss.sum()),
        relative_error=float((share * info.relative_error).sum()),
        rtn_error=float((share * rtn_error).sum()),
        damp=damp,
        seconds=0.0,
        notes=tuple(notes),
    )


class Executor:
    """Runs a function's equations over all batches at once, in segments that end at products with weights."""

    def __init__(
        self,
        f: Callable,
        params: Any,
        batches: Iterable[Any],
        *,
        keep_outputs: bool = False,
        on_host: bool = False,
        follow_float: bool = False,
    ):
        batches = _checked_batches(batches)
        self._leaves = []
        for path, leaf in leaf_paths(params):
            if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
                raise TypeError(f"{path} is a {type(leaf).__name__}, with no values; give arrays, outside of jit")
            self._leaves.append(leaf)
        self._quantized: dict[tuple[int, Index], jax.Array] = {}
        self._programs: dict[Program, Program] = {}
        self._follow_float, self._replaced = follow_float, False
        by_shape: dict[Any, list] = {}
        for batch in batches:
            by_shape.setdefault(_signature(batch), []).append(batch)
        self._streams = [
            Stream(
                trace(f, params, *group[0]),
                group,
                self.leaf,
                self._programs,
                keep_outputs=keep_outputs,
                on_host=on_host,
                read_float=self.float_leaf if follow_float else None,
            )
            for group in by_shape.values()
        ]
        self.sites = self._streams[0].graph.sites

    def choose(self, leaves: Iterable[int] | None = None) -> list[Step]:
        """The steps in which these leaves (None: all that are quantizable) are to be solved, in order."""
        leaves = [site.leaf for site in self.sites if site.quantizable] if leaves is None else list(leaves)
        steps = [stream.graph.steps(leaves) for stream in self._streams]
        keys = [[[_key(part) for part in step.parts] for step in theirs] for theirs in steps]
        if any(other != keys[0] for other in keys[1:]):
            raise ValueError(
                "the function uses other weights, or in another order, on batches of other shapes; "
                "give calibration batches of one shape"
            )
        # A step as each stream's own graph has it.
        self._steps = {id(theirs[0]): theirs for theirs in zip(*steps, strict=True)}
        return steps[0]

    @property
    def programs(self) -> int:
        """Distinct programs compiled so far."""
        return len(self._programs)

    def leaf(self, number: int, index: Index) -> jax.Array:
        """Part of a leaf as it now is: quantized where that is done."""
        if (number, index) in self._quantized:
            return self._quantized[number, index]
        part = self.float_leaf(number, index)
        for (other, theirs), values in self._quantized.items():
            shared = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(index, theirs, strict=False)]
            if other == number and all(start < stop for start, stop in shared):
                mine, its = (
                    tuple(slice(start - o[0], stop - o[0]) for (start, stop), o in zip(shared, origin, strict=True))
                    for origin in (index, theirs)
                )
                part = part.at[mine].set(values[its])
        return part

    def float_leaf(self, number: int, index: Index) -> jax.Array:
        """Part of a leaf as it was given."""
        leaf = self._leaves[number]
        shape = np.shape(leaf)
        if _is_lazy(leaf) or any(bounds != (0, size) for bounds, size in zip(index, shape, strict=True)):
            leaf = leaf[tuple(slice(*bounds) for bounds in index)]
        return jnp.asarray(leaf)

    def replace(self, part: Part, values: jax.Array) -> None:
        """Puts quantized values in place of part of a leaf for all equations still to run."""
        self._replaced = True
        self._quantized[_key(part)] = values

    def check_weights(self, sites: Sequence[Site]) -> None:
        """Lazy leaves are checked when they are solved."""
        here = [site for site in sites if not _is_lazy(self._leaves[site.leaf])]
        flags = jax.device_get([_all_finite(jnp.asarray(self._leaves[site.leaf])) for site in here])
        bad = [site.path for site, finite in zip(here, flags, strict=True) if not finite]
        if bad:
            raise ValueError(NOT_FINITE.format(", ".join(bad[:5])))

    def advance(self, step: Step) -> None:
        """Advances all batches to where a step's weights are first needed."""
        for stream, own in zip(self._streams, self._steps[id(step)], strict=True):
            stream.advance(own.start)
        for key in [key for key in self._quantized if all(stream.has_passed(*key) for stream in self._streams)]:
            del self._quantized[key]

    def moments(self, step: Step) -> tuple[Hessian, Drift | None]:
        """Advances to a step and sums the Hessian of its activations, and how they differ from the float model's.

        The drift is None if float activations are not followed, or do not differ yet. Its residuals are by the number
        of a part in the step. Where the step's weights are needed before all of their activations are known (shared by
        several calls, or tied), the equations in between run on the weights as they are, and then again from the start
        of the step.
        """
        self.advance(step)
        layout = step.parts[0].layout
        hessian, drift = empty_hessian(layout), None
        if self._follow_float and self._replaced:
            writes = [
                (number, part.layout.out_features)
                for number, part in enumerate(step.parts)
                if any(read.added for read in part.reads)
            ]
            residuals = {number: jnp.zeros((layout.in_features, size), jnp.float32) for number, size in writes}
            drift = Drift(jnp.zeros_like(hessian.total), residuals)
        for stream, own in zip(self._streams, self._steps[id(step)], strict=True):
            snapshot = stream.snapshot() if any(read.position > own.start for read in own.reads) else None
            order = sorted(range(len(own.reads)), key=lambda number: own.reads[number].position)
            for number in order:
                read = own.reads[number]
                stream.advance(read.position)
                for operands in zip(*map(stream.values, read.activations), strict=True):
                    hessian = _accumulate(hessian, read.product, *operands)
                if drift is not None:
                    drift = self._drift(drift, stream, read, [part.reads[number].added for part in own.parts])
            if snapshot is not None:
                stream.restore(snapshot)
        return hessian, drift

    def _drift(self, drift: Drift, stream: Stream, read: Read, added: Sequence[tuple[Added, ...]]) -> Drift:
        """Adds one product's activations. added: for each part, what its product is added to."""
        operands = zip(*map(stream.values, read.activations), strict=True)
        float_operands = zip(*map(stream.float_values, read.activations), strict=True)
        for batch, (own, theirs) in enumerate(zip(operands, float_operands, strict=True)):
            inputs = _accumulate_cross(drift.inputs, read.product, own, theirs)
            residuals = dict(drift.residuals)
            for number, values in enumerate(added):
                for value in values:
                    pair = stream.values(value.value)[batch], stream.float_values(value.value)[batch]
                    residuals[number] = _accumulate_residual(
                        residuals[number], read.product, value.outputs, own[0], *pair
                    )
            drift = Drift(inputs, residuals)
        return drift

    def outputs(self) -> list[Any]:
        """The function's outputs for each batch (batches of one shape together); needs keep_outputs."""
        results = []
        for stream in self._streams:
            results += stream.outputs()
        return results


def _is_lazy(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, but its values only when asked for."""
    return (
        not isinstance(leaf, np.ndarray | np.generic | jax.Array)
        and hasattr(leaf, "shape")
        and hasattr(leaf, "__getitem__")
    )


def _signature(batch: tuple) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


@functools.partial(jax.jit, static_argnames="product", donate_argnames="hessian")
def _accumulate(hessian: Hessian, product: Product, *operands: jax.Array) -> Hessian:
    return product.add(hessian, *operands)


@functools.partial(jax.jit, static_argnames="product", donate_argnames="total")
def _accumulate_cross(total: jax.Array, product: Product, operands: tuple, float_operands: tuple) -> jax.Array:
    return total + product.cross(*operands, *float_operands)


@functools.partial(jax.jit, static_argnames=("product", "outputs"), donate_argnames="total")
def _accumulate_residual(
    total: jax.Array, product: Dot, outputs: Outputs, x: jax.Array, value: jax.Array, float_value: jax.Array
) -> jax.Array:
    drift = outputs.rows(float_value.astype(jnp.float32) - value.astype(jnp.float32))
    return total + jnp.dot(product.rows(x).astype(jnp.float32).T, drift, precision=HIGHEST)
