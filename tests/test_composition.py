"""quantized(f) under JAX's transformations: each gives what it gives for f on the dequantized parameters.

One transformer, its layers a list or a scan over stacked leaves; and its step with a cache of keys and values.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

import jgptq
from jgptq import Grid, QuantizedTensor, quantized

VOCAB, WIDTH, HIDDEN, HEADS, HEAD, DEPTH, CONTEXT = 40, 32, 56, 4, 8, 2, 12
KERNELS = {"q": (WIDTH, HEADS, HEAD), "k": (WIDTH, HEADS, HEAD), "v": (WIDTH, HEADS, HEAD), "o": (HEADS, HEAD, WIDTH)}
KERNELS |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
MATRICES = {(WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, VOCAB)}
# Sums of up to 56 products of order one, in float32 and in another order.
close = functools.partial(np.testing.assert_allclose, atol=3e-5)


def norm(scale, x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * jnp.expand_dims(scale, range(x.ndim - 1))


def attend(p, x, mix):
    """The attention block; `mix` gives the keys and values seen, and a mask (query, key)."""
    h = norm(p["norm"], x)
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    k, v, mask, cache = mix(k, v)
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(HEAD)
    scores = jax.nn.softmax(jnp.where(mask[None, None], scores, -jnp.inf))
    return x + jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqs,bshk->bqhk", scores, v), p["o"]), cache


def layer(p, x, mix):
    x, cache = attend(p, x, mix)
    h = norm(p["norm"], x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], cache


def through_layers(p, x, mix, caches):
    """x through all layers, a list of them or one stack; and their caches, always stacked."""
    if isinstance(p["layers"], list):
        results = []
        for i, layer_params in enumerate(p["layers"]):
            x, cache = layer(layer_params, x, functools.partial(mix, jax.tree.map(lambda c, i=i: c[i], caches)))
            results.append(cache)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *results)
    return lax.scan(lambda x, both: layer(both[0], x, functools.partial(mix, both[1])), x, (p["layers"], caches))


def from_embedding(p, x):
    """Logits (batch, seq, vocab) of embedded tokens (batch, seq, width)."""
    seq = x.shape[1]
    mask = jnp.tril(jnp.ones((seq, seq), bool))
    x, _ = through_layers(p, x, lambda _, k, v: (k, v, mask, ()), ())
    return norm(p["norm"], x) @ p["head"]


def forward(p, tokens):
    return from_embedding(p, p["embedding"][tokens])


def step(p, cache, token, position):
    """Logits (batch, vocab) after one more token (batch,) at `position`, and the cache with its keys and values."""

    def mix(old, k, v):
        new = tuple(lax.dynamic_update_slice(c, n, (0, position, 0, 0)) for c, n in zip(old, (k, v), strict=True))
        return *new, jnp.arange(CONTEXT)[None] <= position, new

    x, cache = through_layers(p, p["embedding"][token][:, None], mix, cache)
    return (norm(p["norm"], x) @ p["head"])[:, 0], cache


def empty_cache(batch):
    return tuple(jnp.zeros((DEPTH, batch, CONTEXT, HEADS, HEAD)) for _ in range(2))


def random_params(stacked):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(WIDTH), jnp.float32)

    layers = [{name: normal(*shape) for name, shape in KERNELS.items()} | {"norm": 1 + normal(WIDTH)} for _ in "12"]
    if stacked:
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {
        "embedding": 6 * normal(VOCAB, WIDTH),
        "layers": layers,
        "norm": 1 + normal(WIDTH),
        "head": normal(WIDTH, VOCAB),
    }


def tokens_of(rows, seq=7, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, seq)), jnp.int32)


def is_packed(leaf):
    return isinstance(leaf, QuantizedTensor)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


def floats_of(params):
    """The leaves that gradients are taken of: float, and no part of a packed weight."""
    leaves, tree = jax.tree.flatten(params, is_leaf=is_packed)
    chosen = {i: leaf for i, leaf in enumerate(leaves) if not is_packed(leaf)}

    def put_back(chosen):
        return jax.tree.unflatten(tree, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])

    return chosen, put_back


@pytest.fixture(scope="module", params=["list", "scan"])
def packed(request):
    """Parameters of which every kernel is packed and nothing else."""
    params, _ = jgptq.quantize(
        forward, random_params(request.param == "scan"), [tokens_of(16)], grid=Grid(bits=4, group_size=16), method="rtn"
    )
    count = sum(is_packed(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_packed))
    assert count == (len(KERNELS) if request.param == "scan" else len(KERNELS) * DEPTH) + 1
    return params


def shapes(jaxpr):
    """The shape of every array in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


