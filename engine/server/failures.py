"""What goes wrong with a request, in no protocol's words yet.

Readers and the service raise `Failure`; each protocol writes it in its own shape.
"""

from __future__ import annotations

import traceback

from ..errors import Cancelled, ContextFull, InputError, SiglanceError
from .settings import Settings

__all__ = ["Failure", "failure_of", "gone", "trace_of"]


class Failure(Exception):
    """A request that ends in an error.

    Attributes:
        status: the HTTP status.
        message: one line for the caller: the part, the value and the limit. Never a trace, never a path of the server.
        field: the field of the body that is at fault, in the caller's own spelling ("contents[0].parts[1]"), or None.
        kind: a short name: "invalid", "context" (a prompt that does not fit), "unauthorized", "forbidden", "not_found",
            "method", "too_large", "busy", "unavailable", "timeout", "gone", "internal".
        retry_after: seconds after which the caller may try again, for "busy" and "unavailable".
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid",
        field: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.field = field
        self.retry_after = retry_after


def failure_of(error: Exception) -> Failure:
    """What the caller is told about an error of the engine: what is wrong with the input, and nothing of the rest."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, ContextFull):
        return Failure(400, str(error), kind="context")
    if isinstance(error, InputError):
        return Failure(400, str(error))
    if isinstance(error, Cancelled):  # by the server: a client that has left is told nothing
        return Failure(503, "the server is shutting down", kind="unavailable", retry_after=5)
    if isinstance(error, SiglanceError):
        return Failure(500, str(error), kind="internal")
    return Failure(500, "the server failed; its log says why", kind="internal")


def gone() -> Failure:
    """For a client that did not wait for the answer; nobody reads this."""
    return Failure(499, "the client has closed the connection", kind="gone")


def trace_of(error: BaseException, settings: Settings) -> str:
    """Where an error that nobody expected came from, for the log: its text may repeat a prompt."""
    places = " < ".join(
        f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(traceback.extract_tb(error.__traceback__))
    )
    text = f": {error}" if settings.log_prompts else ""
    return f"{type(error).__name__}{text} at {places}"
