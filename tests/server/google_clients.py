"""Google's own client in four forms: the Gemini API and Vertex AI, each synchronous and asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from google import genai
from google.genai import types

__all__ = ["COLUMNS", "Client", "connected"]

COLUMNS = ("gemini", "gemini_async", "vertex", "vertex_async")


class Client:
    """One form of the client. Methods return what the client's own do; streams are read to their end."""

    def __init__(self, url: str, column: str):
        self.vertex = column.startswith("vertex")
        self._loop = asyncio.Runner() if column.endswith("async") else None
        # A key in place of Google's credentials: with it the client asks nobody else.
        place = {"vertexai": True, "project": "a-project", "location": "here"} if self.vertex else {}
        self.client = genai.Client(api_key="any", http_options=types.HttpOptions(base_url=url), **place)

    def generate(self, contents: Any, model: str = "demo", **config: Any) -> types.GenerateContentResponse:
        arguments = {"model": model, "contents": contents, "config": types.GenerateContentConfig(**config)}
        if self._loop is None:
            return self.client.models.generate_content(**arguments)
        return self._loop.run(self.client.aio.models.generate_content(**arguments))

    def stream(self, contents: Any, model: str = "demo", **config: Any) -> list[types.GenerateContentResponse]:
        arguments = {"model": model, "contents": contents, "config": types.GenerateContentConfig(**config)}
        if self._loop is None:
            return list(self.client.models.generate_content_stream(**arguments))

        async def collect() -> list[types.GenerateContentResponse]:
            return [chunk async for chunk in await self.client.aio.models.generate_content_stream(**arguments)]

        return self._loop.run(collect())

    def call(self, method: str, **arguments: Any) -> Any:
        """`client.models.METHOD`."""
        if self._loop is None:
            return getattr(self.client.models, method)(**arguments)
        return self._loop.run(getattr(self.client.aio.models, method)(**arguments))

    def names(self, size: int) -> list[str]:
        """Names of all models, listed in pages of `size`."""
        if self._loop is None:
            return [model.name for model in self.client.models.list(config={"page_size": size})]

        async def collect() -> list[str]:
            return [model.name async for model in await self.client.aio.models.list(config={"page_size": size})]

        return self._loop.run(collect())

    def chat(self, *messages: Any, model: str = "demo", streamed: bool = False, **config: Any) -> tuple[list[str], Any]:
        """The replies to several messages of one chat, and its history."""
        arguments = {"model": model, "config": types.GenerateContentConfig(**config)}
        if self._loop is None:
            chat = self.client.chats.create(**arguments)
            send = chat.send_message_stream if streamed else lambda message: [chat.send_message(message)]
            texts = ["".join(chunk.text or "" for chunk in send(message)) for message in messages]
            return texts, chat.get_history(curated=True)

        async def talk() -> tuple[list[str], Any]:
            chat = self.client.aio.chats.create(**arguments)
            texts = []
            for message in messages:
                if streamed:
                    chunks = [chunk async for chunk in await chat.send_message_stream(message)]
                else:
                    chunks = [await chat.send_message(message)]
                texts.append("".join(chunk.text or "" for chunk in chunks))
            return texts, chat.get_history(curated=True)

        return self._loop.run(talk())

    def close(self) -> None:
        if self._loop is not None:
            self._loop.run(self.client.aio.aclose())
            self._loop.close()
        self.client.close()


@contextmanager
def connected(url: str, column: str) -> Iterator[Client]:
    """A client of a server."""
    client = Client(url, column)
    try:
        yield client
    finally:
        client.close()
