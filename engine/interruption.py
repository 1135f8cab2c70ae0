"""Ending a run of a graph from another thread, in its middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Protocol

from .errors import Cancelled

__all__ = ["Interruption", "current_interruption"]


class RunOptions(Protocol):
    """What onnxruntime is told about one run. It looks at `terminate` before each operator."""

    terminate: bool


class Interruption:
    """A switch that ends the runs of graphs in a block of one thread, the one in progress included.

    `is_set` goes to `Engine.stream` as `cancelled`, so that nothing else begins there either. Steps of the decoder that
    a GPU replays are not ended: they are short.
    """

    def __init__(self):
        self._lock = Lock()
        self._set = False
        self._options: RunOptions | None = None

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        """End what runs, and let nothing run any more. From any thread."""
        with self._lock:
            self._set = True
            if self._options is not None:
                self._options.terminate = True

    @contextmanager
    def here(self) -> Iterator[None]:
        """Runs in this block, in this thread, are those that are ended."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def run(self, options: RunOptions) -> Iterator[None]:
        """Around one run with its own `options`. Raises Cancelled if it was ended, or not begun."""
        with self._lock:
            if self._set:
                raise Cancelled("the request has been cancelled")
            self._options = options
        try:
            yield
        except Exception as error:
            if self._set:
                raise Cancelled("the request has been cancelled") from error
            raise
        finally:
            with self._lock:
                self._options = None


_current: ContextVar[Interruption | None] = ContextVar("interruption", default=None)


def current_interruption() -> Interruption | None:
    """The one of the block that this thread is in."""
    return _current.get()
