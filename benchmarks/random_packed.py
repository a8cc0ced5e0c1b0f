"""Packed weights of random codes, for benchmarks of speed: made at once, where quantizing would take hours."""

from typing import Any

import jax
import jax.numpy as jnp

from jgptq import Grid, QuantizedTensor, tensor


def weight(key: jax.Array, inputs: int, outputs: int, *, grid: Grid, dtype: Any) -> QuantizedTensor:
    """A weight whose products with normal inputs are about normal; zeros in the middle half of the codes."""
    groups = -(-inputs // grid.group_length(inputs))
    codes, scales, zeros = jax.random.split(key, 3)
    quarter = 2 ** (grid.bits - 2)
    return tensor.from_codes(
        jax.random.bits(codes, (inputs, outputs), jnp.uint8) >> (8 - grid.bits),
        jax.random.uniform(scales, (groups, outputs), minval=0.5, maxval=1.5) / (quarter * inputs**0.5),
        jax.random.randint(zeros, (groups, outputs), quarter, 3 * quarter),
        grid=grid,
        dtype=dtype,
    )


def parameters(key: jax.Array, shapes: Any, *, grid: Grid | None, dtype: Any) -> Any:
    """Parameters of a model of these shapes in `dtype`, every linear kernel packed; or none, if grid is None."""
    leaves, tree = jax.tree.flatten_with_path(shapes)
    made = {}

    def make(path: tuple, leaf: Any, key: jax.Array) -> Any:
        kind = (leaf.shape, path[-1].key)
        if kind not in made:
            if path[-1].key == "kernel" and grid is not None:
                made[kind] = jax.jit(lambda key: weight(key, *leaf.shape, grid=grid, dtype=dtype))
            elif leaf.ndim == 2:
                made[kind] = jax.jit(lambda key: jax.random.normal(key, leaf.shape, dtype) / leaf.shape[0] ** 0.5)
            else:
                made[kind] = jax.jit(lambda _: jnp.ones(leaf.shape, dtype))
        return made[kind](key)

    return jax.tree.unflatten(
        tree, [make(path, leaf, jax.random.fold_in(key, n)) for n, (path, leaf) in enumerate(leaves)]
    )
