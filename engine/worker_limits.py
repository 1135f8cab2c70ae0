"""Bounds that a worker process gives itself. Workers are scripts without siglance and run this file by its path."""

from __future__ import annotations

import contextlib
import math

__all__ = ["limit_resources", "open_nothing_more"]


def limit_resources(memory: int, seconds: float) -> None:
    """Give this process at most `memory` bytes of address space, `seconds` of processor time, and no file to write.

    The process that asked watches the time too; this holds when it has gone. Windows has no such limits.
    """
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # Systems refuse some of these (macOS that on address space); the time that the asking process watches holds.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


def open_nothing_more() -> None:
    """No file and no socket from here on; those that are open stay. Windows has no such limit."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
