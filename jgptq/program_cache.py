"""Compiled programs on disk, so that the next run of a command need not compile them: JAX's own compilation cache."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# Programs that took less to compile are not worth a file. Those of 0.02 to 0.1 take 0.7 s together in a small Llama.
LEAST_SECONDS = 0.02


def default_directory() -> Path | None:
    """Where the platform keeps what can be made again; None where JAX_COMPILATION_CACHE_DIR has told JAX a place.

    None, and a warning, where the user has no home directory that would be needed.
    """
    if jax.config.jax_compilation_cache_dir:
        return None
    try:
        return _caches() / "jgptq" / "programs"
    except RuntimeError as error:
        _warn(error)
        return None


def _caches() -> Path:
    if sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA")
        return Path(given) if given else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path.home() / ".cache"


@contextlib.contextmanager
def keeping_programs(directory: Path | None) -> Iterator[None]:
    """Inside, programs are fetched from and kept in a directory of the user's own; None: as JAX is configured.

    Where it cannot be made or written to, a warning says so and everything is compiled. It has no size limit.
    """
    try:
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        _warn(error)
        directory = None
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }
    with _configured({} if directory is None else settings):
        yield


def keeping_no_programs() -> contextlib.AbstractContextManager[None]:
    """Inside, no program is fetched or kept, wherever JAX was told to keep them."""
    return _configured({"jax_enable_compilation_cache": False})


def _warn(error: Exception) -> None:
    reason = str(error).rstrip(".")
    warnings.warn(f"compiled programs are not kept for the next run: {reason}; give --cache-dir", stacklevel=3)


@contextlib.contextmanager
def _configured(settings: dict) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    if settings:
        compilation_cache.reset_cache()  # which otherwise stays as it was when first used
