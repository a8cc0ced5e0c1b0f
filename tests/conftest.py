"""What every test runs under. Warnings are errors by pyproject.toml."""

import gc
import os
import sys

import jax
import pytest

# Compiling takes most of the time of most tests: XLA's older emitters of CPU code need half of it. JAX 0.11 has none.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# A (n, n) / (n,) that broadcasts along the wrong axis is a silent bug: no test lets it pass.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Optimized code would be faster, but not by what it takes to compile.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def without_type_checker(monkeypatch):
    """The library as its users run it: bad arguments meet its own checks, not the type checker of the tests."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def orbax_leavings(monkeypatch):
    """What Orbax leaves behind when it fails, tasks of an event loop that is closed, is collected here in silence."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    gc.collect()
