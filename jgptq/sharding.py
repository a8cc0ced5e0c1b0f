"""Several devices: packed parameters divided over a mesh, and solves in which each device has some of the outputs."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jgptq.grid import Grid
from jgptq.kernels.prepack import Prepacked, prepack_weight, restore
from jgptq.partition import Partition, auto, dividing_axes, placed
from jgptq.solvers.method import Info, Method
from jgptq.tensor import QuantizedTensor, divisible
from jgptq.tracing.graph import is_quantized, leaf_paths

# The products after which a block's result is whole again, by the names that transformers give them.
BY_INPUTS = ("*o_proj*", "*down_proj*", "*out_proj*", "*c_proj*", "*fc2*", "*w2*", "*.dense.*", "*dense_4h_to_h*")
# Float matrices of fewer elements have a copy on each device.
LARGE = 2**20


def shard(params: Any, mesh: Mesh | AbstractMesh, *, axis: str = "model", by_inputs: Sequence[str] = BY_INPUTS) -> Any:
    """Packed parameters divided over a mesh, for products in parallel: a pytree of the same leaves, placed.

    Packed weights are divided by outputs, and those whose paths match a glob of `by_inputs` by inputs, whose products
    are then summed over the devices; as Megatron-LM does it [Shoeybi et al. 2019]. Where whole words, whole groups or
    a permutation forbid inputs it is outputs; where neither can be divided, each device has a copy. So has it of
    float arrays, but for matrices of at least LARGE elements, which are divided along their longest axis.

    `matmul`, `quantized(f)`, the models and `generate` take the result: each device multiplies by its own part with
    the kernel that its platform has, and rows are divided over the mesh's other axes. A weight says in its `partition`
    how it is divided, so it is to be moved by this function, and not by jax.device_put.

    mesh: its axes are taken as Auto, and other arrays on a mesh that meet these must have such; an AbstractMesh is for
        ShapeDtypeStructs, to compile ahead of time.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r}; the mesh has the axes {tuple(mesh.axis_names)}")
    if isinstance(by_inputs, str):
        raise TypeError(f"by_inputs={by_inputs!r}; give a sequence of globs on paths, such as [{by_inputs!r}]")
    mesh = auto(mesh)
    leaves = [
        _packed(leaf, mesh, axis, any(fnmatch.fnmatchcase(path, glob) for glob in by_inputs))
        if is_quantized(leaf)
        else _float(leaf, mesh, axis)
        for path, leaf in leaf_paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), leaves)


def _packed(weight: QuantizedTensor | Prepacked, mesh: Any, axis: str, by_inputs: bool) -> QuantizedTensor | Prepacked:
    if isinstance(weight, Prepacked):
        return prepack_weight(_packed(restore(weight), mesh, axis, by_inputs))
    weight = dataclasses.replace(weight, partition=None)
    choices = ("inputs", "outputs") if by_inputs else ("outputs",)
    of = next((of for of in choices if divisible(weight, of, mesh.shape[axis])), None)
    if of is None:
        return jax.tree.map(lambda array: placed(array, NamedSharding(mesh, PartitionSpec())), weight)
    weight = dataclasses.replace(weight, partition=Partition(mesh=mesh, axis=axis, of=of))
    return jax.tree.map(lambda array, spec: placed(array, NamedSharding(mesh, spec)), weight, weight.specs())


def _float(leaf: Any, mesh: Any, axis: str) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    spec = PartitionSpec()
    if leaf.ndim > 1 and leaf.size >= LARGE:
        longest = max(range(leaf.ndim), key=lambda dim: (leaf.shape[dim], dim))
        if leaf.shape[longest] % mesh.shape[axis] == 0:
            spec = PartitionSpec(*[None] * longest, axis)
    return placed(leaf, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames=("solve", "grid", "method", "mesh"))
def solve_by_outputs(
    w: jax.Array,
    target: jax.Array,
    *shared: Any,
    solve: Callable,
    grid: Grid,
    method: Method,
    mesh: Mesh | AbstractMesh,
) -> tuple[QuantizedTensor, Info, jax.Array]:
    """solve(w, target, *shared, grid, method) with an equal part of the outputs on each device, `shared` on all.

    solve: gives a QuantizedTensor, an Info and a relative error, of a (…, in, out) matrix. The tensor's layout is that
    of a part; its arrays come back divided by outputs, what it says of errors is of all of them.
    """
    axes = dividing_axes(mesh, w.shape[-1])
    columns = PartitionSpec(*[None] * (w.ndim - 1), axes)
    count = w.shape[-1] // NamedSharding(mesh, columns).shard_shape(w.shape)[-1]

    def own(w: jax.Array, target: jax.Array, *shared: Any) -> Any:
        weight, info, error = solve(w, target, *shared, grid, method)
        return weight, *_of_all(info, error, axes)

    part = jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] // count), w.dtype)
    weight, *_ = jax.eval_shape(
        lambda *operands: solve(*operands, grid, method), part, jax.ShapeDtypeStruct(part.shape, target.dtype), *shared
    )
    by_column = {name: None if getattr(weight, name) is None else columns for name in ("codes", "scales", "zeros")}
    specs = dataclasses.replace(jax.tree.map(lambda _: PartitionSpec(), weight), **by_column)
    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(columns, columns, *[PartitionSpec()] * len(shared)),
        out_specs=(specs, PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )(w, target, *shared)


def _of_all(info: Info, error: jax.Array, axes: tuple[str, ...]) -> tuple[Info, jax.Array]:
    """An Info and a relative error of all outputs, from those of a part on each device."""

    def total(values: jax.Array) -> jax.Array:
        return jax.lax.psum(values, axes)

    output = total(info.output)

    def mean(errors: jax.Array) -> jax.Array:
        return jnp.where(output == 0, 0.0, total(errors * info.output) / jnp.where(output == 0, 1.0, output))

    summed = dataclasses.replace(
        info,
        loss=total(info.loss),
        relative_error=mean(info.relative_error),
        output=output,
        failed=total(info.failed.astype(int)) > 0,
        scales_at_limit=total(info.scales_at_limit),
        finite=total((~info.finite).astype(int)) == 0,
    )
    return summed, mean(error)
