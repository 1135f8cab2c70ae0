"""The memory of a process that does nothing but load a bundle and answer: measured in a fresh child process.

Run as a script it is that child: `python -m siglance.engine.bench.memory JSON`, which prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..errors import InputError
from .subject import Options, Subject

__all__ = ["Memory", "measure_memory"]

_STEPS = 16
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Memory:
    """Megabytes (10^6 bytes) resident, Python included, and seconds to load.

    After loading, after an answer, and the most at any time. They count mapped pages of files, libraries and weights,
    as every process monitor does; the system takes those back when it needs them. `anonymous_mb` is what of
    `resident_mb` it cannot take back.
    """

    loaded_mb: float
    resident_mb: float
    anonymous_mb: float
    peak_mb: float
    load_seconds: float


def measure_memory(bundle: Bundle, options: Options) -> Memory | None:
    """Load and answer one request in a child process. None where the system does not tell (no /proc)."""
    if not _STATUS.is_file():
        return None
    question = {"bundle": str(bundle.folder), "options": dataclasses.asdict(options)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"the process that measures memory ended with exit code {done.returncode}: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    question = json.loads(sys.stdin.read())
    begin = time.perf_counter()
    bundle = Bundle.open(question["bundle"])
    seconds = time.perf_counter() - begin
    subject = Subject(bundle, Options(**question["options"]))
    loaded, peak = _resident("VmRSS"), _resident("VmHWM")
    prompt = subject.prepare()
    _RESET.write_text("5")  # forgets the peak, which may be of making the picture
    subject.ask(*prompt, min(subject.options.new_tokens, _STEPS))
    found = Memory(
        loaded_mb=loaded,
        resident_mb=_resident("VmRSS"),
        anonymous_mb=_resident("RssAnon"),
        peak_mb=max(peak, _resident("VmHWM")),
        load_seconds=seconds + subject.load_seconds,
    )
    print(json.dumps(dataclasses.asdict(found)))


def _resident(field: str) -> float:
    """A field of this process's status, which is in KiB."""
    found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    _main()
