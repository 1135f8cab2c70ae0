"""The process's memory: what is free goes back to the system, what is read in every step stands in huge pages.

All of it is advice that changes no value. Where the system does not take it, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["give_back", "huge_pages", "mapped_to_load"]

_MAPS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_HUGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_DROP, _COLLAPSE = 4, 25  # MADV_DONTNEED; MADV_COLLAPSE, Linux 6.1
_LOADING = threading.Lock()
# Bits of an entry of pagemap, of which there is one for each page of memory; see proc_pid_pagemap(5).
_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


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


def _unlock() -> None:
    """In a process that was forked while a thread was loading, nobody would ever come out."""
    global _LOADING
    _LOADING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


@contextlib.contextmanager
def mapped_to_load(file: Path) -> Iterator[None]:
    """Let go of the pages of `file` that what is loaded inside has mapped; whoever reads one gets it from the file.

    Loading reads weights to bring them into the layout of the kernels, after which most are never read from the file
    again. They would count as memory of the process until the system needs it. One thread at a time is inside, so that
    no mapping of another one, which may end at any moment, is taken for one that was made inside.
    """
    with _LOADING:
        before = _clean_mappings(file)
        yield
        madvise = _madvise()
        if madvise is None:
            return
        for start, end in _clean_mappings(file):
            if not any(start < other_end and other_start < end for other_start, other_end in before):
                madvise(start, end - start, _DROP)


def _clean_mappings(file: Path) -> list[tuple[int, int]]:
    """The addresses, start and end, of mappings of `file` that have pages in memory and were never written to."""
    found = []
    try:
        path = str(file.resolve())
        with _PAGES.open("rb", buffering=0) as pages:
            for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
                fields = line.split(None, 5)
                if fields[-1] != path:
                    continue
                start, end = (int(bound, 16) for bound in fields[0].split("-"))
                entries = _entries(pages, start, end)
                in_memory = entries & (_PRESENT | _SWAPPED) != 0
                # A page that was written to is a copy, no longer the file's.
                if in_memory.any() and (entries[in_memory] & _OF_FILE != 0).all():
                    found.append((start, end))
    except OSError:  # no Linux, or a sandbox that hides it
        return []
    return found


def _entries(pages: io.RawIOBase, start: int, end: int) -> np.ndarray:
    """What pagemap tells of the pages from address `start` to `end`: [pages] uint64."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages.seek(start // page * 8)
    return np.frombuffer(pages.read((end - start) // page * 8) or b"", np.uint64)


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Put the memory that is filled inside into huge pages, as far as it fills them: no more memory is used.

    Weights are read from one end to the other in every step, and with pages of 4 KiB the processor looks up an address
    for each of them: decoding is 9 % slower.
    """
    size = _huge_size()
    before = _full_blocks(size)
    yield
    madvise = _madvise()
    if madvise is not None:
        for first, count in _runs(sorted(_full_blocks(size) - before)):
            madvise(first * size, count * size, _COLLAPSE)


def _huge_size() -> int:
    """Bytes of a huge page; 0 where there are none."""
    try:
        return int(_HUGE_SIZE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _full_blocks(size: int) -> set[int]:
    """The blocks of `size` bytes, as address / size, of which every page is in memory and belongs to no file."""
    found: set[int] = set()
    if not size:
        return found
    page = os.sysconf("SC_PAGE_SIZE")
    pages, memory = size // page, os.sysconf("SC_PHYS_PAGES") * page // size
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
        with _PAGES.open("rb", buffering=0) as file:
            for fields in map(str.split, lines):
                start, _, end = fields[0].partition("-")
                first, stop = -(-int(start, 16) // size), int(end, 16) // size
                reserved = stop - first > memory  # address space that a library keeps for itself
                if first >= stop or reserved or not fields[1].startswith("rw-p") or fields[4] != "0":
                    continue
                entries = _entries(file, first * size, stop * size)
                present = (entries[: entries.size // pages * pages] & _PRESENT).astype(bool).reshape(-1, pages)
                found.update((np.flatnonzero(present.all(axis=1)) + first).tolist())
    except OSError:  # no Linux, or a sandbox that hides it
        return set()
    return found


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, count) of consecutive ones."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], len(members)


@functools.cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return madvise
