"""The one door to the dequantize-matmul: checks the arguments and chooses an implementation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jgptq import tensor
from jgptq.accelerators import HOPPERS, runs_on
from jgptq.kernels import xla
from jgptq.kernels.prepack import Prepacked, restore
from jgptq.partition import Partition

# xla: dequantize, then the library's product. xla_slabs: one slab of inputs after another, each dequantized for itself.
# xla_codes: sums of inputs times codes, for few rows. These three serve every weight on every platform.
# hopper: the Mosaic GPU kernel, for Prepacked weights. tpu: the Pallas TPU kernel.
IMPLEMENTATIONS = ("xla", "xla_slabs", "xla_codes", "hopper", "tpu")
HOPPER_DTYPES = ("bfloat16", "float16")


def matmul(
    x: Float[Array, "*batch in"],
    weight: tensor.QuantizedTensor | Prepacked | tensor.Element,
    *,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*batch out"]:
    """x @ W for a packed W seen as an (in, out) matrix; products are summed in float32.

    weight: an Element is one of a stack, whose codes are read where they are if rows are few.
    preferred_element_type: dtype of the result, as in jnp.matmul; None: x's dtype.
    implementation: one of IMPLEMENTATIONS, which then runs or raises; None chooses by the platform the program is
        lowered for, by the number of rows and by the order of the weight's codes.
    Differentiable with respect to x, in forward and reverse mode. vmap over x alone is a product of more rows.
    """
    form = tensor.form(weight)
    if not isinstance(form, tensor.QuantizedTensor | Prepacked):
        raise TypeError(f"weight is a {type(form).__name__}; give a QuantizedTensor, or use x @ weight for an array")
    if form.codes.ndim != 2 + isinstance(weight, tensor.Element):
        raise ValueError(
            f"weight is a stack or batch of matrices (codes {tuple(form.codes.shape)}); "
            "matmul takes one: use jax.vmap over x and weight"
        )
    if x.ndim < 1 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the weight takes {weight.in_features} features; "
            f"reshape x to (..., {weight.in_features})"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; give a floating-point array")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose one of {IMPLEMENTATIONS}, or None")
    if weight.input_scales is not None:
        x = (x / jnp.expand_dims(weight.input_scales, tuple(range(x.ndim - 1)))).astype(x.dtype)
        weight = tensor.without_input_scales(weight)
    if implementation in KERNELS and (reason := KERNELS[implementation].refusal(x, weight)):
        raise ValueError(f'implementation="{implementation}" cannot serve this product: {reason}')
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    if form.partition is not None:
        return _by_part(x, weight, implementation, dtype)
    return _product(x, weight, implementation, dtype)


@functools.partial(jax.jit, static_argnames=("implementation", "dtype"))
def _by_part(x: Array, weight: Any, implementation: str | None, dtype: Any) -> Array:
    """Each device multiplies by its own part of a divided weight: XLA divides no kernel, and would gather codes.

    Rows are divided along the other axes of the mesh where these divide the first axis of x.
    """
    form = tensor.form(weight)
    partition, by_inputs = form.partition, form.partition.of == "inputs"
    mesh = _mesh_of(partition)
    others = tuple(name for name in mesh.axis_names if name != partition.axis and name not in mesh.manual_axes)
    count = math.prod(mesh.shape[name] for name in others)
    divides = x.ndim > 1 and isinstance(x.shape[0], int) and x.shape[0] % count == 0
    rows = [others if divides and others else None, *[None] * (x.ndim - 2)][: x.ndim - 1]
    specs = form.specs()
    if isinstance(weight, tensor.Element):
        specs = tensor.Element(stack=specs, index=PartitionSpec())

    def own(x: Array, weight: Any) -> Array:
        if isinstance(weight, tensor.Element):
            weight = tensor.Element(stack=tensor.own_part(weight.stack), index=weight.index)
        else:
            weight = tensor.own_part(weight)
        if not by_inputs:
            return _product(x, weight, implementation, dtype)
        product = _product(x, weight, implementation, jnp.promote_types(dtype, jnp.float32))
        return jax.lax.psum(product, partition.axis).astype(dtype)

    return jax.shard_map(
        own,
        mesh=mesh,
        axis_names={partition.axis, *others},
        in_specs=(PartitionSpec(*rows, partition.axis if by_inputs else None), specs),
        out_specs=PartitionSpec(*rows, None if by_inputs else partition.axis),
        check_vma=False,
    )(x, weight)


def _mesh_of(partition: Partition) -> Any:
    """The mesh that a product is traced under, if it has the partition's axis; else the partition's own."""
    mesh = jax.sharding.get_abstract_mesh()
    if partition.axis not in mesh.axis_names:
        return partition.mesh
    if partition.axis in mesh.manual_axes:
        raise ValueError(
            f"the weight is divided over the mesh axis {partition.axis!r} by jgptq.shard, which divides its products "
            "itself; call matmul outside of shard_map over that axis"
        )
    return mesh


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: Any, implementation: str | None, dtype: Any) -> Array:
    """The product by any implementation; its derivative is that of the product with the dequantized weight."""
    run = jax.custom_batching.custom_vmap(functools.partial(_run, implementation=implementation, dtype=dtype))
    run.def_vmap(functools.partial(_run_mapped, implementation=implementation, dtype=dtype))
    return run(x, weight)


@_product.defjvp
def _product_jvp(implementation: str | None, dtype: Any, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    by = xla.by_slabs if _by_xla(_size(primals[0].shape[:-1]), primals[1]) != "xla" else xla.dequantized
    tangent = jax.jvp(lambda x, weight: by(x, _natural(weight), dtype), primals, tangents)[1]
    return _product(*primals, implementation, dtype), tangent


def _run(x: Array, weight: Any, *, implementation: str | None, dtype: Any) -> Array:
    rows = _size(x.shape[:-1])
    if rows == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), dtype)

    def by_kernel(run, x, weight):
        return run(x, weight, dtype)

    return _choose(x, weight, rows, implementation, by_kernel, functools.partial(_xla, dtype=dtype))


def _run_mapped(
    size: int, mapped: Any, x: Array, weight: Any, *, implementation: str | None, dtype: Any
) -> tuple[Array, bool]:
    """The rule of vmap: more rows of one product; else the kernel for one weight after another, or XLA's batch."""
    if not any(jax.tree.leaves(mapped[1])):
        return _product(x, weight, implementation, dtype), True
    if isinstance(weight, tensor.Element):
        axes = jax.tree.map(lambda has: 0 if has else None, mapped[1])
        weight = jax.vmap(tensor.taken, in_axes=(axes,), axis_size=size)(weight)
        mapped = mapped[0], jax.tree.map(lambda _: True, weight)
    x, weight = jax.tree.map(
        lambda leaf, has: leaf if has else jnp.broadcast_to(leaf[None], (size, *leaf.shape)), (x, weight), tuple(mapped)
    )
    rows = _size(x.shape[1:-1])
    if rows == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), dtype), True

    def by_kernel(run, x, weight):
        return jax.lax.map(lambda both: run(*both, dtype), (x, weight))

    def others(x, weight, name):
        return jax.vmap(functools.partial(_xla, name=name, dtype=dtype))(x, weight)

    return _choose(x, weight, rows, implementation, by_kernel, others), True


