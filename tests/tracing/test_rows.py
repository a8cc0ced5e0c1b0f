"""Which functions treat rows apart: what is said of each, against what the function itself does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jgptq.tracing.graph import trace
from jgptq.tracing.rows import treats_rows_apart

TOKENS, WIDTH = 4, 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


W = normal(0, WIDTH, 5)
CONSTANT = normal(1, TOKENS, WIDTH)


def apart(f, *trailing, rows=(2, 5), params=W):
    """What is said of f(params, x, …) with inputs (rows, *trailing)."""
    graphs = [trace(f, params, *(jax.ShapeDtypeStruct((n, *shape), jnp.float32) for shape in trailing)) for n in rows]
    return treats_rows_apart(*graphs, rows, (True,) * len(trailing))


def attention(x):
    scores = jnp.einsum("bqd,bkd->bqk", x, x)
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), x)


def heads_first(x):
    """(heads * rows, tokens, features of a head), as some attentions have it, and back."""
    rows = x.shape[0]
    heads = x.reshape(rows, TOKENS, 2, -1).transpose(2, 0, 1, 3).reshape(2 * rows, TOKENS, -1)
    heads = jax.nn.softmax(heads, axis=1) - jnp.mean(heads, axis=1, keepdims=True)
    return heads.reshape(2, rows, TOKENS, -1).transpose(1, 2, 0, 3).reshape(x.shape)


def recurrent(x):
    def step(carry, token):
        carry = jnp.tanh(carry + token)
        return carry, carry

    return lax.scan(step, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def switched(x):
    return lax.cond(jnp.sum(CONSTANT) > 0, jnp.sin, jnp.cos, lax.fori_loop(0, 3, lambda i, x: x * 0.5 + i, x))


def half_of_all(x, write=False):
    """The first half of all tokens; or something added there."""
    flat = x.reshape(-1, WIDTH)
    half, zero = flat.shape[0] // 2, jnp.zeros((1,), jnp.int32)
    if write:
        numbers = lax.ScatterDimensionNumbers((0,), (1,), (1,))
        return lax.scatter_add(flat, zero, x[:, : TOKENS // 2, 0].reshape(half), numbers).reshape(x.shape)
    numbers = lax.GatherDimensionNumbers(offset_dims=(0, 1), collapsed_slice_dims=(), start_index_map=(1,))
    return lax.gather(flat, zero, numbers, (half, WIDTH))


def tokens_of_all(x):
    flat = x.reshape(-1, WIDTH)
    shares, choices = lax.top_k(jax.nn.softmax(flat @ CONSTANT.T), 2)
    return jnp.einsum("tk,tke->te", shares, CONSTANT[choices]).reshape(x.shape)


# Each gives something of the shape of x, from x (rows, tokens, width).
APART = {
    "elementwise": lambda x: jnp.where(x > 0, jnp.tanh(x) + CONSTANT[None], 2.0 / (1 + x * x)),
    "attention": attention,
    "heads first": heads_first,
    "normalized by its own tokens": lambda x: (x - jnp.mean(x, (1, 2), keepdims=True)) / jnp.std(x, 1, keepdims=True),
    "tokens of all rows in one axis": tokens_of_all,
    "position by position": lambda x: x + jnp.arange(TOKENS)[None, :, None] + jnp.zeros((x.shape[0], 1, 1)),
    "sorted features": lambda x: (
        jnp.sort(x, -1) + jnp.cumsum(x, 1) + jnp.argsort(x, 1) + jnp.argmax(x, 1, keepdims=True)
    ),
    "rolled tokens": lambda x: jnp.roll(x, 1, axis=1)[..., ::-1],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] + jnp.repeat(x[:, ::2], 2, axis=1),
    "written in places": lambda x: x.at[:, 1:].set(x[:, :-1]).at[:, 0, jnp.array([1, 2])].add(1.0),
    "written in each row": jax.vmap(lambda row: row.at[jnp.argmax(row[:, 0])].add(row[0])),
    "updated": lambda x: lax.dynamic_update_slice(x, 2 * x[:, :2], (0, 1, 0)),
    "taken along": lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1),
    "gathered": lambda x: x[:, jnp.array([2, 0, 1, 3])] + CONSTANT[jnp.argmax(x, -1) % TOKENS],
    "recurrent": recurrent,
    "loops and branches on what is common": switched,
    "row after row": lambda x: lax.map(lambda row: jax.nn.softmax(row, axis=0) @ jnp.eye(WIDTH), x),
    "for each row": jax.vmap(lambda row: row - lax.scan(lambda c, t: (c + t, c), jnp.zeros(WIDTH), row)[1]),
    "axes by NumPy's numbers": lambda x: lax.broadcast_in_dim(x, (1, *x.shape), tuple(np.arange(1, 4)))[0],
    "tiled and stacked": lambda x: jnp.stack([x, jnp.tile(CONSTANT, (x.shape[0], 1, 1))]).sum(0),
    "repeated as a whole": lambda x: jnp.tile(x, (3, 1, 1)).reshape(3, *x.shape)[1] * 2,
    "convolution": lambda x: lax.conv_general_dilated(
        x, jnp.ones((3, WIDTH, WIDTH)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "windows": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
    "spectrum": lambda x: jnp.fft.irfft(jnp.fft.rfft(x, axis=-1), WIDTH, axis=-1),
    "checkpointed": jax.checkpoint(lambda x: jax.nn.gelu(x) * jax.jit(jax.nn.silu)(x)),
}

MIXED = {
    "batch norm": lambda x: (x - jnp.mean(x, (0, 1), keepdims=True)) / jnp.std(x, (0, 1), keepdims=True),
    "softmax over rows": lambda x: jax.nn.softmax(x, axis=0),
    "rolled rows": lambda x: jnp.roll(x, 1, axis=0),
    "reversed rows": lambda x: x[::-1],
    "the first row": lambda x: x - x[:1],
    "the number of each row": lambda x: x + jnp.arange(x.shape[0])[:, None, None],
    "the number of rows": lambda x: x / x.shape[0],
    "sorted rows": lambda x: jnp.sort(x, axis=0),
    "summed rows": lambda x: jnp.cumsum(x, axis=0),
    "row after row, carried": lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros((TOKENS, WIDTH)), x)[1],
    "attention between rows": lambda x: jnp.einsum("abtw,btw->atw", jnp.einsum("atw,btw->abtw", x, x), x),
    "tokens of all rows mixed": lambda x: jnp.cumsum(x.reshape(-1, WIDTH), axis=0).reshape(x.shape),
    "rows in another order": lambda x: x.reshape(TOKENS, x.shape[0], WIDTH).transpose(1, 0, 2),
    "rows as tokens": lambda x: x.transpose(1, 0, 2).reshape(x.shape),
    "a choice by all rows": lambda x: lax.cond(jnp.sum(x * x) > 90, jnp.sin, jnp.cos, x),
    "a loop until all rows are there": lambda x: lax.while_loop(lambda y: jnp.sum(abs(y)) < 300, lambda y: 1.5 * y, x),
    "rows chosen by value": lambda x: x[jnp.argsort(x[:, 0, 0])],
    "written by row": lambda x: x.at[0].set(0.0),
    "half of all tokens": half_of_all,
    "half of all tokens, written": functools.partial(half_of_all, write=True),
    "noise": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "other code for many rows": lambda x: jnp.sin(x) if x.shape[0] > 3 else jnp.cos(x),
    "windows over rows": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1, 1), (1, 1, 1), "SAME"),
}


@pytest.mark.parametrize("name", APART)
def test_rows_that_do_not_meet(name):
    f = APART[name]
    assert apart(lambda w, x: f(x) @ w, (TOKENS, WIDTH))
    x = normal(2, 5, TOKENS, WIDTH)
    f = jax.jit(f)
    together, one_by_one = f(x), jnp.concatenate([f(x[:2]), f(x[2:])])
    np.testing.assert_allclose(together, one_by_one, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_meet(name):
    f = MIXED[name]
    assert not apart(lambda w, x: f(x) @ w, (TOKENS, WIDTH))
    x = normal(2, 5, TOKENS, WIDTH)
    assert float(jnp.max(jnp.abs(f(x) - jnp.concatenate([f(x[:2]), f(x[2:])])))) > 1e-3


def test_only_what_products_read_counts():
    assert apart(lambda w, x: (x @ w, jnp.mean(x), jnp.sum(x @ w)), (WIDTH,))
    assert not apart(lambda w, x: (x - jnp.mean(x)) @ w, (WIDTH,))
    # A residual stream that a product's result is added to counts as well.
    square = normal(3, WIDTH, WIDTH)
    assert apart(lambda w, x: x + jnp.sin(x) @ w, (WIDTH,), params=square)
    assert not apart(lambda w, x: jnp.cumsum(x, axis=0) + jnp.sin(x) @ w, (WIDTH,), params=square)


def test_a_convolution_over_rows_reads_several():
    kernel = normal(0, 3, WIDTH, 5)
    convolution = functools.partial(lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"))
    assert apart(lambda w, x: convolution(x, w, (1,), "SAME"), (TOKENS, WIDTH), params=kernel)
    assert not apart(lambda w, x: convolution(x[None], w, (1,), "SAME"), (WIDTH,), params=kernel)


def test_two_inputs_meet_row_by_row():
    def pairs(w, x, y):
        return jnp.einsum("btd,bsd->bts", x, y)[..., :WIDTH] @ w

    assert apart(pairs, (TOKENS, WIDTH), (WIDTH, WIDTH))
    assert not apart(lambda w, x, y: (x @ y.T) @ y @ w, (WIDTH,), (WIDTH,))


def test_products_in_a_scan():
    def cells(w, x):
        return lax.scan(lambda h, t: (jnp.tanh(h @ w + t), h), jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))

    def cells_over_rows(w, x):
        return lax.scan(lambda h, row: (jnp.tanh(h @ w + row), h), jnp.zeros(WIDTH), x)

    square = normal(3, WIDTH, WIDTH)
    assert apart(cells, (TOKENS, WIDTH), params=square)
    assert not apart(cells_over_rows, (WIDTH,), params=square)


def test_a_side_effect_is_not_repeated_otherwise():
    assert not apart(lambda w, x: (jax.debug.print("{}", x[0]), x @ w)[1], (WIDTH,))
