"""Functions of the exporter that run in a process of their own, so that their memory is gone afterwards.

A new interpreter is started instead of a `multiprocessing` worker: a worker imports the caller's main module again, so
that an export from a script without a main guard would start over in it. Arguments and results travel as JSON.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..engine.errors import ExportError, SiglanceError

__all__ = ["call", "in_child"]


def in_child(function: Callable[..., Any], *arguments: Any, progress: Callable[[str], None] | None = None) -> Any:
    """Call `function`, a name of a module of this package, with JSON values, and return its result.

    With `progress`, the function is given another argument: what it calls with the name of a stage is called here.
    Raises ExportError with the message of an error there, or when the process was killed.
    """
    request = {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": arguments,
        "progress": progress is not None,
    }
    command = [sys.executable, "-P", "-m", __name__]
    reply: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as remarks,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=remarks) as process,
    ):
        try:
            _send(process, json.dumps(request).encode())
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith(b"\n"):  # else it was killed in the middle of one
                    reply = json.loads(line)
                if progress is not None and "stage" in reply:
                    progress(reply["stage"])
            process.wait()
        except BaseException:
            process.kill()
            raise
        remarks.seek(0)
        last = remarks.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode == -signal.SIGKILL:
        raise ExportError(f"{function.__name__} was killed; is there enough memory?")
    if process.returncode:
        raise ExportError(f"{function.__name__} failed: {(last or [f'exit status {process.returncode}'])[0]}")
    if "error" in reply:
        raise ExportError(reply["error"])
    return reply["result"]


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it ended at once: its exit status says more
        process.stdin.write(request)
        process.stdin.close()


def _report(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def _serve() -> None:
    """One call: the request on standard input; stages, each on a line, and the reply on standard output."""
    request = json.load(sys.stdin)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    arguments = [*request["arguments"], *([_report] if request["progress"] else [])]
    print(json.dumps(call(function, *arguments)))


def call(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `function` returns, as "result", or the message of what it raises on purpose, as "error"."""
    try:
        return {"result": function(*arguments)}
    except ExportError as error:
        return {"error": str(error)}
    except SiglanceError as error:
        return {"error": f"the exported bundle does not run: {error}"}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    _serve()
