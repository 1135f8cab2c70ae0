"""What the person who starts the server decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..limits import DEFAULT_LIMITS, Limits

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of a server.

    Attributes:
        host: address or name to listen at.
        port: TCP port; 0 lets the system choose a free one.
        queue: requests of one model that may wait while others run; more are refused.
        api_keys: any of them opens the server; without one it is open to whoever can reach it.
        allow_dirs: folders whose files a request may name ("file:" URIs).
        allow_hosts: hosts that a request may name ("http:" and "https:" URIs): NAME or NAME:PORT.
        timeout: seconds that a client has for the head of a request, for its body (more for a long one), and to take
            what is sent to it.
        body_bytes: most bytes of a request's body.
        limits: of the pictures and documents in a request.
        log_prompts: whether the log holds what was asked and answered.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 64
    api_keys: tuple[str, ...] = ()
    allow_dirs: tuple[Path, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    timeout: float = 30.0
    body_bytes: int = 96 * 2**20  # one file at the limit of encoded bytes, in base64, and some text
    limits: Limits = DEFAULT_LIMITS
    log_prompts: bool = False