def _choose(
    x: Array, weight: Any, rows: int | float, implementation: str | None, by_kernel: Callable, others: Callable
) -> Any:
    """All dispatch: by name, else by the order of codes, the rows, and the platform that the program is lowered for."""
    if implementation in KERNELS:
        return by_kernel(KERNELS[implementation].run, x, weight)
    if implementation is not None:
        return others(x, weight, name=implementation)
    by_xla = functools.partial(others, name=_by_xla(rows, weight))
    chosen = {
        kernel.platform: functools.partial(by_kernel, kernel.run)
        for kernel in KERNELS.values()
        if rows <= kernel.rows and kernel.refusal(x, weight) is None and runs_on(kernel.platform, kernel.devices)
    }
    if jax.typeof(x).manual_axis_type.varying:
        chosen = {}  # this shard_map wants to be told along which axes results vary, and kernels do not say
    return jax.lax.platform_dependent(x, weight, default=by_xla, **chosen) if chosen else by_xla(x, weight)


def _size(shape: tuple) -> int | float:
    """The number of rows; infinity where an exported program has a symbol for it."""
    rows = math.prod(shape)
    return rows if isinstance(rows, int) else math.inf


def _by_xla(rows: int | float, weight: Any) -> str:
    """Which of XLA's implementations is chosen."""
    if weight.in_features * weight.out_features < xla.FEW_CODES or rows > xla.SLAB_ROWS:
        return "xla"
    return "xla_codes" if rows <= xla.FEW_ROWS else "xla_slabs"


