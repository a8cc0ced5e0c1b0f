"""The Hopper kernel of the recursion without a Hopper: it lowers, and its interpreted values are those of float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jgptq
from jgptq.hessian import factor
from jgptq.solvers import descent, hopper

MESH = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
)


class Emulated:
    """`hopper.Registers` for the interpreter, which knows no layouts."""

    errors = staticmethod(lambda inputs: jnp.zeros((hopper.OUTPUTS, inputs), jnp.float32))
    numbers = staticmethod(lambda inputs: jax.lax.broadcasted_iota(jnp.int32, (hopper.OUTPUTS, inputs), 1))
    of_outputs = staticmethod(lambda ref: ref[...])
    of_inputs = staticmethod(lambda ref: ref[...])


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import params  # public from JAX 0.11 on

    return params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True))


def problem(inputs, outputs):
    w, x = reference.problem(inputs, outputs, tokens=4 * inputs)
    hessian = jgptq.update_hessian(jgptq.init_hessian(inputs), jnp.asarray(x))
    rng = np.random.default_rng(0)
    scale = (np.abs(w).max(axis=0) / 7).astype(np.float32)
    zero = rng.integers(6, 9, outputs).astype(np.float32)
    feedback = (0.1 * rng.normal(size=w.shape)).astype(np.float32)
    return w, feedback, factor(hessian, 0.01), scale, zero


def recursion(w, targets, lower, pivots, scale, zero):
    """Codes, targets met on the way over scale, errors and loss in float64."""
    w, targets, lower, pivots, scale, zero = (
        np.asarray(a, np.float64) for a in (w, targets, lower, pivots, scale, zero)
    )
    codes, ratios, errors, loss = (np.zeros_like(w) for _ in range(4))
    for j in range(len(w)):
        t = targets[j] + lower[j, :j] @ errors[:j]
        ratios[j] = t / scale
        codes[j] = np.clip(np.round(ratios[j]) + zero, 0, 15)
        errors[j] = w[j] - scale * (codes[j] - zero)
        loss[j] = pivots[j] * (t - scale * (codes[j] - zero)) ** 2
    return codes, ratios, errors, loss.sum(axis=0)


@pytest.mark.parametrize(("inputs", "outputs", "processors"), [(16, 70, 132), (24, 200, 1)])
def test_values_match_float64(inputs, outputs, processors, monkeypatch):
    """With one processor, two warpgroups share a program."""
    monkeypatch.setattr(hopper, "PROCESSORS", processors)
    w, feedback, factored, scale, zero = problem(inputs, outputs)
    operands = w, w + feedback, factored.lower, factored.pivots, scale, zero
    codes, ratios, errors, loss = recursion(*operands)
    # A ratio half way between two codes could go either way in float32, and what follows in that output with it.
    clear = np.abs(ratios % 1 - 0.5).min(axis=0) > 1e-5
    assert clear.mean() > 0.95
    solve = functools.partial(hopper.solve, registers=Emulated)
    with jax.sharding.use_abstract_mesh(MESH), interpreter():
        found = jax.jit(solve)(*map(jnp.asarray, operands), jnp.float32(15))
    np.testing.assert_array_equal(found.codes[:, clear], codes[:, clear])
    np.testing.assert_allclose(found.errors[:, clear], errors[:, clear], atol=1e-5)
    np.testing.assert_allclose(found.loss[clear], loss[clear], rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"scale_search": "in_loop", "sweeps": 1}, {"act_order": True}], ids=str)
def test_the_solver_lowers_with_the_kernel_on_a_hopper(options, monkeypatch):
    def kernels():
        solve = functools.partial(jgptq.gptq, grid=jgptq.Grid(bits=4, group_size=32), **options)
        w = jax.ShapeDtypeStruct((2, 96, 200), jnp.bfloat16)
        hessian = jax.eval_shape(lambda: jax.tree.map(lambda a: jnp.stack([a, a]), jgptq.init_hessian(96)))
        with jax.sharding.use_abstract_mesh(MESH):
            lowered = jax.jit(jax.vmap(solve)).trace(w, hessian).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("jgptq_columns")

    assert kernels()
    jax.clear_caches()
    monkeypatch.setattr(descent, "KERNEL_DEVICES", ())
    assert not kernels()
    jax.clear_caches()
