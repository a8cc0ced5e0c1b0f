"""Settings of a whole process, for a low peak of memory."""

import ctypes
import os
import sys
from typing import Any

import jax

# JAX 0.11's XLA no longer knows the flag, and ends a process that sets it.
EMITTERS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def spare_memory() -> None:
    """Process-wide settings for a low peak: benchmarks/memory.py says what they save.

    JAX 0.10's newer emitters of CPU code take 150 MB more to compile one solve, which is no faster for it. glibc raises
    the size from which a freed array goes back to the system to that of the largest array freed, unless it is set; what
    is smaller it keeps in an arena for each thread.
    """
    if EMITTERS and "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{EMITTERS} {os.environ.get('XLA_FLAGS', '')}"
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(M_ARENA_MAX, 1)
    caches = lowering_caches()

    def spare(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            for cache in caches:
                cache.cache_clear()
        if hasattr(libc, "malloc_trim"):
            # What a compilation took is in pieces all over the heap, none of which glibc gives back by itself.
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(spare)


def lowering_caches() -> list[Any]:
    """Where JAX keeps the text of each program besides what it compiled from it: at least 1.5 MB, of 40 programs.

    The public jax.clear_caches would drop the compiled programs as well. A JAX that has other names keeps the text.
    """
    names = (("jax._src.pjit", "_pjit_lower"), ("jax._src.interpreters.pxla", "_cached_lowering_to_hlo"))
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return [cache for cache in found if hasattr(cache, "cache_clear")]
