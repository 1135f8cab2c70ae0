"""Replies as they are written, piece by piece: server-sent events, or whatever else a protocol puts around pieces."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..reply import Chunk
from .failures import Failure

__all__ = ["EVENTS", "Framing", "PieceStream"]

_Chunks = AsyncGenerator[Chunk, None]
_Write = Callable[[Chunk], Iterable[dict[str, Any]]]
_WriteFailure = Callable[[Failure], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What stands around the pieces.

    Attributes:
        media_type: of the whole.
        opening, closing: before the first piece, of which there is one always, and behind the last one, also where that
            is a failure.
        before, between, after: around each piece, and between two.
        done: behind the last piece of a reply that is whole.
    """

    media_type: str
    opening: str = ""
    closing: str = ""
    before: str = ""
    between: str = ""
    after: str = ""
    done: str = ""


EVENTS = Framing(media_type="text/event-stream", before="data: ", after="\n\n", done="data: [DONE]\n\n")
"""Server-sent events that end with [DONE]."""


class PieceStream(StreamingResponse):
    """The answer that sends the pieces of a reply.

    The reply is cancelled when the answer ends early. Whether the client is still there, the service watches.
    """

    def __init__(self, chunks: _Chunks, write: _Write, write_failure: _WriteFailure, framing: Framing = EVENTS):
        """`write` gives the pieces of a chunk, `write_failure` the piece that says why nothing more comes."""
        # Proxies such as nginx keep answers back until they are whole, unless they are told not to.
        headers = {"x-accel-buffering": "no"}
        super().__init__(_texts(chunks, write, write_failure, framing), headers=headers, media_type=framing.media_type)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await self.stream_response(send)


async def _texts(
    chunks: _Chunks, write: _Write, write_failure: _WriteFailure, framing: Framing
) -> AsyncGenerator[str, None]:
    lead, tail = framing.opening, framing.done + framing.closing
    try:
        async for chunk in chunks:
            for piece in write(chunk):
                yield f"{lead}{framing.before}{_line(piece)}{framing.after}"
                lead = framing.between
    except Failure as failure:
        tail = framing.closing
        if failure.kind != "gone":
            yield f"{lead}{framing.before}{_line(write_failure(failure))}{framing.after}"
    if tail:
        yield tail


def _line(piece: dict[str, Any]) -> str:
    # In ASCII: readers that cut a stream into lines may take other characters than line feeds for their ends, U+2028.
    return json.dumps(piece, allow_nan=False, separators=(",", ":"))
