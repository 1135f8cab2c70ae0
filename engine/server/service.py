"""The engines behind the protocols: requests wait in line, and run beside the event loop until their client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from starlette.requests import Request as HttpRequest

from ..bundle import Bundle
from ..engine import Engine
from ..interruption import Interruption
from ..reply import Chunk, Reply
from .failures import Failure, failure_of, gone, trace_of
from .line import Line
from .metrics import Metrics
from .request import Request
from .settings import Settings

__all__ = ["DEFAULT_MODEL", "Model", "Service", "client_of"]

DEFAULT_MODEL = "default"
"""The name by which the first bundle is known too."""

# Requests of one model that take turns, step by step. With one alone the processor waits while Python picks a token
# (with the demo that halves the throughput); with more the first token comes sooner and the last one later, and each
# has a state in memory.
PARALLEL = 2
_COUNTS = 2  # prompts of one model that are counted at once

_Tell = Callable[[Any], None]

_log = logging.getLogger("siglance.server")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle that is served: its name, its engine, and when it was opened, in seconds since 1970."""

    name: str
    engine: Engine
    created: int


class _Weights:
    """Notices that a file of weights was written over.

    Engines map it into memory, so they would go on with other weights or none: what was cut off from the file would end
    the process when it is read (SIGBUS). That still happens to a run that reads while it is cut: only a copy in memory
    would prevent it, of the size of the file. A bundle whose folder was replaced by another one, as export does it, is
    served as it was.
    """

    def __init__(self, bundle: Bundle):
        self._path = bundle.path("weights") if "weights" in bundle.manifest.files else None
        self._found = self._look()

    def check(self) -> None:
        """Raise Failure(503) if it was."""
        now = self._look()
        if now is not None and self._found is not None and now[0] == self._found[0] and now != self._found:
            raise Failure(
                503, "the bundle was written over while it is served: start the server again", kind="unavailable"
            )

    def _look(self) -> tuple[tuple[int, int], int, int] | None:
        """Which file it is, its size and when it was last written to."""
        try:
            facts = os.stat(self._path) if self._path is not None else None
        except OSError:
            return None
        return facts and ((facts.st_dev, facts.st_ino), facts.st_size, facts.st_mtime_ns)


class _Desk:
    """The lines in front of one model, and the threads that its requests run in."""

    def __init__(self, name: str, engine: Engine, settings: Settings):
        self.name = name
        self.weights = _Weights(engine.bundle)
        self.line = Line(PARALLEL, settings.queue)
        self.counts = Line(_COUNTS, settings.queue)
        self.threads = ThreadPoolExecutor(PARALLEL + _COUNTS, f"siglance-{name}")

    def drain(self) -> None:
        self.line.close()
        self.counts.close()


