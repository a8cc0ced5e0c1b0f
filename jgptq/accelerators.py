"""Which devices what is traced now will run on, for code that has a kernel for some of them."""

import functools
from typing import Any

import jax

# Names within the device kinds of NVIDIA's Hopper GPUs.
HOPPERS = ("H100", "H200", "H800", "H20", "GH200")


def runs_on(platform: str, devices: tuple[str, ...], mesh: Any = None) -> bool:
    """Whether it may run on devices of these names: by the abstract mesh, else by the machine's own.

    XLA cannot divide a kernel between devices. So where there are several, it is for what `shard_map` has divided, or
    will have: over `mesh`, if that is given.
    """
    divided = mesh is not None
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else getattr(mesh, "abstract_mesh", mesh)
    divided = divided or (bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names))
    if mesh.abstract_device is not None:
        kinds, count = (mesh.abstract_device.device_kind,), mesh.size
    else:
        kinds = _device_kinds(platform)
        count = len(kinds)
    named = all(any(name in kind for name in devices) for kind in kinds)
    return bool(kinds) and named and (count <= 1 or divided)


@functools.cache
def _device_kinds(platform: str) -> tuple[str, ...]:
    try:
        return tuple(device.device_kind for device in jax.devices(platform))
    except RuntimeError:
        return ()
