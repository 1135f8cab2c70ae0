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
from collections.abc import Callable
from typing import Any

from ..engine.errors import ExportError, SiglanceError

__all__ = ["in_child"]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, a name of a module of this package, with JSON values, and return its result.

    Raises ExportError with the message of an error there, or when the process was killed.
    """
    request = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
    command = [sys.executable, "-P", "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, remarks = process.communicate(json.dumps(request).encode())
        except BaseException:
            process.kill()
            raise
    if process.returncode == -signal.SIGKILL:
        raise ExportError(f"{function.__name__} was killed; is there enough memory?")
    if process.returncode:
        last = remarks.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise ExportError(f"{function.__name__} failed: {last[0]}")
    reply = json.loads(output)
    if "error" in reply:
        raise ExportError(reply["error"])
    return reply["result"]


def _serve() -> None:
    """One call: the request on standard input, the reply on standard output."""
    request = json.load(sys.stdin)
    function = getattr(importlib.import_module(request["module"]), request["function"])
    try:
        reply = {"result": function(*request["arguments"])}
    except ExportError as error:
        reply = {"error": str(error)}
    except SiglanceError as error:
        reply = {"error": f"the exported bundle does not run: {error}"}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    _serve()
