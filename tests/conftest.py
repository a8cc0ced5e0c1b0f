"""What every test runs under. Warnings are errors by pyproject.toml."""

import jax
import pytest

# A (n, n) / (n,) that broadcasts along the wrong axis is a silent bug: no test lets it pass.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def without_type_checker(monkeypatch):
    """The library as its users run it: bad arguments meet its own checks, not the type checker of the tests."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
