"""Signals that end a command so that it can say what is kept."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Makes SIGTERM a KeyboardInterrupt as Ctrl-C is, and yields what raises one that was lost.

    Python drops an exception from a garbage collector's callback, of which JAX has one: about one in forty got lost.
    """
    received = []

    def interrupt(number: int, frame: Any) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
