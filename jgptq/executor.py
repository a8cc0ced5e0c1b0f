"""All calibration batches at once through a function's equations, stopping at each product with a weight."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgptq.hessian import Hessian, mirrored
from jgptq.panels import add_product
from jgptq.partition import common_mesh, onto, placed, replicated
from jgptq.phases import UNMEASURED, Phases
from jgptq.reader import Key, Reader
from jgptq.solvers.bias import bias_correction
from jgptq.solvers.targets import Drift
from jgptq.tensor import Index
from jgptq.tracing.batching import Room, as_given, largest
from jgptq.tracing.bias import find_bias
from jgptq.tracing.folding import Fold, Sources
from jgptq.tracing.gradients import Loss, normalized
from jgptq.tracing.graph import Part, Read, Site, Step, leaf_paths
from jgptq.tracing.products import Dot, Product, empty_hessian
from jgptq.tracing.residual import Added, Outputs
from jgptq.tracing.segments import Program
from jgptq.tracing.stream import Stream

NOT_FINITE = "NaN or infinity in {}; repair or leave alone such weights with a rule"


def part_key(part: Part) -> tuple[int, Index]:
    """What tells a part from all others."""
    return part.leaf, part.index


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
        correct_biases: bool = False,
        merge: bool = False,
        phases: Phases = UNMEASURED,
        reader: Reader | None = None,
    ):
        """merge: join batches on one device and cut them anew, where rows do not meet; `weigh` and `outputs` are of
        the batches that are run, so where these are asked for it stays False.

        reader: reads lazy leaves, those of the next step ahead of time; its owner closes it. None: none ahead.
        """
        self._phases, self._reader = phases, reader
        batches = checked_batches(batches)
        self.mesh = common_mesh(batches, params)
        batches = onto(self.mesh, batches)
        self._leaves = []
        for path, leaf in leaf_paths(params):
            if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
                raise TypeError(f"{path} is a {type(leaf).__name__}, with no values; give arrays, outside of jit")
            self._leaves.append(leaf)
        self._quantized: dict[tuple[int, Index], jax.Array] = {}
        self._programs: dict[Program, Program] = {}
        self._follow_float, self._replaced = follow_float, False
        # Of tokens, by step, and then by the number of the stream and of the product; for each batch.
        self._weights: dict[int, dict[tuple[int, int], list[jax.Array]]] = {}
        self._kept: dict[tuple[int, Index], jax.Array | None] = {}
        self._correct_biases = correct_biases
        self._means: list[jax.Array] = []
        self.biases: dict[tuple[int, Index], jax.Array] = {}
        if merge and self.mesh is None:
            room = Room(
                parameters=sum(leaf.nbytes for leaf in self._leaves if hasattr(leaf, "nbytes") and not is_lazy(leaf)),
                models=2 if follow_float else 1,
                on_host=on_host,
            )
            cuts = largest(f, params, batches, room)
        else:
            cuts = as_given(f, params, batches)
        self._streams = [
            Stream(
                cut.graph,
                cut.of(batches),
                self.leaf,
                self._programs,
                keep_outputs=keep_outputs,
                on_host=on_host,
                read_float=self.float_leaf if follow_float else None,
                phases=phases,
            )
            for cut in cuts
        ]
        self.sites = self._streams[0].graph.sites

    def choose(self, leaves: Iterable[int] | None = None) -> list[Step]:
        """The steps in which these leaves (None: all that are quantizable) are to be solved, in order."""
        leaves = [site.leaf for site in self.sites if site.quantizable] if leaves is None else list(leaves)
        steps = [stream.graph.steps(leaves) for stream in self._streams]
        keys = [[[part_key(part) for part in step.parts] for step in theirs] for theirs in steps]
        if any(other != keys[0] for other in keys[1:]):
            raise ValueError(
                "the function uses other weights, or in another order, on batches of other shapes; "
                "give calibration batches of one shape"
            )
        if self._follow_float:
            self._kept = {part_key(part): None for step in steps[0] for part in step.parts}
        # A step as each stream's own graph has it.
        self._steps = {id(theirs[0]): theirs for theirs in zip(*steps, strict=True)}
        return steps[0]

    def folds(self, step: Step) -> tuple[Fold, ...] | None:
        """What factors on a step's inputs can go into, in all graphs alike; None if there is nothing."""
        own = zip(self._sources, self._steps[id(step)], strict=True)
        first, *others = [sources.folds(theirs) for sources, theirs in own]
        for other in others:
            if first is None or other is None or len(first) != len(other) or not all(map(Fold.same_as, first, other)):
                return None
        return first

    @functools.cached_property
    def _sources(self) -> list[Sources]:
        return [Sources(stream.graph) for stream in self._streams]

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
        """Part of a leaf as it was given. Parts to be quantized are kept for the float model's turn."""
        if (number, index) not in self._kept:
            return self._given(number, index)
        if self._kept[number, index] is None:
            self._kept[number, index] = self._given(number, index)
        return self._kept[number, index]

    def _given(self, number: int, index: Index) -> jax.Array:
        leaf = self._leaves[number]
        if is_lazy(leaf):
            with self._phases("load"):
                read = functools.partial(_part_of, leaf, index)
                values = self._reader.take((number, index), read) if self._reader else read()
                return self._phases.wait(onto(self.mesh, jnp.asarray(values)))
        whole = all(bounds == (0, size) for bounds, size in zip(index, np.shape(leaf), strict=True))
        return onto(self.mesh, jnp.asarray(leaf if whole else _part_of(leaf, index)))

    def as_given(self, part: Part, tree: Any) -> Any:
        """Arrays solved by parts on several devices, with a copy on each where the leaf has that."""
        sharding = getattr(self._leaves[part.leaf], "sharding", None)
        return tree if sharding is not None and not sharding.is_fully_replicated else replicated(tree)

    def given(self, part: Part) -> jax.Array:
        """A part as it was given."""
        return self._given(*part_key(part))

    def read_ahead(self, step: Step, parts: Iterable[Part]) -> None:
        """Begins to read the lazy leaves that advancing to a step and solving these of its parts will ask for."""
        if self._reader is None:
            return
        wanted = set(map(part_key, parts))
        for stream, own in zip(self._streams, self._steps[id(step)], strict=True):
            wanted |= stream.parts_before(own.start)
        self._reader.start(
            {key: functools.partial(_part_of, self._leaves[key[0]], key[1]) for key in self._unread(wanted)}
        )

    def _unread(self, wanted: Iterable[Key]) -> list[Key]:
        """Those of lazy leaves that are not at hand."""
        here = {key for key, values in self._kept.items() if values is not None} | self._quantized.keys()
        return sorted(key for key in wanted if is_lazy(self._leaves[key[0]]) and key not in here)

    def replace(self, part: Part, values: jax.Array) -> None:
        """Puts quantized values in place of part of a leaf for all equations still to run."""
        self._replaced = True
        leaf, values = self._leaves[part.leaf], onto(self.mesh, values)
        if self.mesh is not None and values.shape == np.shape(leaf) and isinstance(leaf, jax.Array):
            values = placed(values, onto(self.mesh, leaf).sharding)
        self._quantized[part_key(part)] = values

    def check_weights(self, sites: Sequence[Site]) -> None:
        """Lazy leaves are checked when they are solved."""
        here = [site for site in sites if not is_lazy(self._leaves[site.leaf])]
        flags = jax.device_get([all_finite(jnp.asarray(self._leaves[site.leaf])) for site in here])
        bad = [site.path for site, finite in zip(here, flags, strict=True) if not finite]
        if bad:
            raise ValueError(NOT_FINITE.format(", ".join(bad[:5])))

    def advance(self, step: Step) -> None:
        """Advances all batches to where a step's weights are first needed."""
        for stream, own in zip(self._streams, self._steps[id(step)], strict=True):
            stream.advance(own.start)
        for values in (self._quantized, self._kept):
            for key in [key for key in values if all(stream.has_passed(*key) for stream in self._streams)]:
                del values[key]

    def moments(self, step: Step) -> tuple[Hessian, Drift | None]:
        """Advances to a step and sums the Hessian of its activations, and how they differ from the float model's.

        The drift is None if float activations are not followed, or do not differ yet. Its residuals are by the number
        of a part in the step. Where the step's weights are needed before all of their activations are known (shared by
        several calls, or tied), the equations in between run on the weights as they are, and then again from the start
        of the step.
        """
        self.advance(step)
        with self._phases("hessian"):
            return self._phases.wait(self._moments(step))

    def _moments(self, step: Step) -> tuple[Hessian, Drift | None]:
        layout = step.parts[0].layout
        hessian, drift = onto(self.mesh, empty_hessian(layout)), None
        if self._follow_float and self._replaced:
            writes = [
                (number, part.layout.out_features)
                for number, part in enumerate(step.parts)
                if any(read.added for read in part.reads)
            ]
            residuals = {number: jnp.zeros((layout.in_features, size), jnp.float32) for number, size in writes}
            drift = onto(self.mesh, Drift(jnp.zeros_like(hessian.total), residuals))
        inputs = [jnp.zeros(layout.in_features)] * 2 if self._correct_biases and hessian.total.ndim == 2 else []
        inputs = onto(self.mesh, inputs)
        for place, (stream, own) in enumerate(zip(self._streams, self._steps[id(step)], strict=True)):
            snapshot = stream.snapshot() if any(read.position > own.start for read in own.reads) else None
            order = sorted(range(len(own.reads)), key=lambda number: own.reads[number].position)
            for number in order:
                read = own.reads[number]
                weights = self._weights.get(id(step), {}).get((place, number)) or [None] * stream.batches
                stream.advance(read.position)
                for each, *operands in zip(weights, *map(stream.values, read.activations), strict=True):
                    hessian = _accumulate(hessian, read.product, each, *operands)
                if inputs:
                    inputs = self._add_inputs(inputs, stream, read)
                if drift is not None:
                    drift = self._drift(drift, stream, read, weights, [part.reads[number].added for part in own.parts])
            if snapshot is not None:
                stream.restore(snapshot)
        self._means = [total / jnp.maximum(hessian.tokens, 1) for total in inputs]
        return replicated((_mirrored(hessian), drift))

    def _add_inputs(self, totals: list[jax.Array], stream: Stream, read: Read) -> list[jax.Array]:
        """Adds one product's inputs, summed over tokens, in both models."""
        totals = list(totals)
        float_values = stream.float_values if self._replaced else stream.values
        for number, values in enumerate((stream.values, float_values)):
            for x in values(read.activations[0]):
                totals[number] = _accumulate_inputs(totals[number], read.product, x)
        return totals

    def correct_bias(self, step: Step, part: Part, quantized: jax.Array) -> None:
        """Corrects the bias of a part, if it has one, for all equations still to run; to be found in `biases`.

        The step is the one that `moments` was called for last. A weight with several products has no bias.
        """
        found = [
            find_bias(stream.graph, other.reads[0], own.start)
            for stream, own in zip(self._streams, self._steps[id(step)], strict=True)
            for other in own.parts
            if part_key(other) == part_key(part) and len(other.reads) == 1
        ]
        bias = found[0] if found else None
        if bias is None or any(other is None or other[:2] != bias[:2] for other in found):
            return
        w = part.layout.to_matrix(self.float_leaf(part.leaf, part.index))
        change = bias_correction(w, part.layout.to_matrix(quantized), *self._means)
        values = self.leaf(bias.leaf, bias.index)
        flat = values.astype(jnp.float32).reshape(-1).at[bias.elements].add(change)
        self._quantized[bias.leaf, bias.index] = flat.reshape(values.shape).astype(values.dtype)
        self.biases[bias.leaf, bias.index] = self._quantized[bias.leaf, bias.index]

    def weigh(self, loss: Loss) -> dict[tuple[int, Index], float]:
        """Lets each token count in Hessians and drifts by the square of a loss's gradient in the products' results.

        loss(outputs, inputs): one number for a batch, of the function's outputs and its inputs. To be called when the
        steps are chosen and none has begun. A token's weight is in proportion to the mean over all outputs of a step,
        and 1 on average; tokens of batched, grouped and convolution products and inside scans keep the weight 1.

        Returns, by `part_key`, what an error in a part's output costs: the sum over tokens of the mean over outputs of
        the squared gradient. Parts whose products' results are not to be seen, such as those in scans, are missing.
        """
        costs: dict[tuple[int, Index], float] = defaultdict(float)
        self._weights = {key: {} for key in self._steps}
        for number, stream in enumerate(self._streams):
            reads = [read for theirs in self._steps.values() for part in theirs[number].parts for read in part.reads]
            reads = [read for read in reads if read.result is not None]
            by_batch = stream.squared_gradients(reads, loss, self._given)
            sums = dict(zip(map(id, reads), zip(*by_batch, strict=True), strict=True))
            for key, theirs in self._steps.items():
                step = theirs[number]
                for part in step.parts:
                    found = [sums[id(read)] for read in part.reads if id(read) in sums]
                    if found:
                        costs[part_key(part)] += sum(float(np.sum(batch)) for read in found for batch in read) / (
                            part.layout.out_features
                        )
                for place, reads_here in enumerate(zip(*(part.reads for part in step.parts), strict=True)):
                    if all(id(read) in sums and read.outputs is not None for read in reads_here):
                        batches = zip(*(sums[id(read)] for read in reads_here), strict=True)
                        self._weights[key][number, place] = [sum(batch) for batch in batches]
        self._weights = {key: normalized(weights) for key, weights in self._weights.items()}
        return costs

    def _drift(
        self, drift: Drift, stream: Stream, read: Read, weights: Sequence, added: Sequence[tuple[Added, ...]]
    ) -> Drift:
        """Adds one product's activations. added: for each part, what its product is added to."""
        operands = zip(*map(stream.values, read.activations), strict=True)
        float_operands = zip(*map(stream.float_values, read.activations), strict=True)
        for batch, (each, own, theirs) in enumerate(zip(weights, operands, float_operands, strict=True)):
            inputs = _accumulate_cross(drift.inputs, read.product, each, own, theirs)
            residuals = dict(drift.residuals)
            for number, values in enumerate(added):
                for value in values:
                    pair = stream.values(value.value)[batch], stream.float_values(value.value)[batch]
                    residuals[number] = _accumulate_residual(
                        residuals[number], read.product, each, value.outputs, own[0], *pair
                    )
            drift = Drift(inputs, residuals)
        return drift

    def outputs(self) -> list[Any]:
        """The function's outputs for each batch (batches of one shape together); needs keep_outputs."""
        results = []
        for stream in self._streams:
            results += stream.outputs()
        return results