# What runs is jitted: constants would else be arguments of the custom_vmap around it, and mapped by a cond's vmap.


@functools.partial(jax.jit, static_argnames=("name", "dtype"))
def _xla(x: Array, weight: Any, *, name: str, dtype: Any) -> Array:
    run = {"xla": xla.dequantized, "xla_slabs": xla.by_slabs, "xla_codes": xla.from_codes}[name]
    return run(x, _natural(weight), dtype)


def _natural(weight: Any) -> xla.Weight:
    if isinstance(weight, tensor.Element) and isinstance(weight.stack, Prepacked):
        weight = weight.taken()
    return restore(weight) if isinstance(weight, Prepacked) else weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a platform has of its own.

    platform, devices: the platform that it is lowered for, and what one of the words in a device's name must be.
    rows: the most for which it is chosen. refusal: why it cannot serve a product, and the way out; None if it can.
    run: x (..., in), the weight and the result's dtype to the product.
    """

    platform: str
    devices: tuple[str, ...]
    rows: int
    refusal: Callable[[Array, Any], str | None]
    run: Callable[[Array, Any, Any], Array]


# Pallas takes a while to import, and most programs never need it.


@functools.partial(jax.jit, static_argnames="dtype")
def _hopper(x: Array, weight: Prepacked | tensor.Element, dtype: Any) -> Array:
    from jgptq.kernels import hopper

    return hopper.matmul(x, weight, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _tpu(x: Array, weight: tensor.QuantizedTensor | tensor.Element, dtype: Any) -> Array:
    from jgptq.kernels import tpu

    return tpu.matmul(x, tensor.taken(weight), dtype)


def _hopper_refusal(x: Array, weight: Any) -> str | None:
    weight = tensor.form(weight)
    if not isinstance(weight, Prepacked):
        return f"the weight is a {type(weight).__name__}; give jgptq.prepack(weight)"
    if x.dtype.name not in HOPPER_DTYPES:
        return f"x is {x.dtype.name}; cast it to one of {HOPPER_DTYPES}"
    return None


def _tpu_refusal(x: Array, weight: Any) -> str | None:
    weight = tensor.form(weight)
    if isinstance(weight, Prepacked):
        return "the weight is Prepacked, for a GPU; give jgptq.unprepack(weight)"
    if x.dtype.name not in ("bfloat16", "float32"):
        return f"x is {x.dtype.name}; cast it to bfloat16 or float32"
    if weight.bits not in (4, 8):
        return f"the weight has {weight.bits} bits, and 4 or 8 are served; leave the choice to None"
    if not tensor.has_integer_zeros(weight):
        return f"the weight's zeros are {weight.zeros.dtype}, and uint8 ones are served; leave the choice to None"
    size = weight.group_size
    if weight.scales.shape[-2] > 1 and size not in (32, 64) and size % 128:
        return (
            f"the weight has groups of {size}, and 32, 64, multiples of 128 and one group are served; "
            "leave the choice to None"
        )
    return None


# Where kernels end: from about 128 rows on the units that multiply are the limit, by the data sheets of an H200 and of
# a TPU v5e, and the library's product is as good. Neither is timed yet.
KERNELS = {
    "hopper": Kernel(
        platform="cuda",
        devices=HOPPERS,
        rows=128,
        refusal=_hopper_refusal,
        run=_hopper,
    ),
    "tpu": Kernel(platform="tpu", devices=("TPU",), rows=128, refusal=_tpu_refusal, run=_tpu),
}


def has_kernel_for_prepacked(params: Any = None) -> bool:
    """Whether what is traced now may run the Hopper kernel, where weights are Prepacked: these, if they are given."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, tensor.QuantizedTensor))
    partitions = {leaf.partition for leaf in leaves if isinstance(leaf, tensor.QuantizedTensor)} or {None}
    return any(_has_hopper(partition) for partition in partitions)


def _has_hopper(partition: Partition | None) -> bool:
    return runs_on("cuda", HOPPERS, None if partition is None else partition.mesh)


def prefers_prepacked(weight: Any) -> bool:
    """Whether products with this weight, of inputs in its dtype, would run on that kernel if it were Prepacked."""
    return (
        isinstance(weight, tensor.QuantizedTensor)
        and tensor.has_integer_zeros(weight)
        and weight.dtype.name in HOPPER_DTYPES
        and _has_hopper(weight.partition)
    )
