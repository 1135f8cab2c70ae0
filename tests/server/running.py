"""A server that runs in a thread of the tests, on a free port of this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette

from siglance.engine import Engine
from siglance.engine.server.app import MakeProtocol, create_app
from siglance.engine.server.listening import listen
from siglance.engine.server.patience import patient
from siglance.engine.server.service import Model, Service
from siglance.engine.server.settings import Settings

__all__ = ["Answer", "Running", "serving"]


@dataclass(frozen=True)
class Answer:
    """What came back: `json()` of the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A server that takes requests."""

    host: str
    port: int
    service: Service
    app: Starlette
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the thread of the server."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(30)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        """A connection, for what no client would send."""
        return socket.create_connection((self.host, self.port), timeout=60)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One request: an object goes as JSON, bytes as they are. Names of headers have _ for -."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given.setdefault("content-type", "application/json")
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        lines = [line for desk in self.service._desks.values() for line in (desk.line, desk.counts)]
        return not any(line.running or line.waiting for line in lines)

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until the server is idle."""
        end = time.monotonic() + seconds
        while not self.idle():
            assert time.monotonic() < end, "requests are still running"
            time.sleep(0.002)


@contextmanager
def serving(
    engines: Engine | dict[str, Engine],
    settings: Settings | None = None,
    makers: Sequence[MakeProtocol] | None = None,
) -> Iterator[Running]:
    """A real server (uvicorn) around engines, which stay open. Stops at the end."""
    settings = settings or Settings()
    models = engines if isinstance(engines, dict) else {engines.manifest.name: engines}
    ready, made = threading.Event(), []

    class Server(uvicorn.Server):
        """Tells when it takes requests."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            made.extend((service, app, self, asyncio.get_running_loop()))
            ready.set()

    service = Service([Model(name, engine, 1_700_000_000) for name, engine in models.items()], settings)
    app = create_app(service, settings, makers)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=patient(settings.timeout),
        ws="none",
        timeout_graceful_shutdown=5,
    )
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=Server(config).run, args=([listening],), name="server")
        thread.start()
        try:
            assert ready.wait(30)
            yield Running("127.0.0.1", port, service, app, made[3])
        finally:
            if made:
                made[2].should_exit = True
            thread.join(30)
            service.close()
            assert not thread.is_alive()
