"""What depends on the process: how many cores it may use, and what must not happen when it forks."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from pathlib import Path

from .errors import InputError

__all__ = ["OwnProcess", "kept_by_forks", "thread_count", "usable_cores"]

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
        """Raise InputError in a process that was forked from the one that made this."""
        if self._id != os.getpid():
            raise InputError("this engine was opened before the process was forked: open it in each process")

    def __reduce__(self):
        raise TypeError("an engine cannot be pickled: send the path of its bundle, and open it in each process")


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
