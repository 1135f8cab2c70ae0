"""The C library's heap: memory that it keeps for later can be given back."""

from __future__ import annotations

import ctypes
import functools

__all__ = ["give_back"]


def give_back() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc).

    Reading a tokenizer of 262,144 tokens frees 190 MB in small pieces, which glibc would hold for the life of the
    process.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; on Windows there is no `None` to look in
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return trim
