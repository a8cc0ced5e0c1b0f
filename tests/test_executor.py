"""The sums that the executor makes of a product's inputs, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jgptq import hessian as hessians
from jgptq.executor import Executor

WIDTH, EXPERTS = 12, 3
SIZES = np.array([5, 0, 11])

WEIGHTS = {"dense": (WIDTH, 4), "experts": (EXPERTS, WIDTH, 4), "ragged": (EXPERTS, WIDTH, 4)}


def dense(w, x):
    return x @ w


def experts(w, x):
    return jnp.einsum("eti,eio->eto", x, w)


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.asarray(SIZES))


def inputs(f, seed: int) -> np.ndarray:
    shape = {"dense": (2, 8, WIDTH), "experts": (EXPERTS, 16, WIDTH), "ragged": (SIZES.sum(), WIDTH)}[f.__name__]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(f, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if f is ragged:
        return np.stack([rows.T @ rows for rows in np.split(x, np.cumsum(SIZES)[:-1])])
    return np.einsum("eti,etj->eij", x, x) if f is experts else np.einsum("bti,btj->ij", x, x)


# One product, blocks in one program, and blocks one by one.
@pytest.mark.parametrize(("least", "wide"), [(128, 8192), (3, 8192), (3, 8)], ids=["whole", "blocks", "one by one"])
@pytest.mark.parametrize("f", [dense, experts, ragged])
def test_moments_are_the_whole_sum_over_all_batches(f, least, wide, monkeypatch):
    monkeypatch.setattr(hessians, "LEAST", least)
    monkeypatch.setattr(hessians, "WIDE", wide)
    monkeypatch.setattr(hessians, "panel_size", lambda n: 4)
    jax.clear_caches()  # of the same shapes with other blocks
    w = jnp.asarray(np.random.default_rng(0).standard_normal(WEIGHTS[f.__name__]), jnp.float32)
    batches = [inputs(f, seed) for seed in (1, 2)]
    executor = Executor(f, w, batches)
    (step,) = executor.choose()
    hessian, drift = executor.moments(step)
    assert drift is None
    np.testing.assert_allclose(hessian.total, sum(exact(f, x) for x in batches), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hessian.total, np.swapaxes(hessian.total, -1, -2))
