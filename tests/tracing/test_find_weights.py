"""What the tracer finds in a function, against what the function plainly does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

from jgptq import find_weights
from jgptq.tensor import Layout
from jgptq.tracing import views


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def only(sites):
    (site,) = [site for site in sites if site.quantizable]
    return site


X = shaped(2, 5, 24)

# name: (function of w and x, shape of w, in_axes, out_axes)
PRODUCTS = {
    "x @ w": (lambda w, x: x @ w, (24, 8), (0,), (1,)),
    "x @ w.T": (lambda w, x: x @ w.T, (8, 24), (1,), (0,)),
    "dot": (lambda w, x: jnp.dot(x, w), (24, 8), (0,), (1,)),
    "weight first": (lambda w, x: jnp.einsum("of,btf->bto", w, x), (8, 24), (1,), (0,)),
    "heads": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (24, 4, 3), (0,), (1, 2)),
    "two contracted axes": (
        lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(2, 5, 4, 6), w),
        (4, 6, 10),
        (0, 1),
        (2,),
    ),
    "contracted in the other order": (
        lambda w, x: jnp.einsum("btkh,hkd->btd", x.reshape(2, 5, 6, 4), w),
        (4, 6, 10),
        None,
        (2,),
    ),
    "reshaped": (lambda w, x: x @ w.reshape(24, 8), (24, 2, 4), (0,), (1, 2)),
    "split and used by heads": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w.reshape(24, 2, 4)), (24, 8), (0,), None),
    "squeezed": (lambda w, x: x @ w[:, 0, :] if False else x @ jnp.squeeze(w, 1), (24, 1, 8), (0,), None),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (24, 8), (0,), (1,)),
    "jit": (lambda w, x: jax.jit(lambda a, b: a @ b)(x, w), (24, 8), (0,), (1,)),
    "remat": (lambda w, x: jax.checkpoint(lambda a, b: jnp.sin(a @ b))(x, w), (24, 8), (0,), (1,)),
    "custom_jvp": (lambda w, x: jax.nn.relu(x @ w), (24, 8), (0,), (1,)),
    "vmap over inputs": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (24, 8), (0,), (1,)),
    "named for remat": (lambda w, x: x @ checkpoint_name(w, "w"), (24, 8), (0,), (1,)),
    "vector": (lambda w, x: x @ w, (24,), (0,), ()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_found_with_the_axes_it_contracts(name):
    f, shape, in_axes, out_axes = PRODUCTS[name]
    site = only(find_weights(f, shaped(*shape), X))
    assert site.layout.in_features == 24
    assert site.layout.out_features == np.prod(shape) // 24
    if in_axes is not None:
        assert site.layout.in_axes == in_axes
    if out_axes is not None:
        assert site.layout.out_axes == out_axes


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_layout_makes_the_product_a_matrix_product(name):
    """f(w, x) has the entries of (x as rows) @ layout.to_matrix(w), whatever the function's axes."""
    f, shape, *_ = PRODUCTS[name]
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)
    x = jnp.asarray(rng.integers(-4, 5, X.shape), jnp.float32)
    site = only(find_weights(f, w, x))
    assert jnp.array_equal(site.layout.from_matrix(site.layout.to_matrix(w)), w)
    if name in ("remat", "custom_jvp", "contracted in the other order"):
        return  # a nonlinearity follows, or x's own axes are read in another order
    rows = np.asarray(x).reshape(10, 24) @ np.asarray(site.layout.to_matrix(w))
    assert np.array_equal(np.sort(np.asarray(f(w, x), np.float32).ravel()), np.sort(rows.ravel()))


REFUSED = {
    "used in two roles": (lambda p, x: (x @ p["w"]) @ p["w"].T, "used in 2 products, in different roles"),
    "tied": (lambda p, x: p["w"][jnp.zeros(3, int)] @ x[0].T @ jnp.ones((5, 24)) @ p["w"], "also used in gather"),
    "scaled along its inputs": (
        lambda p, x: x @ (jnp.arange(24.0)[:, None] * p["w"]),
        "a product after scaling along its inputs",
    ),
    "scaled by the data": (lambda p, x: x @ (x.sum() * p["w"]), "used in mul"),
    "scaled at random": (lambda p, x: x @ (jnp.cos(jnp.arange(576.0).reshape(24, 24)) * p["w"]), "used in mul"),
    "half of it unused": (lambda p, x: x @ p["w"][:, :12], "slices that overlap, leave some of it out"),
    "product of two weights": (lambda p, x: x @ (p["w"] @ p["w"]), "a product of two weights"),
    "sliced in the inputs, unequally": (
        lambda p, x: x[..., :4] @ p["w"][:4] + x[..., 4:] @ p["w"][4:],
        "cut its inputs unequally",
    ),
    "an output": (lambda p, x: (x @ p["w"], p["w"]), "an output of the function"),
    "a convolution in a scan": (
        lambda p, x: jax.lax.scan(
            lambda c, _: (jax.lax.conv_general_dilated(c, p["w"][..., None], (1,), "SAME"), None),
            x.swapaxes(1, 2),
            length=3,
        )[0],
        "used in conv_general_dilated in a scan",
    ),
    "in a loop of unknown length": (
        lambda p, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p["w"], x),
        "used in while",
    ),
    "complex": (lambda p, x: jax.lax.dot_general(x * 1j, p["w"], (((2,), (0,)), ((), ()))), "a complex product"),
    "unused": (lambda p, x: x, "not used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_leave_the_weight_alone_and_say_why(name):
    f, reason = REFUSED[name]
    (site,) = find_weights(f, {"w": shaped(24, 24)}, X)
    assert not site.quantizable
    assert reason in site.reason
    assert reason in str(site)


def test_the_same_weight_at_every_step_of_a_long_scan_is_one_weight():
    def f(p, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["h"]), None), x[:, 0, :8], x.swapaxes(0, 1))[0]

    sites = find_weights(f, {"in": shaped(24, 8), "h": shaped(8, 8)}, jax.ShapeDtypeStruct((2, 5000, 24), jnp.float32))
    assert [(site.path, site.quantizable, len(site.parts)) for site in sites] == [("h", True, 1), ("in", True, 1)]


