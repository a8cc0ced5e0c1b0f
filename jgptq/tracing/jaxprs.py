"""Jaxprs: those that equations call, and new ones of given equations. Works on every JAX version that jgptq takes."""

from typing import Any

import jax.extend.core as jex

Atom = Any  # jex.Var | jex.Literal

# Equations that stand for the value of their jaxpr. Derivative rules are lost: a forward pass needs none.
CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)


def called_jaxpr(equation: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
    """The jaxpr of an equation that only calls it (jit, remat, custom_jvp, custom_vjp …); None for all others."""
    if equation.primitive.name not in CALLS:
        return None
    params = equation.params
    return closed(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def closed(jaxpr: Any) -> jex.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def close(inputs: list[jex.Var], outputs: list[Atom], equations: list[jex.JaxprEqn]) -> jex.ClosedJaxpr:
    """A jaxpr of these equations, with no constants."""
    names = jex.DebugInfo("jgptq", "segment", None, None)
    return jex.ClosedJaxpr(jex.Jaxpr((), inputs, outputs, equations, debug_info=names), ())


def scan_counts(equation: jex.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried; the rest it goes over."""
    params = equation.params
    if "ft_in" in params:  # from JAX 0.11 on
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def varying_axes(shape: tuple[int, ...], result: tuple[int, ...], maker: jex.JaxprEqn | None) -> tuple[int, ...] | None:
    """The axes of a result along which a factor of this shape, made by this equation, varies; None if along all."""
    if shape != result:
        return tuple(axis for axis, size in enumerate(shape) if size > 1)
    if maker is None or maker.primitive.name != "broadcast_in_dim":
        return None
    sizes, axes = maker.invars[0].aval.shape, maker.params["broadcast_dimensions"]
    return tuple(axis for axis, size in zip(axes, sizes, strict=True) if size > 1)
