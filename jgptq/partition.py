"""Partition: how a packed weight is divided over a mesh; and where arrays lie, by JAX's own shardings.

Axes of a mesh are taken as Auto, whatever the mesh says: XLA then places what is in between.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """A packed weight's inputs or outputs in equal parts, one for each place along an axis of a mesh."""

    mesh: Mesh | AbstractMesh
    axis: str
    of: Literal["inputs", "outputs"]

    @property
    def size(self) -> int:
        return self.mesh.shape[self.axis]

    def spec(self, array: Any, dim: int | None) -> PartitionSpec | None:
        """Of an array that is divided along `dim`, counted from its end; None: along none."""
        if array is None:
            return None
        return PartitionSpec() if dim is None else PartitionSpec(*[None] * (array.ndim + dim), self.axis)


def auto(mesh: Any) -> Any:
    """The same mesh, concrete or abstract, with axes whose type is Auto."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == types:
        return mesh
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return mesh.update_axis_types(dict(zip(mesh.axis_names, types, strict=True)))


def common_mesh(*trees: Any) -> Mesh | None:
    """The mesh of several devices that arrays of these trees lie on; None if all lie on one device."""
    found: dict[Mesh, None] = {}
    for leaf in jax.tree.leaves(trees):
        if (mesh := _mesh(leaf)) is not None:
            found[mesh] = None
    meshes = list(found)
    if any(tuple(mesh.devices.flat) != tuple(meshes[0].devices.flat) for mesh in meshes):
        raise ValueError(
            f"params and batches lie on several meshes ({', '.join(map(str, meshes))}), of other devices or with these "
            "in another order; put all of them on one"
        )
    # Parameters may have a mesh of fewer axes over the same devices; the first one found, which has the most, decides.
    return max(meshes, key=lambda mesh: len(mesh.axis_names), default=None)


def onto(mesh: Mesh | None, tree: Any) -> Any:
    """A pytree of arrays on the mesh: as they lie if they do, else a copy on each device. None: as they are."""
    if mesh is None:
        return tree

    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        if (own := _mesh(leaf)) is not None:
            return jax.device_put(leaf, NamedSharding(own, leaf.sharding.spec))
        return placed(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def placed(array: Any, sharding: NamedSharding) -> Any:
    """An array, or a ShapeDtypeStruct, in a sharding; in one of several processes, each of which has the same array."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    is_key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended)
    if isinstance(array, jax.core.Tracer) or sharding.is_fully_addressable or is_key:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda array: array, out_shardings=sharding)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicated(tree: Any) -> Any:
    """A pytree with a copy of each array that is spread over devices on every one of them."""

    def one(leaf: Any) -> Any:
        mesh = _mesh(leaf)
        return leaf if mesh is None else placed(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def gathered(tree: Any) -> Any:
    """A pytree in which what lies on devices of several processes is in the memory of the first one's host.

    To be called in all of them; the others' is of no use.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        whole = replicated(leaf)
        return np.asarray(whole) if jax.process_index() == 0 else leaf

    return jax.tree.map(one, tree)


@contextlib.contextmanager
def one_writer() -> Iterator[bool]:
    """Whether this process is the one of several that writes files. The others wait, and RuntimeError if it fails."""
    done = jax.process_index() == 0
    try:
        yield done
    except BaseException:
        done = False
        raise
    finally:
        if jax.process_count() > 1:
            done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    if not done and jax.process_count() > 1:
        raise RuntimeError("process 0 could not write; its own error says why")


class HostShards(NamedTuple):
    """What this process has of an array that is spread over devices, in the host's memory."""

    shape: tuple[int, ...]
    sharding: NamedSharding
    shards: list[tuple[jax.Device, np.ndarray]]


def to_host(array: jax.Array) -> np.ndarray | HostShards:
    """The array in the host's memory, with what `from_host` needs to put it back where it was."""
    if _mesh(array) is None:
        return np.asarray(array)
    if array.is_fully_replicated:
        return HostShards(array.shape, array.sharding, [(None, np.asarray(array))])
    shards = [(shard.device, np.asarray(shard.data)) for shard in array.addressable_shards]
    return HostShards(array.shape, array.sharding, shards)


def from_host(value: Any) -> Any:
    """The inverse of `to_host`; anything else as it is."""
    if not isinstance(value, HostShards):
        return value
    if value.sharding.is_fully_replicated:
        return placed(value.shards[0][1], value.sharding)
    shards = [jax.device_put(shard, device) for device, shard in value.shards]
    return jax.make_array_from_single_device_arrays(value.shape, value.sharding, shards)


def dividing_axes(mesh: Mesh | AbstractMesh, size: int) -> tuple[str, ...]:
    """The axes of the mesh with the most devices of which each gets an equal share of `size`.

    The last axis comes first, since it is mostly the one along which weights are divided already.
    """
    names = [name for name in reversed(mesh.axis_names) if mesh.shape[name] > 1]
    choices = [tuple(names), *((name,) for name in names), ()]
    able = [choice for choice in choices if size % _count(mesh, choice) == 0]
    return max(able, key=lambda choice: _count(mesh, choice))


def _count(mesh: Any, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _mesh(leaf: Any) -> Mesh | None:
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return auto(sharding.mesh)
