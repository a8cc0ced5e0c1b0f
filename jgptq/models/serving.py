"""Parameters as decoding wants them: projections of the same inputs joined, layers of one kind stacked for a scan.

A scan over stacks compiles one layer whatever the depth. Packed kernels are read in their stack by the product itself
(`tensor.Element`); anything else that a scan takes out of a stack is a copy at every token. On 2 cores of a Xeon that
makes a float32 model decode four times slower, so by default layers of which much is in float stay apart.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jgptq import tensor
from jgptq.kernels.matmul import prefers_prepacked
from jgptq.kernels.prepack import Prepacked, prepack, prepack_weight, restore
from jgptq.models.attention import Positions
from jgptq.models.layers import PACKED, Joined

# Layers are stacked where float matrices, which a scan copies, have at most a LIGHT-th of the bytes of packed ones: the
# router of a mixture of experts.
LIGHT = 16
# (period, repeats) of the runs that make up a model's layers: `period` layers, and again, `repeats` times in all.
Runs = tuple[tuple[int, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arranged:
    """A model's parameters in the arrangement that LanguageModel.arranged gave them.

    params: nested dicts, with a run's layers in the place of a layer. A leaf of a run that repeats is a stack. Numbers
        among the keys are strings here, for `jax.export` writes no others.
    prepacked: whether arranging also brought kernels to the order of `jgptq.prepack`.
    """

    params: Any
    runs: Runs = dataclasses.field(metadata={"static": True})
    prepacked: bool = dataclasses.field(metadata={"static": True}, default=False)


def _static_from_json(data: bytes) -> tuple[Runs, bool]:
    runs, prepacked = json.loads(data)
    return tuple((period, repeats) for period, repeats in runs), prepacked


jax.export.register_pytree_node_serialization(
    Arranged,
    serialized_name="jgptq.Arranged",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=_static_from_json,
)


def keys_as_strings(params: Any) -> Any:
    """The same nested dicts with the numbers among their keys as strings."""
    if not isinstance(params, dict):
        return params
    return {str(key): keys_as_strings(value) for key, value in params.items()}


def keys_as_numbers(params: Any) -> Any:
    """The inverse of `keys_as_strings`."""
    if not isinstance(params, dict):
        return params
    return {
        int(key) if isinstance(key, str) and key.isdigit() else key: keys_as_numbers(value)
        for key, value in params.items()
    }


class Repeated(nnx.Module):
    """Layers that follow one another again and again, each time with other parameters: a scan over stacks of those."""

    def __init__(self, layers: Sequence[nnx.Module], repeats: int):
        self.layers, self.repeats = nnx.List(layers), repeats

    def __call__(
        self, x: Float[Array, "batch seq features"], positions: Positions
    ) -> Float[Array, "batch seq features"]:
        graph, state = nnx.split(self.layers)
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state), is_leaf=_is_packed)

        def step(carry: tuple, _) -> tuple:
            index, x, old = carry
            inside = positions.inside(index, old)
            taken = jax.tree.unflatten(tree, [_taken(leaf, index) for leaf in leaves])
            for layer in nnx.merge(graph, taken):
                x = layer(x, inside)
            return ((index + 1, x, None), inside.cache) if old is None else ((index + 1, x, inside.cache), None)

        old = positions.next_in_cache(len(self.layers))
        (_, x, updated), made = lax.scan(step, (jnp.int32(0), x, old), length=self.repeats)
        positions.extend_cache(made if old is None else updated)
        return x


def arrange(module: nnx.Module, *, stack_floats: bool, donate: bool) -> tuple[Runs, bool]:
    """Joins, stacks and prepacks what the module holds, leaf by leaf; says in what runs, and whether it prepacked.

    Leaves on several devices stay as they are, unless `jgptq.shard` put them there; those are not joined.

    stack_floats: layers with other than packed matrices, too. donate: deletes each array given that it made another
    of, but those that stand in several places, as the order of inputs may; without, only what it made in between.
    """
    layers = list(module.decoder_layers())
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)), is_leaf=_is_packed)
    arrays = jax.tree.leaves(leaves)
    divided = any(_is_packed(leaf) and leaf.partition is not None for leaf in leaves)
    if not (stack_floats or any(map(_is_packed, leaves))) or (any(map(_is_spread, arrays)) and not divided):
        return ((1, 1),) * len(layers), False
    places = collections.Counter(map(id, arrays))
    kept = [array for array in arrays if not donate or places[id(array)] > 1]

    def release(old: Any, new: Any) -> None:
        _delete(old, new, kept)

    for projections in _sharing_inputs(layers):
        _join(projections, release)
    runs = runs_of([_kind(layer, stack_floats) for layer in layers])
    group(module, runs)
    start = 0
    for period, repeats in runs:
        stop = start + period * repeats
        for first in range(start, start + period) if repeats > 1 else ():
            _stack(layers[first:stop:period], release)
        start = stop
    return runs, _prepack(module, release)


def group(module: nnx.Module, runs: Runs) -> None:
    """Puts the first layers of each run, as one that is Repeated, in the place of the whole run."""
    layers = module.decoder_layers()
    whole, start = list(layers), 0
    del layers[:]
    for period, repeats in runs:
        first = whole[start : start + period]
        layers.append(first[0] if repeats == 1 else Repeated(first, repeats))
        start += period * repeats


def ungrouped(module: nnx.Module) -> Iterator[nnx.Module]:
    """The module's layers one by one with parameters of their own, bit for bit as they were before `arrange`."""
    for run in module.decoder_layers():
        repeats, layers = (run.repeats, run.layers) if isinstance(run, Repeated) else (1, [run])
        for index in range(repeats):
            for layer in layers:
                single = nnx.clone(layer)
                if isinstance(run, Repeated):
                    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
                    nnx.update(single, nnx.State(jax.tree.map(lambda leaf: leaf[index], state)))  # noqa: B023
                for projections in _sharing_inputs([single]):
                    _part(projections)
                yield single


