"""The program as a process: its streams, its exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import SiglanceError

__all__ = ["run_program"]


def run_program(app: Callable[[], object]) -> NoReturn:
    """Run a command line and end the process. What goes wrong is one line on stderr, and exit code 1."""
    _open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # what cannot be written shows here, and not when the interpreter shuts down
    except SiglanceError as error:
        _complain(error)
    except BrokenPipeError:  # the reader of our output has gone, which is its right
        _discard_output()
    except OSError as error:  # a full disk
        _discard_output()
        _complain(f"the output cannot be written: {error.strerror or error}" if error.filename is None else error)
    sys.exit(1)


def _open_streams() -> None:
    """Python has no stream where the caller has closed one; nothing is read there then, and nothing written."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Replies are in any language. Windows gives pipes and files the code page of a country, an old locale gives ASCII.
    if isinstance(sys.stdout, io.TextIOWrapper):
        if os.name == "nt" and not sys.stdout.isatty() and "PYTHONIOENCODING" not in os.environ:
            sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """What is still in buffers has nowhere to go, also at interpreter shutdown."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: object) -> None:
    print(f"siglance: {' '.join(str(error).split())}", file=sys.stderr)
