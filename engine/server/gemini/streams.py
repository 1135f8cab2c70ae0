"""Replies in pieces on their way out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["array", "events", "stream"]


Pieces = AsyncGenerator[dict[str, Any], None]


async def events(pieces: Pieces) -> AsyncGenerator[str, None]:
    """Server-sent events."""
    async with aclosing(pieces):
        async for piece in pieces:
            yield f"data: {_line(piece)}\r\n\r\n"


async def array(pieces: Pieces) -> AsyncGenerator[str, None]:
    """One JSON array, an item as soon as it is there."""
    async with aclosing(pieces):
        before = "["
        async for piece in pieces:
            yield before + _line(piece)
            before = ",\r\n"
        yield "]" if before != "[" else "[]"


def _line(piece: dict[str, Any]) -> str:
    # In ASCII: readers that cut a stream into lines may take other characters than line feeds for their ends.
    return json.dumps(piece, separators=(",", ":"))


def stream(text: AsyncGenerator[str, None], media_type: str) -> Response:
    """An answer that is sent piece by piece."""
    return _Stream(text, media_type)


class _Stream(StreamingResponse):
    """Closes its source, whatever ends it. The service watches whether the client is there, so nothing else does."""

    def __init__(self, text: AsyncGenerator[str, None], media_type: str):
        super().__init__(text, media_type=media_type)
        self._text = text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._text):
            await self.stream_response(send)
