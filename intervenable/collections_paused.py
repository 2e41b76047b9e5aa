"""No pass of the garbage collector while something short is done that makes many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Pause:
    """How many blocks want the collector off, in all threads: it is on again after the last of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0
        self._was_on = False

    def begin(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._blocks += 1

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0 and self._was_on:
                gc.enable()


_PAUSE = _Pause()


@contextmanager
def collections_paused() -> Iterator[None]:
    """Run the block without collections of garbage; what nothing refers to is freed all the same.

    A full one looks at each object of the process: a third of a second once transformers is imported, and so much
    is made when a map is that there is one each time. The process has the collector as it was when the block ends,
    in whatever thread and whatever it raises.
    """
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()