def runs_of(kinds: Sequence[Hashable]) -> Runs:
    """The runs that cover layers of these kinds with the fewest layers to compile, and then the fewest runs.

    A layer that no other follows in this way is a run (1, 1).
    """
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(kind, len(numbers)) for kind in kinds]  # what stands for a layer is long to compare
    best: list[tuple[int, int, Runs]] = [(0, 0, ())]  # for what begins at the end, at the last layer, and so on
    for start in reversed(range(len(kinds))):
        left = len(kinds) - start
        choices = [(1, 1)]
        for period in range(1, left // 2 + 1):
            same = next((k for k in range(left) if kinds[start + k] != kinds[start + k % period]), left)
            choices += [(period, repeats) for repeats in range(2, same // period + 1)]
        options = []
        for period, repeats in choices:
            compiled, count, runs = best[left - period * repeats]
            options.append((compiled + period, count + 1, ((period, repeats), *runs)))
        best.append(min(options))
    return best[-1][2]


def _kind(layer: nnx.Module, stack_floats: bool) -> Hashable:
    """Equal for layers that differ in nothing but the values of their parameters, if a scan may go over them."""
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    weights = jax.tree.leaves(params, is_leaf=_is_packed)
    packed = sum(leaf.nbytes for leaf in weights if _is_packed(leaf))
    copied = sum(leaf.nbytes for leaf in weights if not _is_packed(leaf) and leaf.ndim > 1)
    if not stack_floats and copied * LIGHT > packed:
        return object()
    leaves, tree = jax.tree.flatten(params)
    return nnx.graphdef(layer), tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _sharing_inputs(layers: Sequence[nnx.Module]) -> Iterator[list[nnx.Module]]:
    """The projections of each module that multiply the same inputs, where these are several."""
    for layer in layers:
        for _, module in nnx.iter_modules(layer):
            names = getattr(module, "shared_input", ())
            if len(names) > 1:
                yield [getattr(module, name) for name in names]


def _join(projections: Sequence[nnx.Module], release: Callable[[Any, Any], None]) -> None:
    kernels = [projection.kernel.get_value() for projection in projections]
    kinds = {type(kernel) for kernel in kernels}
    if kinds == {tensor.QuantizedTensor}:
        joined = tensor.side_by_side(kernels)
    elif kinds == {Prepacked}:
        joined = tensor.side_by_side([restore(kernel) for kernel in kernels])
        joined = None if joined is None else prepack_weight(joined)
    else:
        return
    if joined is None:
        return
    widths = tuple(kernel.out_features for kernel in kernels)
    projections[0].kernel.set_value(Joined(weight=joined, widths=widths))
    for projection in projections[1:]:
        projection.kernel.set_value(None)
    release(kernels, joined)


def _part(projections: Sequence[nnx.Module]) -> None:
    """The inverse of `_join`."""
    joined = projections[0].kernel.get_value()
    if not isinstance(joined, Joined):
        return
    is_prepacked = isinstance(joined.weight, Prepacked)
    weight = restore(joined.weight) if is_prepacked else joined.weight
    start = 0
    for projection, width in zip(projections, joined.widths, strict=True):
        part = tensor.take_outputs(weight, start, start + width)
        projection.kernel.set_value(prepack_weight(part) if is_prepacked else part)
        start += width


def _stack(layers: Sequence[nnx.Module], release: Callable[[Any, Any], None]) -> None:
    """Puts stacks of the parameters of equal layers into the first of them, leaf by leaf."""

    def stacked(*arrays: Array) -> Array:
        sharding = _stacked_sharding(arrays[0])
        stack = jnp.stack(arrays) if sharding is None else jax.jit(_stacked, out_shardings=sharding)(*arrays)
        release(arrays, stack)
        return stack

    states = [nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in layers]
    nnx.update(layers[0], nnx.State(jax.tree.map(stacked, *states)))


def _stacked(*arrays: Array) -> Array:
    return jnp.stack(arrays)


def _stacked_sharding(array: Array) -> NamedSharding | None:
    """That of a stack of arrays divided as this one is; None where it lies on one device."""
    if not _is_spread(array) or not isinstance(array.sharding, NamedSharding):
        return None
    return NamedSharding(array.sharding.mesh, PartitionSpec(None, *array.sharding.spec))


def _prepack(module: nnx.Module, release: Callable[[Any, Any], None]) -> bool:
    """Brings kernels to the order of the GPU's kernel where there is one for them, and says whether there was any."""
    found = False
    for _, projection in nnx.iter_modules(module):
        kernel = projection.kernel.get_value() if hasattr(projection, "kernel") else None
        if prefers_prepacked(kernel.weight if isinstance(kernel, Joined) else kernel):
            packed = prepack(kernel)
            projection.kernel.set_value(packed)
            release(kernel, packed)
            found = True
    return found


def _delete(old: Any, new: Any, kept: Sequence[Array]) -> None:
    """Deletes arrays once what was made of them is there, but those that it holds as they are, and those to be kept."""
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(new)):
        return
    jax.block_until_ready(new)
    stay = {id(array) for array in (*jax.tree.leaves(new), *kept)}
    for array in jax.tree.leaves(old):
        if isinstance(array, jax.Array) and id(array) not in stay and not array.is_deleted():
            array.delete()


def _taken(leaf: Any, index: Int[Array, ""]) -> Any:
    """One of a stack: of packed matrices, or of experts', where it is; of anything else as a slice."""
    element = tensor.Element(stack=leaf, index=index)
    return element if _is_packed(leaf) else element.taken()


def _is_spread(array: Any) -> bool:
    """Whether it lies on several devices, which joining and stacking might bring together."""
    concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    return concrete and len(array.sharding.device_set) > 1


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PACKED)
