"""Compiled programs on disk, so that the next run of a command need not compile them: JAX's own compilation cache."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# Programs that took less to compile are not worth a file.
LEAST_SECONDS = 0.1


def default_directory() -> Path | None:
    """Where the platform keeps what can be made again; None where JAX_COMPILATION_CACHE_DIR has told JAX a place."""
    if jax.config.jax_compilation_cache_dir:
        return None
    home = Path.home()
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return caches / "jgptq" / "programs"


@contextlib.contextmanager
def keeping_programs(directory: Path | None) -> Iterator[None]:
    """Inside, programs are fetched from and kept in a directory of the user's own; None: as JAX is configured.

    Where it cannot be made, a warning says so and everything is compiled.
    """
    try:
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept for the next run: {error}; give --cache-dir", stacklevel=3)
        directory = None
    if directory is None:
        yield
        return
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # which otherwise stays as it was when first used