def _part_of(leaf: Any, index: Index) -> Any:
    return leaf[tuple(slice(*bounds) for bounds in index)]


def is_lazy(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, but its values only when asked for."""
    return (
        not isinstance(leaf, np.ndarray | np.generic | jax.Array)
        and hasattr(leaf, "shape")
        and hasattr(leaf, "__getitem__")
    )


@jax.jit
def all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


@functools.partial(jax.jit, static_argnames="product", donate_argnames="hessian")
def _accumulate(hessian: Hessian, product: Product, weights: jax.Array | None, *operands: jax.Array) -> Hessian:
    return product.add(hessian, *operands, **_given(weights))


@functools.partial(jax.jit, donate_argnums=0)
def _mirrored(hessian: Hessian) -> Hessian:
    return (mirrored if hessian.total.ndim == 2 else jax.vmap(mirrored))(hessian)


@functools.partial(jax.jit, static_argnames="product", donate_argnames="total")
def _accumulate_cross(
    total: jax.Array, product: Product, weights: jax.Array | None, operands: tuple, float_operands: tuple
) -> jax.Array:
    return product.add_cross(total, *operands, *float_operands, **_given(weights))


@functools.partial(jax.jit, static_argnames="product")
def _accumulate_inputs(total: jax.Array, product: Product, x: jax.Array) -> jax.Array:
    return total + jnp.sum(product.rows(x).astype(jnp.float32), axis=0)


def _given(weights: jax.Array | None) -> dict[str, jax.Array]:
    """Only products of tokens with one weight take weights of tokens, and get them."""
    return {} if weights is None else {"weights": weights}


@functools.partial(jax.jit, static_argnames=("product", "outputs"), donate_argnames="total")
def _accumulate_residual(
    total: jax.Array,
    product: Dot,
    weights: jax.Array | None,
    outputs: Outputs,
    x: jax.Array,
    value: jax.Array,
    float_value: jax.Array,
) -> jax.Array:
    drift = outputs.rows(float_value.astype(jnp.float32) - value.astype(jnp.float32))
    drift = drift if weights is None else drift * weights[:, None]
    return add_product(total, product.rows(x), drift)


def checked_batches(batches: Any, *, shapes: bool = False) -> list[tuple]:
    """Each batch as the tuple of the function's inputs. shapes: whether ShapeDtypeStructs may stand for arrays."""
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
            if not _has_values(leaf) and not (shapes and isinstance(leaf, jax.ShapeDtypeStruct)):
                raise TypeError(
                    f"batch {number} holds a {type(leaf).__name__}; its inputs are arrays or numbers: "
                    "bind anything else to the function with functools.partial"
                )
    return batches


def _has_values(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
        return False
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
