"""What depends on the process: how many cores it may use, and what must not happen when it forks or ends."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
import threading
import time
import weakref
from pathlib import Path

from .errors import InputError

__all__ = ["GraphTurn", "OwnProcess", "kept_by_forks", "thread_count", "usable_cores"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_MAX_THREADS = 1024  # of one graph: more than machines have cores; a million would take all memory for their stacks


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity and the CPU quota of its container, rounded up.

    onnxruntime's own default counts all cores of the machine; threads beyond a quota are paused most of the time, in
    the middle of what the others wait for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def thread_count(threads: int | None) -> int:
    """What a caller asks for, or one thread for each usable core. Raises InputError for no number of threads."""
    if threads is None:
        return usable_cores()
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads is {threads!r}, it must be an integer between 1 and {_MAX_THREADS}")
    return threads


def _quota() -> float:
    """CPU seconds a second that the control groups of this process allow; infinity if they say nothing."""
    try:
        entries = [line.split(":", 2) for line in _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):  # no Linux
        return math.inf
    quotas = [math.inf]
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if not controllers:  # version 2; in a container the path may be one of the host, which is not there
            quotas += [_limit(folder / "cpu.max") for folder in _ancestors(_CGROUPS, path)]
        elif "cpu" in controllers.split(","):
            quotas += [
                _limit(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                for root in (_CGROUPS / controllers, _CGROUPS / "cpu")
                for folder in _ancestors(root, path)
            ]
    return min(quotas)


def _ancestors(root: Path, path: str) -> list[Path]:
    """The folder of a control group and of all groups around it: each of them limits."""
    own = root / path.lstrip("/")
    return [own, *(folder for folder in own.parents if folder.is_relative_to(root))]


def _limit(*files: Path) -> float:
    """Quota by period, as numbers in one file or in two; infinity if there is none."""
    try:
        quota, period = (float(word) for file in files for word in file.read_text(encoding="ascii").split())
    except (OSError, ValueError):  # no such file, "max", or no two numbers
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


class OwnProcess:
    """Held by what is of no use in any other process: threads and locks are neither forked nor pickled."""

    def __init__(self) -> None:
        self._id = os.getpid()

    def check(self) -> None:
        """Raise InputError in a process that was forked from the one that made this; requests begin with this."""
        _stay_at_the_end()
        if self._id != os.getpid():
            raise InputError("this engine was opened before the process was forked: open it in each process")

    def __reduce__(self):
        raise TypeError("an engine cannot be pickled: send the path of its bundle, and open it in each process")


class GraphTurn:
    """Held while a graph runs: one at a time. In a daemon thread none begins once the interpreter ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        _stay_at_the_end()
        self._lock.acquire()
        _running.add(threading.get_ident())

    def __exit__(self, *exception: object) -> None:
        _running.discard(threading.get_ident())
        self._lock.release()


# Up to Python 3.13 a daemon thread that comes back from C++ (onnxruntime, numpy) to an interpreter that has ended takes
# the process down (SIGABRT). So the end waits until daemon threads have left the engine or stay where they harm nobody.
_ended = threading.Event()
_running: set[int] = set()  # identifiers of threads that have a turn: nobody could get it while they stayed
_staying: set[int] = set()  # of those that never return
_LONGEST_RUN = 20.0  # seconds
_HERE = os.path.dirname(__file__)


def _stay_at_the_end() -> None:
    """Never return in a daemon thread of an interpreter that ends."""
    if _ended.is_set() and threading.current_thread().daemon and threading.get_ident() not in _running:
        _staying.add(threading.get_ident())
        threading.Event().wait()


def _is_busy() -> bool:
    """Whether a daemon thread is inside the engine."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0) if thread.daemon and thread.ident not in _staying else None
        while frame is not None:
            if os.path.dirname(frame.f_code.co_filename) == _HERE:
                return True
            frame = frame.f_back
    return False


def _end() -> None:
    _ended.set()
    latest = time.monotonic() + _LONGEST_RUN
    while _is_busy() and time.monotonic() < latest:
        time.sleep(0.001)


atexit.register(_end)

_kept: weakref.WeakSet[object] = weakref.WeakSet()


def kept_by_forks(session: object) -> None:
    """Never free `session` in a process that is forked from this one.

    A session has threads, which a fork does not copy. To free it would wait for them: the child crashes or hangs when
    it ends (onnxruntime pull request 31961).
    """
    _kept.add(session)


def _keep_for_ever() -> None:
    for session in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)
