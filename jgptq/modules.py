"""The public `quantize`, `estimate` and others: functions of parameters, and Flax NNX modules as they are."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jgptq.allocate import allocate as allocate_function
from jgptq.estimate import estimate as estimate_function
from jgptq.quantize import quantize as quantize_function
from jgptq.tracing.apply import quantized as quantized_function
from jgptq.tracing.graph import find_weights as find_function_weights


class Quantized(nnx.Module):
    """An NNX module that holds packed weights and computes with them: `model` is the module, called as it is called.

    Its state is that of `model`, packed weights in the place of arrays; nnx.jit, nnx.split and nnx.state see it.
    Methods besides the call: `apply(method, *arguments)`, with `method` a function of the module.
    """

    def __init__(self, model: nnx.Module):
        self.model = model

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        return self.apply(lambda model, *inputs, **keywords: model(*inputs, **keywords), *inputs, **keywords)

    def apply(self, method: Callable, *inputs: Any, **keywords: Any) -> Any:
        """method(module, *inputs) on the packed weights; what it changes in the module's state is kept."""
        graphdef, params, rest = nnx.split(self.model, nnx.Param, ...)
        before, tree = jax.tree.flatten(rest)
        changed: list[int] = []

        def f(params, before, *inputs):
            model = nnx.merge(graphdef, nnx.State(params), jax.tree.unflatten(tree, before))
            result = method(model, *inputs, **keywords)
            after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
            changed[:] = [number for number, leaf in enumerate(after) if leaf is not before[number]]
            return result, [after[number] for number in changed]

        result, new = quantized_function(f)(nnx.to_pure_dict(params), before, *inputs)
        if changed:
            after = list(before)
            for number, leaf in zip(changed, new, strict=True):
                after[number] = leaf
            nnx.update(self.model, jax.tree.unflatten(tree, after))
        return result


def functional(model: nnx.Module) -> tuple[Callable, dict]:
    """f(params, *inputs) and params, nested dicts of arrays, for a module; all its other state is held fixed."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def f(params, *inputs):
        # Variables made here, which the call may change; the module's own may not be from inside a trace.
        fresh = jax.tree.map(lambda leaf: leaf, rest)
        return nnx.merge(graphdef, nnx.State(params), fresh)(*inputs)

    return f, nnx.to_pure_dict(params)


@functools.wraps(quantize_function)
def quantize(f, params, batches=None, **settings):
    if not isinstance(f, nnx.Module):
        if batches is None:
            raise TypeError("quantize takes (f, params, batches), or (module, batches) for a Flax NNX module")
        return quantize_function(f, params, batches, **settings)
    if batches is not None:
        raise TypeError("an NNX module holds its own parameters; give quantize(module, batches)")
    apply_model, values = functional(f)
    packed, report = quantize_function(apply_model, values, params, **settings)
    model = nnx.clone(f)
    nnx.update(model, nnx.State(packed))
    return model, report


@functools.wraps(allocate_function)
def allocate(f, params, batches=None, **settings):
    if isinstance(f, nnx.Module):
        if batches is not None:
            raise TypeError("an NNX module holds its own parameters; give allocate(module, batches)")
        return allocate_function(*functional(f), params, **settings)
    if batches is None:
        raise TypeError("allocate takes (f, params, batches), or (module, batches) for a Flax NNX module")
    return allocate_function(f, params, batches, **settings)


@functools.wraps(estimate_function)
def estimate(f, params, batches=None, **settings):
    if isinstance(f, nnx.Module):
        if batches is not None:
            raise TypeError("an NNX module holds its own parameters; give estimate(module, batches)")
        return estimate_function(*functional(f), params, **settings)
    if batches is None:
        raise TypeError("estimate takes (f, params, batches), or (module, batches) for a Flax NNX module")
    return estimate_function(f, params, batches, **settings)


@functools.wraps(quantized_function)
def quantized(f):
    return Quantized(f) if isinstance(f, nnx.Module) else quantized_function(f)


@functools.wraps(find_function_weights)
def find_weights(f, *arguments):
    if isinstance(f, nnx.Module):
        return find_function_weights(*functional(f), *arguments)
    return find_function_weights(f, *arguments)
