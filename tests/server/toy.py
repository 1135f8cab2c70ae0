"""The smallest protocol: a text goes in, a text comes out. And engines that stop where a test wants them to."""

from __future__ import annotations

import base64
import copy
import threading
from collections.abc import AsyncGenerator

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from siglance.engine import Engine, Image, Sampling, Text, Turn
from siglance.engine.runtime import Runtime
from siglance.engine.server.access import Access
from siglance.engine.server.bodies import Fields, read_object
from siglance.engine.server.failures import Failure
from siglance.engine.server.protocol import Protocol
from siglance.engine.server.request import Request
from siglance.engine.server.service import Service
from siglance.engine.server.settings import Settings

__all__ = ["Gate", "as_base64", "gated", "toy"]


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_failure(failure: Failure) -> Response:
    return JSONResponse({"toy": failure.message, "kind": failure.kind, "field": failure.field}, failure.status)


def toy(service: Service, settings: Settings, access: Access) -> Protocol:
    """POST /toy with {"text", "image", "model", "stream", "count", "max_tokens", "seed", "fail"}."""

    async def ask(http: HttpRequest) -> Response:
        body = Fields(await read_object(http, settings))
        text, image, fail = body.text("text"), body.text("image"), body.text("fail")
        stream, count = body.flag("stream"), body.flag("count")
        model = service.model(body.text("model") or "default")
        seed, most = body.integer("seed", 0), body.integer("max_tokens", 1) or 20
        body.finish()
        if fail is not None:
            raise ValueError(fail)
        parts = [] if image is None else [Image(access.base64(image, "image"))]
        request = Request(
            conversation=(Turn("user", [*parts, Text(text or "")]),),
            max_tokens=most,
            sampling=None if seed is None else Sampling(temperature=1.0, seed=seed),
        )
        if count:
            return JSONResponse(await service.count_tokens(model, request, http))
        if stream:
            chunks = await service.begin(model, request, http)
            return StreamingResponse(lines(chunks), media_type="text/plain")
        reply = await service.generate(model, request, http)
        return JSONResponse({"text": reply.text, "cached": reply.usage.cached_tokens})

    async def lines(chunks: AsyncGenerator) -> AsyncGenerator[str, None]:
        async for chunk in chunks:
            yield chunk.text + "\n"

    return Protocol(
        name="toy",
        routes=[Route("/toy", ask, methods=["POST"]), Route("/toy/{rest}", ask, methods=["POST"])],
        owns=lambda path: path.startswith("/toy"),
        write_failure=write_failure,
        openapi={"/toy": {"post": {"operationId": "toy", "responses": {"200": {"description": "A text."}}}}},
        schemas={"Toy": {"type": "object"}},
    )


class Gate:
    """Lets runs of the graphs through one by one: `runs` counts those that have begun, `free` lets all others go on."""

    def __init__(self):
        self.runs = 0
        self._waiting = threading.Semaphore(0)
        self._begun = threading.Condition()
        self._free = False

    def passing(self) -> None:
        """Called by the engine before each run."""
        with self._begun:
            self.runs += 1
            self._begun.notify_all()
        if not self._free:
            assert self._waiting.acquire(timeout=30)

    def open(self, runs: int = 1) -> None:
        """Let so many runs go on."""
        self._waiting.release(runs)

    def free(self) -> None:
        """Let everything go on."""
        self._free = True
        self._waiting.release(1000)

    def begun(self, runs: int) -> None:
        """Wait until so many runs have begun."""
        with self._begun:
            assert self._begun.wait_for(lambda: self.runs >= runs, timeout=30)


def gated(engine: Engine, gate: Gate) -> Engine:
    """A copy of an engine, with caches and lock of its own, each run of whose tower and decoder passes the gate."""
    double = copy.copy(engine)
    double._turn = threading.Lock()
    double._reuse = engine._reuse.off()
    runtime: Runtime = copy.copy(engine.runtime)
    runtime.decoder = copy.copy(runtime.decoder)
    run = runtime.decoder.run_bound

    def passing(binding) -> None:
        gate.passing()
        run(binding)

    encode = runtime.encode

    def encoding(*arguments):
        gate.passing()
        return encode(*arguments)

    runtime.decoder.run_bound = passing  # pyright: ignore[reportAttributeAccessIssue]
    runtime.encode = encoding
    double._runtime = runtime
    return double