def weight_sized(arrays):
    """Shapes of the float32 arrays that could be a dequantized kernel, or a stack of them."""
    return [array.shape for array in arrays if array.dtype == jnp.float32 and array.shape[-2:] in MATRICES]


dense_forward = jax.jit(lambda packed, tokens: forward(dense(packed), tokens))


# --- jit, vmap, shapes ---


def test_jit(packed):
    with jax.checking_leaks():
        close(jax.jit(quantized(forward))(packed, tokens_of(3)), dense_forward(packed, tokens_of(3)))


def test_a_closed_over_weight_stays_packed_in_the_program(packed):
    """As a constant of the trace, each weight is its words and scales; no float array is as large as a weight."""
    constants = jax.make_jaxpr(lambda tokens: quantized(forward)(packed, tokens))(tokens_of(3)).consts
    words = [constant for constant in constants if constant.dtype == jnp.uint32 and constant.ndim >= 2]
    assert len(words) == sum(is_packed(leaf) for leaf in jax.tree.leaves(packed, is_leaf=is_packed))
    assert not weight_sized(constants)


def test_a_scan_over_packed_layers_stays_a_scan(packed):
    jaxpr = jax.make_jaxpr(quantized(forward))(packed, tokens_of(3)).jaxpr
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == isinstance(packed["layers"], dict)
    for scan in scans:
        words = [var.aval for var in scan.invars if var.aval.dtype == jnp.uint32 and var.aval.ndim >= 2]
        assert len(words) == len(KERNELS)
        assert all(aval.shape[0] == DEPTH for aval in words)


def test_vmap_over_inputs(packed):
    tokens = tokens_of(3)
    mapped = jax.jit(jax.vmap(quantized(forward), in_axes=(None, 0)))(packed, tokens[:, None])
    close(mapped[:, 0], dense_forward(packed, tokens))


def test_vmap_does_not_copy_the_weights(packed):
    jaxpr = jax.make_jaxpr(jax.vmap(quantized(forward), in_axes=(None, 0)))(packed, tokens_of(5)[:, None]).jaxpr
    assert not [shape for shape in shapes(jaxpr) if shape[:1] == (5,) and shape[1:] in MATRICES]


def test_eval_shape(packed):
    expected = jax.eval_shape(forward, dense(packed), tokens_of(3))
    for params in (packed, jax.eval_shape(lambda: packed)):
        assert jax.eval_shape(quantized(forward), params, tokens_of(3)) == expected


# --- Derivatives ---


def losses(packed):
    """A scalar of the float parameters and the embedded inputs, with packed weights and with dense ones."""
    _, put_back = floats_of(packed)

    def loss(serve, floats, x):
        return jnp.mean(jax.nn.log_softmax(serve(put_back(floats), x))[..., 0] ** 2)

    return (
        functools.partial(loss, quantized(from_embedding)),
        functools.partial(loss, lambda params, x: from_embedding(dense(params), x)),
    )


@pytest.fixture(scope="module")
def arguments(packed):
    return floats_of(packed)[0], jnp.asarray(np.random.default_rng(2).standard_normal((3, 7, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def expected(packed, arguments):
    """Value and gradients of the loss with dense weights."""
    value, gradients = jax.jit(jax.value_and_grad(losses(packed)[1], argnums=(0, 1)))(*arguments)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(gradients[1]))  # far above the tolerance
    return value, gradients


def assert_trees_close(got, expected):
    jax.tree.map(close, got, expected)


def test_value_and_grad_of_float_parameters_and_inputs(packed, arguments, expected):
    assert_trees_close(jax.jit(jax.value_and_grad(losses(packed)[0], argnums=(0, 1)))(*arguments), expected)


def test_grad_of_scales_is_that_through_dequantization(packed, arguments):
    """Codes have no gradient, scales do: they are arrays like others."""

    def loss(scales, serve):
        weight = QuantizedTensor(**{**vars(packed["head"]), "scales": scales})
        return jnp.mean(serve({**packed, "head": weight}, arguments[1]) ** 2)

    scales = packed["head"].scales.astype(jnp.float32)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    dense_gradient = gradient(scales, lambda params, x: from_embedding(dense(params), x))
    assert float(jnp.abs(dense_gradient).max()) > 1e-2
    close(gradient(scales, quantized(from_embedding)), dense_gradient)


def test_checkpoint_around_it(packed, arguments, expected):
    gradient = jax.jit(jax.grad(jax.checkpoint(losses(packed)[0]), argnums=(0, 1)))
    assert_trees_close(gradient(*arguments), expected[1])


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(jax.checkpoint, id="checkpoint"),
        pytest.param(lambda f: f, id="plain"),
    ],
)
def test_no_dequantized_weight_is_held_for_the_backward_pass(packed, arguments, wrap):
    held = jax.eval_shape(lambda *a: jax.tree.leaves(jax.vjp(wrap(losses(packed)[0]), *a)[1]), *arguments)
    assert not weight_sized(held)


