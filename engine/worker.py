"""Processes of their own for files of other people: one question, one answer, then they end.

The libraries that open such files are large and written in C; a file may ask them for hours of work or all memory. Each
worker is a script beside this module that bounds itself before it looks at the file. This module starts it, watches the
clock, and turns every way in which it may end into words.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError

__all__ = ["Worker"]

Fault = Callable[[str], InputError]
"""Makes the error of the caller out of a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A script that answers one question about a file, and the words for what it does."""

    script: str
    package: str  # that it imports
    extra: str  # of siglance, which brings the package
    work: str  # "reading PDFs"
    task: str  # "reads PDFs"
    doing: str = "reading"
    done: str = "done"

    def require(self, fault: Fault) -> None:
        """Raise unless the package is installed and there is an interpreter to start."""
        if importlib.util.find_spec(self.package) is None:
            raise fault(f"{self.work} needs the package {self.package!r}: pip install 'siglance[{self.extra}]'")
        if not sys.executable or getattr(sys, "frozen", False):
            raise fault(f"{self.work} starts a process of the Python interpreter, which this program does not have")

    def ask(
        self,
        question: Mapping[str, Any],
        source: bytes | BinaryIO,
        fault: Fault,
        *,
        memory: int,
        seconds: float,
        late: str,
        limits: str,
    ) -> tuple[dict[str, Any], memoryview]:
        """The answer of a new process about the file `source`: its line of JSON, and the bytes behind it.

        `memory` (bytes) and `seconds` bound it. `late` follows "after N seconds" in the message when time is up, and
        `limits` are the bounds in words. Raises what `fault` makes.
        """
        folders = [folder for folder in sys.path if folder]
        header = {**question, "path": folders, "memory": memory, "seconds": seconds}
        given: dict[str, Any] = {"input": source} if isinstance(source, bytes) else {"stdin": source}
        try:
            done = subprocess.run(
                [sys.executable, "-I", Path(__file__).parent / self.script, json.dumps(header)],
                **given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise fault(f"not {self.done} after {seconds:g} seconds, {late}") from None
        except OSError as error:
            raise fault(f"cannot start the process that {self.task}: {error}") from error
        if done.returncode:
            raise fault(
                f"{self.doing} it ended with {_ending(done.returncode)}: it is damaged, or needs more than {limits}"
            )
        length = done.stdout.index(b"\n")
        reply = json.loads(done.stdout[:length])
        if "error" in reply:
            raise fault(reply["error"])
        return reply, memoryview(done.stdout)[length + 1 :]


def _ending(code: int) -> str:
    """The end of a process in words."""
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
