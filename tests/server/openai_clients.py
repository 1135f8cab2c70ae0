"""OpenAI's own client in two forms, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion

__all__ = ["COLUMNS", "Client", "connected", "joined"]

COLUMNS = ("openai", "openai_async")


class Client:
    """One form of the client. Methods return what the client's own do; streams are read to their end."""

    def __init__(self, url: str, column: str, key: str = "any"):
        self._loop = asyncio.Runner() if column.endswith("async") else None
        form = openai.OpenAI if self._loop is None else openai.AsyncOpenAI
        self.client = form(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def _run(self, result: Any) -> Any:
        return result if self._loop is None else self._loop.run(result)

    def complete(self, messages: Any = "describe", model: str = "demo", **options: Any) -> ChatCompletion:
        return self._run(
            self.client.chat.completions.create(model=model, messages=as_messages(messages), **options)  # type: ignore
        )

    def parse(self, messages: Any = "describe", model: str = "demo", **options: Any) -> ParsedChatCompletion:
        return self._run(self.client.chat.completions.parse(model=model, messages=as_messages(messages), **options))

    def stream(self, messages: Any = "describe", model: str = "demo", **options: Any) -> list[ChatCompletionChunk]:
        arguments = {"model": model, "messages": as_messages(messages), "stream": True, **options}
        if self._loop is None:
            return list(self.client.chat.completions.create(**arguments))

        async def collect() -> list[ChatCompletionChunk]:
            return [chunk async for chunk in await self.client.chat.completions.create(**arguments)]

        return self._loop.run(collect())

    def put_together(self, messages: Any = "describe", model: str = "demo", **options: Any) -> ParsedChatCompletion:
        """What the client makes of a stream by itself."""
        arguments = {"model": model, "messages": as_messages(messages), **options}
        if self._loop is None:
            with self.client.chat.completions.stream(**arguments) as stream:
                return stream.get_final_completion()

        async def collect() -> ParsedChatCompletion:
            async with self.client.chat.completions.stream(**arguments) as stream:
                return await stream.get_final_completion()

        return self._loop.run(collect())

    def models(self) -> list[Model]:
        if self._loop is None:
            return list(self.client.models.list())

        async def collect() -> list[Model]:
            return [model async for model in self.client.models.list()]

        return self._loop.run(collect())

    def model(self, name: str) -> Model:
        return self._run(self.client.models.retrieve(name))

    def close(self) -> None:
        self._run(self.client.close())
        if self._loop is not None:
            self._loop.close()


@contextmanager
def connected(url: str, column: str, key: str = "any") -> Iterator[Client]:
    client = Client(url, column, key)
    try:
        yield client
    finally:
        client.close()


def as_messages(messages: Any) -> list[Any]:
    """Text and parts are what a user says."""
    if isinstance(messages, str) or (messages and "role" not in messages[0]):
        return [{"role": "user", "content": messages}]
    return messages


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    """The text of one choice."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)
