"""Where the time of a run goes: seconds by phase, of which one is on at a time.

JAX computes behind its caller's back, so a phase would end before its work does. While phases are measured, `wait`
holds the caller until an array is there; else it does nothing, and neither does anything else here.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax

COMPILE = "compile"
# What JAX reports of making a program: tracing and lowering it, and compiling it or fetching it from a cache on disk.
COMPILE_EVENTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


class Phases:
    """Seconds by phase. A phase inside another stops the outer one's clock; compiling is a phase wherever it happens.

    measured: False makes all of it do nothing.
    """

    def __init__(self, *, measured: bool):
        self.measured = measured
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._compiling: list[tuple[float, float]] = []

    @property
    def seconds(self) -> tuple[tuple[str, float], ...]:
        """(phase, seconds), the longest first."""
        return tuple(sorted(self._seconds.items(), key=lambda item: -item[1]))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The time until the context ends is this phase's."""
        if not self.measured:
            yield
            return
        self._stop_clock()
        self._open.append(name)
        try:
            yield
        finally:
            self._stop_clock()
            self._open.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what this thread compiles is counted apart."""
        if not self.measured:
            yield
            return
        thread = threading.get_ident()

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event.rsplit("/", 1)[-1] in COMPILE_EVENTS and threading.get_ident() == thread:
                self._compiled(seconds)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def wait(self, value: Any) -> Any:
        """The value, computed if phases are measured."""
        return jax.block_until_ready(value) if self.measured else value

    def _stop_clock(self) -> None:
        """Gives the time since the last stop to the phase that is on, but for what was compiled in it."""
        now = time.perf_counter()
        compiling = sum(stop - max(start, self._since) for start, stop in self._compiling)
        if self._open:
            self._seconds[self._open[-1]] += now - self._since - compiling
        if compiling:
            self._seconds[COMPILE] += compiling
        self._compiling, self._since = [], now

    def _compiled(self, seconds: float) -> None:
        """Takes note of an event; the tracing of a function reports that of the functions in it before its own."""
        now = time.perf_counter()
        start = max(now - seconds, self._since)
        self._compiling = [before for before in self._compiling if before[0] < start] + [(start, now)]


UNMEASURED = Phases(measured=False)
