"""`siglance serve` as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Process", "started"]

SERVE = [sys.executable, "-P", "-m", "siglance.engine", "serve"]


class Process:
    """A running program; `lines` are what it has written to stderr so far."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.lines: list[str] = []
        self._found = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._found:
                self.lines.append(line.rstrip())
                self._found.notify_all()

    def line(self, pattern: str) -> re.Match[str]:
        """The first line with a pattern, once it is there."""

        def match() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._found:
            assert self._found.wait_for(match, timeout=60), self.lines
        found = match()
        assert found is not None
        return found

    def address(self) -> tuple[str, int]:
        found = self.line(r" on http://([0-9.]+):(\d+)$")
        return found[1], int(found[2])

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address(), timeout=60)
        try:
            given = {"content-type": "application/json"} | {
                name.replace("_", "-"): value for name, value in headers.items()
            }
            connection.request(method, path, None if body is None else json.dumps(body), given)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(60)
        return code


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Process]:
    with subprocess.Popen(
        [*SERVE, "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=os.environ | environment,
    ) as process:
        running = Process(process)
        try:
            yield running
        finally:
            process.kill()
            process.wait()
            running._reader.join()
