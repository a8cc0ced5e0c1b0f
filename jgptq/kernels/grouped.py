"""The product of sorted rows with a stack of packed matrices, one for each group of rows: a mixture's experts.

Groups are cut into tiles of equally many rows, the last one of each filled up. A scan takes tiles one after another,
each with the matrix of its group, picked from the stack while still packed, through `matmul`. So a matrix that no row
uses is not touched, and no more than one is in float at a time. [Gale et al. 2022, for tiles that belong to one expert]
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jgptq.kernels.matmul import matmul
from jgptq.kernels.prepack import Prepacked
from jgptq.tensor import Element, Layout, QuantizedTensor, form, taken

MOST_ROWS = 512  # of a tile: decoding a matrix takes a tenth of its product's time


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: QuantizedTensor | Prepacked | Element,
    counts: Int[Array, " groups"],
    *,
    preferred_element_type: Any = None,
) -> Float[Array, "rows out"]:
    """lax.ragged_dot(x, weight, counts): counts[0] rows times weight's first matrix, the next counts[1] its second, ….

    weight: a stack of matrices, codes (groups, ., .); or an Element, which is one of several such stacks.
    Rows after the last group give zeros. The product is summed in float32; its dtype is preferred_element_type, or x's.
    Differentiable with respect to x, in both modes.
    """
    stacks = form(weight)
    if not isinstance(stacks, QuantizedTensor | Prepacked):
        raise TypeError(f"weight is a {type(stacks).__name__}; give a QuantizedTensor, or use jax.lax.ragged_dot")
    if stacks.codes.ndim != 3 + isinstance(weight, Element) or stacks.codes.shape[-3] != counts.shape[0]:
        raise ValueError(
            f"weight has codes {tuple(stacks.codes.shape)}, but there are {counts.shape[0]} counts; "
            "give a stack of one matrix for each count"
        )
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the weight takes {weight.in_features} features; "
            f"give x as (rows, {weight.in_features})"
        )
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    first, matrices = 0, dataclasses.replace(stacks, layout=Layout.dense(weight.in_features, weight.out_features))
    if isinstance(weight, Element):  # all stacks are one, in which the groups of this one begin at `first`
        first = weight.index * counts.shape[0]
        matrices = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), matrices)
    if not isinstance(x.shape[0], int):  # a symbol, in a program to be exported, which may stand for many rows
        dense = dataclasses.replace(taken(weight), layout=matrices.layout).dequantize()
        return lax.ragged_dot(x, dense.astype(x.dtype), counts, preferred_element_type=dtype)
    if x.shape[0] == 0:
        return jnp.zeros((0, weight.out_features), dtype)
    tiles = _tiles(counts, x.shape[0])

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the backward pass is given a matrix for each tile
    def multiply(_: None, tile: tuple[Array, Array, Array]) -> tuple[None, Array]:
        x, group, used = tile

        def product(x: Array) -> Array:
            return matmul(x, Element(stack=matrices, index=first + group), preferred_element_type=dtype)

        if x.shape[0] == 1:  # all tiles are used; and a GPU would wait for the choice
            return None, product(x)
        return None, lax.cond(used, product, lambda x: jnp.zeros((x.shape[0], weight.out_features), dtype), x)

    _, products = lax.scan(multiply, None, (x[tiles.rows], tiles.groups, tiles.used))
    inside = jnp.arange(x.shape[0]) < jnp.sum(counts)
    return jnp.where(inside[:, None], products[tiles.tile_of, tiles.place_of], jnp.zeros((), dtype))


class _Tiles(NamedTuple):
    """rows: of each tile, some of them perhaps another's; groups: that it belongs to; used: whether it has rows at all.

    tile_of, place_of: for each row its tile, and its place in it.
    """

    rows: Int[Array, "tiles size"]
    groups: Int[Array, " tiles"]
    used: Bool[Array, " tiles"]
    tile_of: Int[Array, " rows"]
    place_of: Int[Array, " rows"]


def _tiles(counts: Int[Array, " groups"], rows: int) -> _Tiles:
    """As many tiles as any counts may need, of about as many rows as a group has on average."""
    average = -(-rows // counts.shape[0])
    size = min(1 << (average - 1).bit_length(), MOST_ROWS)
    number = min(rows, rows // size + counts.shape[0])
    ends, needed = jnp.cumsum(counts), -(-counts // size)
    tile_ends = jnp.cumsum(needed)

    tile = jnp.arange(number)
    groups = _number_of(tile_ends, tile)
    first = (ends - counts)[groups] + (tile - (tile_ends - needed)[groups]) * size

    row = jnp.arange(rows)
    own = _number_of(ends, row)
    place = row - (ends - counts)[own]
    return _Tiles(
        rows=jnp.clip(first[:, None] + jnp.arange(size)[None], 0, rows - 1),
        groups=groups,
        used=tile < tile_ends[-1],
        tile_of=(tile_ends - needed)[own] + place // size,
        place_of=place % size,
    )


def _number_of(ends: Int[Array, " groups"], places: Int[Array, " n"]) -> Int[Array, " n"]:
    """The group that each place lies in; the last one for those behind."""
    return jnp.minimum(jnp.searchsorted(ends, places, side="right"), ends.shape[0] - 1)
