"""What this library promises to see, as data: small functions and modules, and what becomes of each of their leaves.

`CASES` is read by the tests beside it and by `table.py`, which writes docs/coverage.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bare import BARE, CHANNELS, WIDTH, Bare
from flax import linen, nnx
from modules import FRAMEWORKS, Module

VOCABULARY = 60


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A function with its parameters, and what is expected of them.

    build: gives f(params, *inputs) and params, and for an NNX module the module itself.
    inputs: a name in INPUTS. quantized: paths of the leaves to be packed. left: other leaves and a part of the reason
    each is given; leaves in neither are biases and the like. scans: scans in the function.
    """

    name: str
    framework: str
    build: Callable[[], tuple[Callable, Any, nnx.Module | None]]
    inputs: str
    quantized: frozenset[str]
    left: Mapping[str, str]
    scans: int

    @property
    def id(self) -> str:
        return f"{self.framework}: {self.name}"

    def calibration(self) -> list[tuple]:
        return [(INPUTS[self.inputs](seed, 4),) for seed in range(8)]

    def held_out(self) -> tuple:
        return (INPUTS[self.inputs](99, 2),)


# Inputs: far from white, so that a Hessian has something to say.


def features(seed: int, rows: int, *shape: int, width: int = WIDTH) -> jax.Array:
    """Unit features that are mixtures of a quarter as many, with a tenth of noise."""
    mixing = np.random.default_rng(width).standard_normal((width // 4, width)) / np.sqrt(width // 4)
    rng = np.random.default_rng(seed)
    shape = (rows, *(shape or (16,)))
    noise = 0.1 * rng.standard_normal((*shape, width))
    return jnp.asarray(rng.standard_normal((*shape, width // 4)) @ mixing + noise, jnp.float32)


def images(seed: int, rows: int) -> jax.Array:
    """Smooth along both axes too: each pixel is the sum of the three next to each other both ways."""
    x = features(seed, rows, 8, 8, width=CHANNELS)
    for axis in (1, 2):
        x = x + jnp.roll(x, 1, axis) + jnp.roll(x, 2, axis)
    return x / 3


INPUTS = {
    "features": features,
    "images": images,
    "tokens": lambda seed, rows: jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (rows, 16))),
}


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {name: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    if "embedding" in arrays:
        arrays["embedding"] = features(0, VOCABULARY, 1)[:, 0]
    return arrays


# A bare function's parameters, held by a module.


def held_by_linen(f: Callable, params: dict):
    class Holder(linen.Module):
        @linen.compact
        def __call__(self, *inputs):
            return f({name: self.param(name, lambda _, value=value: value) for name, value in params.items()}, *inputs)

    return Holder().apply, {"params": params}, None


def held_by_nnx(f: Callable, params: dict):
    class Holder(nnx.Module):
        def __init__(self):
            for name, value in params.items():
                setattr(self, name, nnx.Param(value))

        def __call__(self, *inputs):
            return f({name: getattr(self, name)[...] for name in params}, *inputs)

    return functional(Holder())


def functional(module: nnx.Module):
    """f(params, *inputs) over a module's parameters as nested dicts, those parameters, and the module."""
    graph, state = nnx.split(module)
    return lambda params, *inputs: nnx.merge(graph, params)(*inputs), nnx.to_pure_dict(state), module


def bare_cases(name: str, bare: Bare) -> list[Case]:
    holders = {"bare": lambda f, params: (f, params, None), "Linen": held_by_linen, "NNX": held_by_nnx}

    def case(framework: str, hold: Callable) -> Case:
        prefix = "params." if framework == "Linen" else ""
        return Case(
            name=name,
            framework=framework,
            build=lambda: hold(bare.f, weights(bare.shapes)),
            inputs=bare.inputs,
            quantized=frozenset(prefix + leaf for leaf in bare.shapes if leaf not in bare.left),
            left={prefix + leaf: reason for leaf, reason in bare.left.items()},
            scans=bare.scans,
        )

    return [case(framework, hold) for framework, hold in holders.items()]


def module_case(framework: str, name: str, entry: Module) -> Case:
    def build():
        made = entry.make(INPUTS[entry.inputs](0, 1))
        return functional(made) if isinstance(made, nnx.Module) else (*made, None)

    return Case(
        name=name,
        framework=framework,
        build=build,
        inputs=entry.inputs,
        quantized=entry.quantized,
        left=entry.left,
        scans=entry.scans,
    )


CASES = [case for name, bare in BARE.items() for case in bare_cases(name, bare)] + [
    module_case(framework, name, entry) for framework, entries in FRAMEWORKS.items() for name, entry in entries.items()
]
