"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from siglance.engine import heap


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_what_stands_below_a_block_in_use_is_given_back():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    blocks = [library.malloc(4000) for _ in range(10_000)]
    for block in blocks:
        ctypes.memset(block, 1, 4000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        library.free(block)
    before = resident_bytes()
    heap.give_back()
    assert before - resident_bytes() > 30_000_000
    library.free(blocks[-1])


def test_other_libraries_are_left_alone(monkeypatch):
    heap._malloc_trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.give_back()
    heap._malloc_trim.cache_clear()


HUGE = heap._huge_size()


def mapping_bytes(array: np.ndarray, field: str) -> int:
    """What smaps says of the mapping that `array` lies in: the rest of the process has memory that comes and goes."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds is not None:
            found = int(bounds[1], 16) <= array.ctypes.data < int(bounds[2], 16)
        elif found and line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


def mapped(blocks: int) -> tuple[mmap.mmap, np.ndarray]:
    """Memory of that many huge pages which no one has touched, and the part of it that begins with a whole one."""
    memory = mmap.mmap(-1, (blocks + 1) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    skip = -array.ctypes.data % HUGE
    return memory, array[skip : skip + blocks * HUGE]


@pytest.mark.skipif(not HUGE, reason="this system has no huge pages")
def test_only_blocks_that_were_filled_inside_move_and_no_memory_is_added():
    (older_memory, older), (_, newer) = mapped(4), mapped(4)
    older_memory.madvise(mmap.MADV_DONTFORK)  # neighbours of different advice are not merged into one mapping
    older[:] = 1
    with heap.huge_pages():
        newer[: 2 * HUGE] = 7
        newer[3 * HUGE : 3 * HUGE + HUGE // 2] = 9  # half a block
        huge, resident = mapping_bytes(newer, "AnonHugePages"), mapping_bytes(newer, "Rss")
    assert mapping_bytes(newer, "AnonHugePages") - huge in (0, 2 * HUGE)  # 0 before Linux 6.1
    assert mapping_bytes(newer, "Rss") == resident
    assert (newer[: 2 * HUGE] == 7).all()
    assert (newer[2 * HUGE : 3 * HUGE] == 0).all()
    assert (newer[3 * HUGE :] == np.where(np.arange(HUGE) < HUGE // 2, 9, 0)).all()


def file_mapping(path: Path) -> np.ndarray:
    """A private mapping of a file of ones, as graphs map their weights, read from end to end."""
    with path.open("r+b") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE), np.uint8)
    assert array.all()
    return array


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="this system does not tell what is mapped")
def test_only_what_was_mapped_inside_leaves_memory_and_it_can_be_read_again(tmp_path):
    file, link = tmp_path / "weights.bin", tmp_path / "other.bin"
    file.write_bytes(b"\1" * (4 << 20))
    os.link(file, link)
    older = file_mapping(file)
    with heap.mapped_to_load(file):
        newer, other = file_mapping(file), file_mapping(link)
        assert mapping_bytes(newer, "Rss") == 4 << 20
    assert mapping_bytes(newer, "Rss") == 0
    assert mapping_bytes(older, "Rss") == mapping_bytes(other, "Rss") == 4 << 20
    assert newer.all()


@pytest.mark.parametrize("pages", ["/proc/self/pagemap", "/dev/zero"])
def test_a_mapping_that_was_written_to_keeps_what_is_in_it(pages, monkeypatch, tmp_path):
    """Also where the system answers, and tells nothing."""
    monkeypatch.setattr(heap, "_PAGES", Path(pages))
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\1" * (1 << 20))
    with heap.mapped_to_load(file):
        array = file_mapping(file)
        array[5000] = 7
    assert array[5000] == 7
    assert array.sum() == (1 << 20) + 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_during_a_load_can_load(tmp_path):
    program = """
import os, sys
from pathlib import Path
from siglance.engine import heap
with heap.mapped_to_load(Path("nothing")):
    child = os.fork()
    if not child:
        with heap.mapped_to_load(Path("nothing")):
            os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.stdout.strip() == "7", done.stderr


@pytest.mark.parametrize("missing", ["_MAPS", "_PAGES", "_HUGE_SIZE"])
def test_systems_that_hide_their_memory(missing, monkeypatch, tmp_path):
    monkeypatch.setattr(heap, missing, tmp_path / "nothing")
    with heap.mapped_to_load(tmp_path / "nothing"), heap.huge_pages():
        array = np.ones(1 << 22, np.uint8)
    assert array.all()


def test_runs_of_consecutive_numbers():
    assert list(heap._runs([3, 4, 5, 9, 11, 12])) == [(3, 3), (9, 1), (11, 2)]
    assert list(heap._runs([])) == []


def test_an_error_inside_comes_out():
    with pytest.raises(KeyError), heap.mapped_to_load(Path("nothing")), heap.huge_pages():
        raise KeyError
    with heap.mapped_to_load(Path("nothing")):  # which waits for nobody
        pass
