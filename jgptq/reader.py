"""Lazy values read ahead: a thread reads what is wanted next while the caller computes."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jgptq.tensor import Index

Key = tuple[int, Index]


class Reader:
    """Reads values by key, ahead of time in a thread of its own; never two at once. A context that ends the thread.

    What a read raises, `take` raises: where the value is needed. At most what the last `start` named waits in memory.
    """

    def __init__(self):
        self._ahead: dict[Key, Future] = {}
        self._one_at_a_time = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Waits for a read under way, and does none of the others."""
        self._drop()
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def start(self, reads: Mapping[Key, Callable[[], Any]]) -> None:
        """Begins these reads in order; what earlier ones gave that nobody took is dropped."""
        self._drop()
        if reads and self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jgptq-reader")
        self._ahead = {key: self._thread.submit(self._read, read) for key, read in reads.items()}

    def take(self, key: Key, read: Callable[[], Any]) -> Any:
        """The value: read ahead, or else read now. Taken again it is read again."""
        ahead = self._ahead.pop(key, None)
        return self._read(read) if ahead is None else ahead.result()

    def _read(self, read: Callable[[], Any]) -> Any:
        with self._one_at_a_time:
            return read()

    def _drop(self) -> None:
        for ahead in self._ahead.values():
            ahead.cancel()
        self._ahead = {}
