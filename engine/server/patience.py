"""Connections of clients that are silent, slow or do not read: they are closed after a while.

Each holds a descriptor, and there are only so many. A client has `timeout` seconds to send the head of a request, and
as long for its body and a second more for each `LEAST_RATE` bytes of it; it must take what is sent to it in time, too.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["LEAST_RATE", "patient"]

LEAST_RATE = 1000
"""Bytes of a body in a second, at least, once the timeout is over."""


def patient(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol of HTTP with patience for `timeout` seconds at a time. Bodies are timed by the gate."""
    return cast(type[asyncio.Protocol], type("Patient", (_Patient,), {"timeout": timeout}))


class _Patient(H11Protocol):
    timeout: float

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._unasked: asyncio.TimerHandle | None = None
        self._untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unasked, self._untaken = _stopped(self._unasked), _stopped(self._untaken)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        # What is waiting to be sent would keep a connection open that is closed in order.
        self._untaken = self.loop.call_later(self.timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._untaken = _stopped(self._untaken)

    def _watch(self) -> None:
        """Time the client while no request of its own is being answered: before its head is whole, and when it goes on
        sending a body that nobody wants. After an answer, until its next word, uvicorn does."""
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._unasked = _stopped(self._unasked)
        elif self._unasked is None and not self.transport.is_closing():
            self._unasked = self.loop.call_later(self.timeout, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
