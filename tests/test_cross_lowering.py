"""What runs on an accelerator lowers for it, on a machine that has none."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jgptq


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("act_order", [False, True, "static", "group"])
def test_the_solver_lowers(platform, act_order):
    solve = functools.partial(
        jgptq.gptq,
        grid=jgptq.Grid(bits=4, group_size=32),
        act_order=act_order,
        scale_search="in_loop" if act_order == "group" else None,
        sweeps=2 * (act_order == "group"),
    )
    w = jax.ShapeDtypeStruct((96, 16), jnp.bfloat16)
    hessian = jax.eval_shape(lambda: jgptq.init_hessian(96))
    lowered = jax.jit(solve).trace(w, hessian).lower(lowering_platforms=(platform,))
    assert "stablehlo.while" in lowered.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_product_lowers(platform, bits):
    grid = jgptq.Grid(bits=bits, group_size=32)
    weight = jax.eval_shape(lambda w: jgptq.rtn(w, grid)[0], jax.ShapeDtypeStruct((96, 16), jnp.float32))
    x = jax.ShapeDtypeStruct((4, 96), jnp.bfloat16)
    lowered = jax.jit(jgptq.matmul).trace(x, weight).lower(lowering_platforms=(platform,))
    assert "stablehlo.dot_general" in lowered.as_text()
