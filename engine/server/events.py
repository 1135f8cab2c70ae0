"""Server-sent events: replies as they are written, for the protocols that end a stream with `data: [DONE]`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..reply import Chunk
from .failures import Failure

__all__ = ["EventStream"]

_Chunks = AsyncGenerator[Chunk, None]
_Write = Callable[[Chunk], Iterable[dict[str, Any]]]
_WriteFailure = Callable[[Failure], dict[str, Any]]

_DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """The answer that sends each piece of a reply as an event.

    The reply is cancelled when the answer ends early. Whether the client is still there, the service watches.
    """

    def __init__(self, chunks: _Chunks, write: _Write, write_failure: _WriteFailure):
        """`write` gives the events of a piece, `write_failure` the event that says why nothing more comes."""
        super().__init__(_events(chunks, write, write_failure), media_type="text/event-stream")
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await self.stream_response(send)


async def _events(chunks: _Chunks, write: _Write, write_failure: _WriteFailure) -> AsyncGenerator[str, None]:
    try:
        async for chunk in chunks:
            for event in write(chunk):
                yield _event(event)
    except Failure as failure:
        yield _event(write_failure(failure))
        return
    yield _DONE


def _event(data: dict[str, Any]) -> str:
    # In ASCII: some clients take U+2028 for the end of a line.
    return f"data: {json.dumps(data, allow_nan=False, separators=(',', ':'))}\n\n"