def directions(arguments):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), arguments)


def along(gradients, tangents):
    return sum(map(jnp.vdot, jax.tree.leaves(gradients), jax.tree.leaves(tangents)))


def test_jvp(packed, arguments, expected):
    tangents = directions(arguments)
    value, tangent = jax.jit(lambda *a: jax.jvp(losses(packed)[0], a, tangents))(*arguments)
    close(value, expected[0])
    close(tangent, along(expected[1], tangents), rtol=1e-4)


def test_linearize_and_its_transpose(packed, arguments, expected):
    tangents = directions(arguments)

    @jax.jit
    def linearized(*arguments):
        value, linear = jax.linearize(losses(packed)[0], *arguments)
        return value, linear(*tangents), jax.linear_transpose(linear, *arguments)(jnp.ones(()))

    value, tangent, gradients = linearized(*arguments)
    close(value, expected[0])
    close(tangent, along(expected[1], tangents), rtol=1e-4)
    assert_trees_close(gradients, expected[1])


def test_forward_over_reverse(packed, arguments):
    """A Hessian-vector product, in the direction of the inputs."""
    floats, x = arguments
    got, dense_product = (
        jax.jit(lambda v, f=f: jax.jvp(lambda x: jax.grad(f, argnums=1)(floats, x), (x,), (v,))[1])(directions(x))
        for f in losses(packed)
    )
    assert float(jnp.abs(dense_product).max()) > 1e-3
    close(got, dense_product)


# --- Export ---


def test_export_with_the_weights_as_constants(packed):
    exported = jax.export.export(jax.jit(lambda tokens: quantized(forward)(packed, tokens)))(tokens_of(3))
    again = jax.export.deserialize(exported.serialize())
    close(again.call(tokens_of(3)), dense_forward(packed, tokens_of(3)))


def test_export_with_the_weights_as_an_argument_and_any_batch_size(packed):
    tokens = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 7), jnp.int32)
    exported = jax.export.export(jax.jit(quantized(forward)))(jax.eval_shape(lambda: packed), tokens)
    again = jax.export.deserialize(exported.serialize())
    for rows in (1, 3):
        close(again.call(packed, tokens_of(rows)), dense_forward(packed, tokens_of(rows)))


# --- Generation ---


def greedy(params, prompt):
    """CONTEXT tokens that begin with a prompt (batch, seq), by a while_loop around the step with its cache."""

    def body(state):
        position, tokens, cache = state
        logits, cache = quantized(step)(params, cache, tokens[:, position], position)
        given = position + 1 < prompt.shape[1]
        following = jnp.where(given, tokens[:, position + 1], jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return position + 1, tokens.at[:, position + 1].set(following), cache

    tokens = jnp.zeros((prompt.shape[0], CONTEXT), jnp.int32).at[:, : prompt.shape[1]].set(prompt)
    state = jnp.int32(0), tokens, empty_cache(prompt.shape[0])
    return lax.while_loop(lambda state: state[0] < CONTEXT - 1, body, state)[1]


def test_greedy_decoding_in_a_while_loop(packed):
    prompt = tokens_of(3, seq=3)
    got = jax.jit(greedy)(packed, prompt)
    assert jnp.array_equal(got[:, :3], prompt)
    # The forward pass over what was decoded would choose the same at each place.
    logits = dense_forward(packed, got)[:, 2:-1]
    best = jnp.sort(logits)
    assert float((best[..., -1] - best[..., -2]).min()) > 1e-3  # no near tie that rounding could turn
    assert jnp.array_equal(got[:, 3:], jnp.argmax(logits, axis=-1))


def test_the_loop_carries_no_dequantized_weight(packed):
    jaxpr = jax.make_jaxpr(greedy)(packed, tokens_of(3, seq=3)).jaxpr
    (loop,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "while"]
    assert not weight_sized([var.aval for var in loop.invars])


def test_a_cache_may_be_donated(packed):
    served = jax.jit(quantized(step), donate_argnums=1)
    tokens, cache = tokens_of(3), empty_cache(3)
    for position in range(tokens.shape[1]):
        before = cache
        logits, cache = served(packed, before, tokens[:, position], position)
        assert all(array.is_deleted() for array in before)
    close(logits, dense_forward(packed, tokens)[:, -1])
    assert not any(array.is_deleted() for array in jax.tree.leaves(packed))
    assert "input_output_alias" in served.lower(packed, cache, tokens[:, 0], 0).compile().as_text()
