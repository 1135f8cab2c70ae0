"""The socket that a server listens on."""

from __future__ import annotations

import os
import socket

from ..errors import InputError

__all__ = ["listen", "url_of"]

_WAITING = 512  # connections that the system holds until they are accepted


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `port`, 0 for any that is free. Raises InputError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_WAITING)
    except (OSError, UnicodeError, OverflowError) as error:
        known = isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno
        reason = os.strerror(known) if known else getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {url_of(host, port)}: {reason}") from None
    # Otherwise a small piece of a reply waits until the client has confirmed the one before, for 40 ms as a rule.
    # asyncio says so for sockets that it makes itself; accepted ones inherit it.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url_of(host: str, port: int) -> str:
    """The address as people write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