class Service:
    """What the protocols ask. Belongs to one event loop."""

    def __init__(self, models: Sequence[Model], settings: Settings, metrics: Metrics | None = None):
        """Serve `models`; the first is the default one. Engines are closed by whoever opened them."""
        self.models = tuple(models)
        self.settings = settings
        self.metrics = metrics or Metrics()
        self._by_name = {DEFAULT_MODEL: self.models[0]} | {model.name: model for model in self.models}
        self._desks = {model.name: _Desk(model.name, model.engine, settings) for model in self.models}
        self._cancels: set[Interruption] = set()
        desks = self._desks.items()
        self.metrics.watch(
            "siglance_queue_length", "Requests that wait.", lambda: {name: desk.line.waiting for name, desk in desks}
        )
        self.metrics.watch(
            "siglance_running", "Requests that run.", lambda: {name: desk.line.running for name, desk in desks}
        )
        for name, read in (("hits", lambda cache: cache.hits), ("misses", lambda cache: cache.misses)):
            self.metrics.watch(
                f"siglance_feature_cache_{name}",
                "Pictures and sounds that were looked for among those seen before.",
                lambda read=read: {model.name: read(model.engine.features) for model in self.models},
                counter=True,
            )

    def model(self, name: str) -> Model:
        """The model of this name, or the first one for "default". Raises Failure(404)."""
        model = self._by_name.get(name)
        if model is None:
            raise Failure(404, f"there is no model {name[:100]!r}", kind="not_found")
        return model

    async def generate(self, model: Model, request: Request, http: HttpRequest) -> Reply:
        """The whole reply. Raises Failure; the work stops when the client leaves."""
        reply: Reply | None = None
        async with aclosing(self._chunks(model, request, http)) as chunks:
            async for chunk in chunks:
                reply = chunk.reply
        assert reply is not None
        return reply

    async def begin(self, model: Model, request: Request, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        """The reply in pieces, of which the first is there when this returns; the last one has the whole `reply`.

        Raises Failure, so that an error before the first piece still has a status; later ones come out of the
        generator. The work stops when the generator is closed, or when the client leaves.
        """
        chunks = self._chunks(model, request, http)
        first = await anext(chunks)
        return _joined(first, chunks)

    async def count_tokens(self, model: Model, request: Request, http: HttpRequest) -> dict[str, int]:
        """`Engine.count_tokens` of a request. Raises Failure."""
        desk = self._desks[model.name]

        def count(tell: _Tell) -> None:
            tell(model.engine.count_tokens(**request.prompt_arguments()))

        async with aclosing(self._results(desk, desk.counts, http, count, Interruption())) as results:
            async for counts in results:
                return counts
        raise AssertionError("a count gives one result")

    def drain(self) -> None:
        """Let nobody in any more and send away who waits; what runs goes on."""
        for desk in self._desks.values():
            desk.drain()

    def close(self) -> None:
        """Stop what runs too, in the middle of a run of a graph. Returns when the threads have ended."""
        for cancel in list(self._cancels):
            cancel.set()
        for desk in self._desks.values():
            desk.threads.shutdown()

    async def _chunks(self, model: Model, request: Request, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        """The pieces of a reply."""
        desk, arrived, first = self._desks[model.name], perf_counter(), True
        cancel = Interruption()
        if self.settings.log_prompts:
            _log.info("%s is asked: %s", model.name, request.spoken())

        def answer(tell: _Tell) -> None:
            desk.weights.check()
            with cancel.here():
                for chunk in model.engine.stream(**request.stream_arguments(), cancelled=cancel.is_set):
                    tell(chunk)

        async with aclosing(self._results(desk, desk.line, http, answer, cancel)) as results:
            async for chunk in results:
                if first:
                    self.metrics.first_token(model.name, perf_counter() - arrived)
                    first = False
                if chunk.reply is not None:
                    self.metrics.finished(model.name, chunk.reply)
                    if self.settings.log_prompts:
                        _log.info("%s answers: %r", model.name, [each.text for each in chunk.reply.candidates])
                    yield chunk
                    return
                yield chunk

    async def _results(
        self, desk: _Desk, line: Line, http: HttpRequest, work: Callable[[_Tell], None], cancel: Interruption
    ) -> AsyncGenerator[Any, None]:
        """What `work` tells, in a thread, when it is this client's turn. `cancel` is set when nobody waits for more."""
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[Any] = asyncio.Queue()
        watch, arrived = _Watch(http), perf_counter()
        self._cancels.add(cancel)
        try:
            place = await line.enter(client_of(http), watch.gone)
            self.metrics.waited.labels(desk.name).observe(perf_counter() - arrived)

            def leave() -> None:
                """Stop at once, whether or not somebody is there to take the news."""
                cancel.set()
                results.put_nowait(gone())

            watch.gone.add_done_callback(lambda _: leave())

            def run() -> None:
                try:
                    work(lambda result: _call(loop, results.put_nowait, result))
                except Exception as error:
                    _call(loop, results.put_nowait, self._failure(error))
                finally:
                    # The place is free when the thread is: that may be a step later than the end of the generator.
                    _call(loop, line.leave, place)

            desk.threads.submit(run)
            while True:
                result = await results.get()
                if isinstance(result, Failure):
                    raise result
                yield result
        finally:
            cancel.set()
            self._cancels.discard(cancel)
            watch.stop()

    def _failure(self, error: Exception) -> Failure:
        """The failure that an error of the engine is; one that is not the caller's is logged."""
        failure = failure_of(error)
        if failure.kind == "internal":
            _log.error("a request failed: %s", trace_of(error, self.settings))
        return failure


class _Watch:
    """Waits for a client to leave. The body of its request has been read."""

    def __init__(self, http: HttpRequest):
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._wait(http))

    async def _wait(self, http: HttpRequest) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        if not self.gone.done():
            self.gone.set_result(None)

    def stop(self) -> None:
        self._task.cancel()


async def _joined(first: Chunk, rest: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call a function in the thread of the loop, soon. Without effect when the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def client_of(http: HttpRequest) -> Hashable:
    """Who asks: the number of the key, or the address."""
    return http.scope.get("siglance.client") or (http.client.host if http.client else "")
