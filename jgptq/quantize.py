"""Sequential quantization of any function: each weight is solved on the activations of the quantized model so far.

The function's equations run segment by segment over all calibration batches. When a segment ends at products with
weights, their shared input is folded into a Hessian, the weights are solved, and the dequantized results take their
place before the next segment runs. [Frantar et al. 2023, section 4, in which blocks are passed one after another]
"""

import dataclasses
import itertools
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.executor import NOT_FINITE, Executor, all_finite, part_key
from jgptq.grid import Grid
from jgptq.partition import replicated
from jgptq.phases import Phases
from jgptq.reader import Reader
from jgptq.rules import Rule, checked_rules, chosen_sites, completed, settings_of
from jgptq.scaling import as_asked, fold_scales, folds_of, input_scales, own_settings
from jgptq.solvers import Method
from jgptq.solves import Outcome, all_prepared, all_targets, share, solve_stack, stacks
from jgptq.tensor import Index, QuantizedTensor, dequantize, join
from jgptq.tracing.folding import Fold
from jgptq.tracing.gradients import Loss
from jgptq.tracing.graph import Part, Site, Step


class QuantizationWarning(UserWarning):
    """A weight was quantized, but worse than asked for; the report's notes say how."""


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
    """Rows in order of solving; `skipped` (path, reason) of every other float leaf; `programs` distinct programs.

    profile: (phase, seconds), the longest first, if asked for: see `quantize`.
    """

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    programs: int
    profile: tuple[tuple[str, float], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{row.path}: {note}" for row in self.rows for note in row.notes)


def quantize(
    f: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    grid: Grid | None = None,
    method: str | Method = "gptq",
    quality: str = "balanced",
    rules: Sequence[Rule] | None = None,
    loss: Loss | None = None,
    progress: Callable[[Row, int, int], None] | None = None,
    finished: MutableMapping[str, tuple[QuantizedTensor, Row]] | None = None,
    offload: Literal["host"] | None = None,
    profile: bool = False,
) -> tuple[Any, Report]:
    """Quantizes every weight of f(params, *inputs) that `find_weights` calls quantizable.

    A Flax NNX module takes the place of f and params: quantize(module, batches, …) gives a module with packed weights.

    params: any pytree. A leaf may be lazy: no array, but with `shape`, `dtype` and a `__getitem__` that gives NumPy
        arrays; it is read when first needed and again dropped. Those of the next weights to be solved are read in
        a thread while others are solved, one at a time.
    batches: calibration inputs; each is the tuple of f's inputs (anything else stands for a tuple of one).
        Where the jaxpr shows that f treats rows (the first axis) each by itself, all rows are run in the largest
        batches that fit, and the result is the same to the bit however they were split. Where it does not (batch norm
        in training, experts that take sorted tokens, a `loss`, several devices), batches are run as they are.
        Batches and params may lie on several devices, also of several processes: sums over tokens go over all of
        them, and each solves some of the outputs.
    grid: Grid() unless given. method: a name in METHODS or a Method value.
    quality: what a method's name stands for. "fast": plain GPTQ with group-aware reordering. "balanced": scales and
        zeros chosen with the solver in the loop, and weights that make up for what the quantized layers before them
        changed; up to three times the time. "best": AWQ's scaling besides, where it folds, judged by solving, and for
        each output the best of four orders of the inputs.
    rules: (pattern, options) pairs, the first that matches a weight's path decides: a glob on the path or a predicate
        on the Site; Options, or None to leave the weight as it is.
    loss: loss(outputs, inputs) of a batch gives one number, such as jgptq.next_token_loss. With it, tokens count by
        how much the float model's loss minds errors there: H = Σ g x xᵀ, g in proportion to the squared gradient of
        the loss in the product's result, averaged over outputs. Those of batched, grouped and convolution products and
        inside scans count alike, as all do without it. Takes memory for the whole model, and its activations on one
        batch, at once. An option to try: it gained nothing or lost on small models.
    progress: called with each finished row, its number from 1 and the number of rows.
    finished: weights and rows by row path. What it holds is not solved again, and each new weight goes into it at
        once and is not kept otherwise: give a mapping on disk to bound memory, and to go on after an interruption.
    offload: "host" keeps activations in the host's memory between segments; slower, for what the device cannot hold.
    profile: measure where time goes, for report.profile: "trace" (f to equations), "load" (lazy parameters, as far as
        they are waited for), "compile", "advance" (f itself on all batches), "hessian" (its sums), "targets", "solve"
        (codes packed), "pack" (dequantized values for the layers after, and the parts of a leaf joined), "write" (into
        `finished`), "other". Each phase is waited for, so all takes a little longer.

    Returns params with a QuantizedTensor for each quantized leaf, and the report; AWQ changes norms and other float
    leaves as well, as far as f alone shows what reads them. The caller's arrays are only read.
    Warns with QuantizationWarning when a weight came out worse than asked for.
    """
    phases = Phases(measured=profile)
    with phases.watching(), Reader() as reader:
        with phases("other"):
            packed, report = _quantize(
                f, params, batches, grid, method, quality, rules, loss, progress, finished, offload, phases, reader
            )
        return packed, dataclasses.replace(report, profile=phases.seconds)


def _quantize(
    f, params, batches, grid, method, quality, rules, loss, progress, finished, offload, phases: Phases, reader: Reader
) -> tuple[Any, Report]:
    started = time.perf_counter()
    default = settings_of(Grid() if grid is None else grid, method, quality)
    check_offload(offload)
    rules = [(pattern, completed(options, *default, quality)) for pattern, options in checked_rules(rules or ())]
    methods = [default[1], *(options.method for _, options in rules if options)]
    correct_biases = any(getattr(method, "bias_correction", False) for method in methods)
    follow_float = correct_biases or any(getattr(method, "targets", None) for method in methods)
    with phases("trace"):
        executor = Executor(
            f,
            params,
            batches,
            on_host=offload == "host",
            follow_float=follow_float,
            correct_biases=correct_biases,
            merge=loss is None,
            phases=phases,
            reader=reader,
        )
    run = _begun(executor, chosen_sites(executor.sites, *default, rules), finished, phases)
    if loss is not None:
        executor.weigh(loss)
    rows: list[Row] = []
    packed: dict[int, dict[Index, QuantizedTensor]] = defaultdict(dict)
    for number in range(len(run.steps)):
        for part, weight, row in _solved_step(run, number, correct_biases):
            if finished is None:
                packed[part.leaf][part.index] = weight
            elif not run.is_done(part):
                with phases("write"):
                    finished[run.name(part)] = weight, row
            rows.append(row)
            if progress:
                progress(row, len(rows), len(run.names))
    parts = {
        leaf: packed.pop(leaf, None) or {part.index: finished[run.name(part)][0] for part in site.parts}
        for leaf, site in run.sites.items()
    }
    with phases("pack"):
        result = phases.wait(_assembled(params, parts, executor.biases, run.steps, run.folds, run.sites))
    report = Report(
        rows=tuple(rows),
        skipped=tuple(
            (site.path, "left alone by a rule" if site.quantizable else site.reason)
            for site in executor.sites
            if site.leaf not in run.plan
        ),
        seconds=time.perf_counter() - started,
        programs=executor.programs,
    )
    if report.notes:
        shown = "; ".join(report.notes[:3]) + ("; …" if len(report.notes) > 3 else "")
        warnings.warn(
            f"{len(report.notes)} notes on quantized weights (report.notes has all): {shown}",
            QuantizationWarning,
            stacklevel=3,
        )
    return result, report


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is known before the first weight is solved.

    plan: grid and method by leaf. names: of parts. several: leaves with different inputs for different outputs.
    folds: what takes the scales of inputs, by the step's number.
    """

    executor: Executor
    plan: dict[int, tuple[Grid, Method]]
    sites: dict[int, Site]
    steps: list[Step]
    names: dict[tuple[int, Index], str]
    several: set[int]
    folds: dict[int, tuple[Fold, ...]]
    finished: MutableMapping[str, tuple[QuantizedTensor, Row]] | None
    phases: Phases

    def name(self, part: Part) -> str:
        return self.names[part_key(part)]

    def is_done(self, part: Part) -> bool:
        return self.finished is not None and self.name(part) in self.finished


def _begun(executor: Executor, plan: dict, finished: Any, phases: Phases) -> _Run:
    """The run of a plan that was checked against the function, its weights and what is finished."""
    sites = {site.leaf: site for site in executor.sites if site.leaf in plan}
    with phases("load"):
        executor.check_weights(list(sites.values()))
    steps = executor.choose(plan)
    names = {part_key(part): sites[part.leaf].name(part) for step in steps for part in step.parts}
    if finished is not None:
        _check_finished(finished, steps, names, sites, plan)
    several = _several_inputs(steps, sites)
    _check_permutations(several, sites, plan)
    folds = folds_of(executor, steps, sites, plan)
    return _Run(executor, plan, sites, steps, names, several, folds, finished, phases)


def _solved_step(run: _Run, number: int, correct_biases: bool) -> Iterator[tuple[Part, QuantizedTensor, Row]]:
    """Solves the weights of a step that are not done, and puts all in their places; then gives each with its row."""
    executor, step = run.executor, run.steps[number]
    own = own_settings(step, run.plan, run.several, number in run.folds)
    done = [part for part in step.parts if run.is_done(part)]
    todo = [part for part in step.parts if part not in done]
    clock = time.perf_counter()
    weights, outcomes = _solved_parts(run, step, todo, own, correct_biases)
    for following in run.steps[number + 1 : number + 2]:
        executor.read_ahead(following, itertools.filterfalse(run.is_done, following.parts))
    # The one place in a step where the host waits for the device.
    outcomes = jax.device_get(outcomes)
    seconds = (time.perf_counter() - clock) / max(1, sum(math.prod(part.layout.shape) for part in todo))
    for part in step.parts:
        weight = weights.pop(part_key(part))
        if part in done:
            yield part, weight, run.finished[run.name(part)][1]
            continue
        row = _row(executor, run.sites[part.leaf], part, weight, outcomes[part_key(part)], *own[part.leaf])
        row = as_asked(row, weight, run.plan[part.leaf][1], own[part.leaf][1], number in run.folds)
        yield part, weight, dataclasses.replace(row, seconds=seconds * math.prod(part.layout.shape))


def _solved_parts(run: _Run, step: Step, todo: Sequence[Part], own: dict, correct_biases: bool) -> tuple[dict, dict]:
    """All weights of a step, and the outcomes of those solved now, by `part_key`."""
    executor, phases = run.executor, run.phases
    shared = None
    if todo or correct_biases:
        shared = _shared(run, step, todo, own)
    else:
        executor.advance(step)
    weights, outcomes = {}, {}
    for stack in stacks(executor, step.parts, own):
        solved = [None] * len(stack)
        # Beside those that are done, so that an interrupted run ends with the same bits.
        if any(part in todo for part in stack):
            with phases("solve"):
                settings = own[stack[0].leaf]
                solved = phases.wait(
                    solve_stack(executor, stack, shared.targets, shared.prepared, shared.scales, *settings)
                )
        for part, outcome in zip(stack, solved, strict=True):
            key = part_key(part)
            if part in todo:
                weight, *outcome = outcome
                outcomes[key], weight = Outcome(*outcome, shared.tokens), executor.as_given(part, weight)
            else:
                with phases("load"):
                    weight = jax.tree.map(lambda array: jnp.asarray(array[...]), run.finished[run.name(part)][0])
            weights[key] = weight
            with phases("pack"):
                values = phases.wait(_dequantize(weight))
            if getattr(run.plan[part.leaf][1], "bias_correction", False):
                executor.correct_bias(step, part, values)
            executor.replace(part, values)
    return weights, outcomes


class _Shared(NamedTuple):
    """What the solves of a step take, as `solve_stack` takes it."""

    targets: dict[tuple[int, Index], jax.Array]
    prepared: dict[tuple[Grid, Method], Any]
    scales: dict[Method, jax.Array]
    tokens: jax.Array


def _shared(run: _Run, step: Step, todo: Sequence[Part], own: dict) -> _Shared:
    """Advances to a step, sums its Hessian and makes of it what the solves take: the sums are not kept."""
    executor, phases = run.executor, run.phases
    hessian, drift = executor.moments(step)
    tokens = hessian.tokens
    if hessian.total.ndim == 3:
        hessian, drift = share(hessian, drift)
    with phases("targets"):
        targets = phases.wait(all_targets(executor, step, hessian, drift, run.plan))
    known = {own[part.leaf][1]: run.finished[run.name(part)][0].input_scales for part in step.parts if part not in todo}
    with phases("solve"):
        scales = input_scales(executor, todo, targets, hessian, own, known)
        prepared = phases.wait(all_prepared(hessian, {own[part.leaf] for part in todo}, scales))
    return _Shared(targets, prepared, scales, tokens)


def _assembled(params: Any, parts: dict, biases: dict, steps: Sequence[Step], folds: dict, sites: dict) -> Any:
    """The parameters with the solved parts joined to leaves, biases corrected, and scales folded where they can be."""
    leaves, tree = jax.tree.flatten(params)
    for (leaf, index), values in biases.items():
        whole = jnp.asarray(leaves[leaf][tuple(map(slice, leaves[leaf].shape))])
        own = np.asarray(replicated(values))
        leaves[leaf] = whole.at[tuple(slice(*bounds) for bounds in index)].set(own)
    fold_scales(leaves, parts, steps, folds)
    for leaf, site in sites.items():
        leaves[leaf] = _joined(site, parts.pop(leaf))
    return jax.tree.unflatten(tree, leaves)


def _check_finished(finished: Any, steps: Sequence[Step], names: dict, sites: dict[int, Site], plan: dict) -> None:
    """Finished weights must be what this run would make."""
    if len(set(names.values())) < len(names):
        raise ValueError("two weights have the same path, so `finished` cannot tell them apart; rename one")
    for part in (part for step in steps for part in step.parts):
        name, (grid, _) = names[part_key(part)], plan[part.leaf]
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


def _several_inputs(steps: Sequence[Step], sites: dict[int, Site]) -> set[int]:
    """Leaves of which outputs side by side see different inputs."""
    seen: dict[Any, int] = {}
    found = set()
    for number, step in enumerate(steps):
        for part in step.parts:
            layout = sites[part.leaf].layout
            cell = (part.leaf, *(part.index[layout.axes[k]] for k in layout.batch_axes))
            if seen.setdefault(cell, number) != number:
                found.add(part.leaf)
    return found


def _check_permutations(leaves: Iterable[int], sites: dict[int, Site], plan: dict) -> None:
    """Outputs side by side share a permutation of the inputs, so they must see the same inputs."""
    for leaf in leaves:
        if getattr(plan[leaf][1], "act_order", None) is True:
            raise ValueError(
                f"{sites[leaf].path} is used through slices that see different inputs, which act_order=True "
                'would permute differently; use act_order="group" or "static", or leave it alone with a rule'
            )


_dequantize = jax.jit(dequantize)


def _joined(site: Site, parts: dict[Index, QuantizedTensor]) -> QuantizedTensor:
    """The leaf's QuantizedTensor from those of its parts."""
    if len(parts) == 1:
        (weight,) = parts.values()
        return dataclasses.replace(weight, layout=site.layout.unstacked())
    whole = {index: replicated(jax.tree.map(lambda array: array[...], weight)) for index, weight in parts.items()}
    return join(site.layout, whole)


def check_offload(offload: Any) -> None:
    if offload not in (None, "host"):
        raise ValueError(f'offload={offload!r}; give "host", or None to keep activations on the device')


def _row(
    executor: Executor, site: Site, part: Part, weight: QuantizedTensor, outcome: Outcome, grid: Grid, method: Method
) -> Row:
    """The row of a solve, of its outcome on the host; ValueError if it failed."""
    name, (info, rtn_error, tokens) = site.name(part), jax.tree.map(np.atleast_1d, outcome)
    if not info.finite.all():
        if not all_finite(executor.given(part)):
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
