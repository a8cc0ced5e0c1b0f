"""The one door to the dequantize-matmul: checks the arguments and chooses an implementation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jgptq import tensor
from jgptq.kernels import xla
from jgptq.kernels.prepack import Prepacked, restore

# xla: dequantize, then the library's product; serves every weight on every platform. xla_codes: sums of inputs times
# codes, in XLA, for few rows. hopper: the Mosaic GPU kernel, for Prepacked weights.
IMPLEMENTATIONS = ("xla", "xla_codes", "hopper")
# What the Hopper kernel takes. From about 128 rows on an H200's tensor cores are the limit, by its data sheet, and the
# library's product is as good; not yet timed.
HOPPER_ROWS = 128
HOPPER_DTYPES = ("bfloat16", "float16")
HOPPERS = ("H100", "H200", "H800", "H20", "GH200")


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
    form = weight.stack if isinstance(weight, tensor.Element) else weight
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
    if implementation == "hopper" and (reason := _hopper_refusal(x, weight)):
        raise ValueError(f'implementation="hopper" cannot serve this product: {reason}')
    return _product(x, weight, implementation, jnp.dtype(preferred_element_type or x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: Any, implementation: str | None, dtype: Any) -> Array:
    """The product by any implementation; its derivative is that of the product with the dequantized weight."""
    run = jax.custom_batching.custom_vmap(functools.partial(_run, implementation=implementation, dtype=dtype))
    run.def_vmap(functools.partial(_run_mapped, implementation=implementation, dtype=dtype))
    return run(x, weight)


@_product.defjvp
def _product_jvp(implementation: str | None, dtype: Any, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    def dequantized(x, weight):
        return xla.dequantized(x, _natural(weight), dtype)

    return _product(*primals, implementation, dtype), jax.jvp(dequantized, primals, tangents)[1]


def _run(x: Array, weight: Any, *, implementation: str | None, dtype: Any) -> Array:
    rows = math.prod(x.shape[:-1])
    if isinstance(rows, int) and rows == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), dtype)
    kernel, others = (functools.partial(f, dtype=dtype) for f in (_hopper, _xla))
    return _choose(x, weight, rows, implementation, kernel, others)


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
    rows = math.prod(x.shape[1:-1])
    if isinstance(rows, int) and rows == 0:
        return jnp.zeros((*x.shape[:-1], weight.out_features), dtype), True

    def kernel(x, weight):
        return jax.lax.map(lambda both: _hopper(*both, dtype=dtype), (x, weight))

    def others(x, weight, few):
        return jax.vmap(functools.partial(_xla, few=few, dtype=dtype))(x, weight)

    return _choose(x, weight, rows, implementation, kernel, others), True


def _choose(x: Array, weight: Any, rows: Any, implementation: str | None, kernel: Callable, others: Callable) -> Any:
    """All dispatch: by name, else by the order of codes, the rows (in an exported program perhaps a symbol), and the
    platform that the program is lowered for."""
    if implementation == "hopper":
        return kernel(x, weight)
    if implementation is not None:
        return others(x, weight, few=implementation == "xla_codes")
    known = rows if isinstance(rows, int) else math.inf
    large = weight.in_features * weight.out_features >= xla.FEW_CODES
    by_xla = functools.partial(others, few=large and known <= xla.FEW_ROWS)
    if known <= HOPPER_ROWS and _hopper_refusal(x, weight) is None and _is_for_hopper():
        return jax.lax.platform_dependent(x, weight, cuda=kernel, default=by_xla)
    return by_xla(x, weight)


def _xla(x: Array, weight: Any, *, few: bool, dtype: Any) -> Array:
    return (xla.from_codes if few else xla.dequantized)(x, _natural(weight), dtype)


def _natural(weight: Any) -> xla.Weight:
    if isinstance(weight, tensor.Element) and isinstance(weight.stack, Prepacked):
        weight = weight.taken()
    return restore(weight) if isinstance(weight, Prepacked) else weight


def _hopper(x: Array, weight: Prepacked | tensor.Element, *, dtype: Any) -> Array:
    from jgptq.kernels import hopper  # Mosaic GPU takes a while to import, and most programs never need it

    return hopper.matmul(x, weight, dtype)


def _hopper_refusal(x: Array, weight: Any) -> str | None:
    """Why the Hopper kernel cannot serve a product, and the way out; None if it can."""
    weight = weight.stack if isinstance(weight, tensor.Element) else weight
    if not isinstance(weight, Prepacked):
        return f"the weight is a {type(weight).__name__}; give jgptq.prepack(weight)"
    if x.dtype.name not in HOPPER_DTYPES:
        return f"x is {x.dtype.name}; cast it to one of {HOPPER_DTYPES}"
    return None


def _is_for_hopper() -> bool:
    """Whether what is traced now may run on Hopper GPUs: by the abstract mesh, else by the machine's devices."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return any(name in abstract.device_kind for name in HOPPERS)
    return _has_hopper()


@functools.cache
def _has_hopper() -> bool:
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return all(str(device.compute_capability) == "9.0" for device in devices)
