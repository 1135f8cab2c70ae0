"""Work on large bodies beside the event loop, one after another.

Much of it lets no other thread run for moments, and several at once would starve the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["AT_ONCE", "beside"]

AT_ONCE = 2**18
"""Bytes of a body, or characters of a file in base64, that take too little time to go to another thread."""

_THREAD = ThreadPoolExecutor(1, "siglance-bodies")
_Result = TypeVar("_Result")


async def beside(work: Callable[[], _Result]) -> _Result:
    """The result of `work`, in the thread of large bodies."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work)