def test_a_scan_over_very_many_weights_is_left_alone():
    def f(p, x):
        return jax.lax.scan(lambda c, w: (c + x @ w, None), x[:, 0], p)[0]

    (site,) = find_weights(f, shaped(60_000, 24), jax.ShapeDtypeStruct((2, 24), jnp.float32))
    assert not site.quantizable
    assert "a scan of 60000 steps" in site.reason


def test_custom_vjp_is_seen_through():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda saved, g: (g, g))
    assert only(find_weights(lambda w, x: product(x, w), shaped(24, 8), X)).layout == Layout.dense(24, 8)


def test_integer_leaves_are_no_weights_and_paths_are_dotted():
    params = {"layers": [{"kernel": shaped(24, 8)}, {"kernel": shaped(8, 2)}], "step": shaped(dtype=jnp.int32)}

    def f(p, x):
        for layer in p["layers"]:
            x = x @ layer["kernel"]
        return x * p["step"]

    assert [site.path for site in find_weights(f, params, X)] == ["layers.0.kernel", "layers.1.kernel"]


def test_inputs_that_layers_cast_for_themselves_are_one_input():
    def f(p, x):
        return [x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16) for w in p]

    a, b = find_weights(f, [shaped(24, 8), shaped(24, 4)], X)
    assert a.parts[0].reads[0].activations == b.parts[0].reads[0].activations


def test_linen_and_nnx_modules_need_no_code_of_their_own():
    linen_model = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(3)])
    variables = jax.eval_shape(linen_model.init, jax.random.key(0), X)
    found = find_weights(linen_model.apply, variables, X)
    assert [site.path for site in found if site.quantizable] == [
        "params.layers_0.kernel",
        "params.layers_2.kernel",
    ]

    attention = nnx.eval_shape(lambda: nnx.MultiHeadAttention(4, 24, decode=False, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(attention)
    found = find_weights(lambda s, x: nnx.merge(graph, s)(x), nnx.to_pure_dict(state), X)
    assert {site.path: site.layout.in_axes for site in found if site.quantizable} == {
        "key.kernel": (0,),
        "out.kernel": (0, 1),
        "query.kernel": (0,),
        "value.kernel": (0,),
    }


def test_a_reshape_across_axes_is_no_view():
    class Reshape:
        primitive = type("P", (), {"name": "reshape"})
        params = {"new_sizes": (4, 9), "dimensions": None}  # noqa: RUF012

    assert views.follow(views.whole((6, 6)), Reshape) is None


def test_quantized_params_are_refused_with_the_path():
    from jgptq import Grid, rtn

    packed, _ = rtn(jnp.ones((24, 8)), Grid(group_size=8))
    with pytest.raises(ValueError, match=r"w is already a QuantizedTensor; give float parameters"):
        find_weights(lambda p, x: x @ p["w"], {"w": packed}, X)


def test_a_weight_of_no_elements_is_left_alone():
    (empty,) = find_weights(lambda p, x: x @ p, shaped(24, 0), X)
    assert (empty.quantizable, empty.reason) == (False, "it has no elements")


def test_a_weakly_typed_leaf_takes_the_dtype_of_what_it_meets():
    weak = jax.lax.full_like(jnp.asarray(1.0), 0.5)
    assert weak.weak_type
    (site, _) = find_weights(
        lambda p, x: (x.astype(jnp.bfloat16) * p[1]) @ p[0].astype(jnp.bfloat16), [shaped(24, 8), weak], X
    )
    assert site.parts[0].reads[0].activations[0].aval.dtype == jnp.bfloat16


def test_what_cannot_be_traced_is_named(without_type_checker):
    with pytest.raises(TypeError, match=r"f is a dict; give a function f\(params, \*inputs\)"):
        find_weights({"w": X}, lambda p, x: x)


def test_leaves_that_are_no_arrays_are_taken_as_they_are():
    params = {"w": shaped(24, 8), "activation": jnp.tanh, "name": "a"}
    found = find_weights(lambda p, x: p["activation"](x @ p["w"]) if p["name"] == "a" else x, params, X)
    assert only(found).path == "w"


def test_keyword_and_static_arguments_are_closed_over():
    f = functools.partial(lambda w, x, *, scale: x @ w * scale, scale=2.0)
    assert only(find_weights(f, shaped(24, 8), X)).quantizable
