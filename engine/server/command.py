"""The body of `siglance serve`: opens bundles, listens, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from ..engine import Engine
from ..errors import InputError
from ..limits import read_limits
from .app import create_app
from .gate import is_loopback
from .listening import listen, url_of
from .patience import patient
from .service import Model, Service
from .settings import Settings

__all__ = ["serve", "settings_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SWITCH = 0.001  # seconds that the event loop waits until a thread that computes in Python makes way
_FINISH = 10  # seconds that running requests have to end when the server stops


def serve(bundles: Sequence[str], settings: Settings, *, device: str, feature_cache: Path | None = None) -> None:
    """Serve `bundles`, the first of which is the default one, until SIGINT or SIGTERM.

    Then nobody is let in any more, and what runs has ten seconds to end. Raises SiglanceError if the server cannot
    start.
    """
    sys.setswitchinterval(_SWITCH)
    with ExitStack() as opened:
        listening = opened.enter_context(listen(settings.host, settings.port))
        models = _open(opened, bundles, settings, device, feature_cache)
        service = Service(models, settings)
        opened.callback(service.close)
        config = uvicorn.Config(
            create_app(service, settings),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            proxy_headers=False,
            http=patient(settings.timeout),
            ws="none",
            timeout_graceful_shutdown=_FINISH,
        )
        where = url_of(settings.host, listening.getsockname()[1])
        server = _Server(config, service, f"serving {', '.join(model.name for model in models)} on {where}")
        opened.enter_context(_signals(server))
        _set_up_log()
        if not settings.api_keys and not is_loopback(settings.host):
            _note(f"warning: whoever can reach {settings.host} may use this server; --api-key sets a key")
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it is there, and sends away who waits as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str):
        super().__init__(config)
        self._service = service
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _note(self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        await asyncio.sleep(0)
        await super().shutdown(sockets)


def settings_of(
    host: str,
    port: int,
    queue: int,
    api_keys: Sequence[str] | None,
    allow_dirs: Sequence[Path] | None,
    allow_hosts: Sequence[str] | None,
    limits: Sequence[str] | None,
    log_prompts: bool,
    timeout: float,
) -> Settings:
    """Settings from options of the command line. Raises InputError."""
    read = read_limits(limits or ())
    if not 0 < timeout < threading.TIMEOUT_MAX:
        raise InputError(f"--timeout {timeout}: expected a number of seconds")
    for number, key in enumerate(api_keys or (), 1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"API key {number} is empty or has other characters than letters, digits and signs")
    return Settings(
        host=host,
        port=port,
        queue=queue,
        api_keys=tuple(api_keys or ()),
        allow_dirs=tuple(allow_dirs or ()),
        allow_hosts=tuple(allow_hosts or ()),
        timeout=timeout,
        body_bytes=read.max_bytes * 3 // 2,  # base64 makes a third more of it
        limits=read,
        log_prompts=log_prompts,
    )


def _open(
    opened: ExitStack, bundles: Sequence[str], settings: Settings, device: str, feature_cache: Path | None
) -> list[Model]:
    """The models of bundles of different names."""
    models: dict[str, Model] = {}
    for bundle in bundles:
        engine = opened.enter_context(
            Engine.open(bundle, device=device, limits=settings.limits, feature_cache_dir=feature_cache)
        )
        name = engine.manifest.name
        if not _NAME.fullmatch(name):
            raise InputError(f"the bundle {bundle} is called {name[:100]!r}, which cannot be part of a path")
        if name in models:
            raise InputError(f"two bundles are called {name!r}")
        models[name] = Model(name, engine, int(time.time()))
    return list(models.values())


def _set_up_log() -> None:
    """One line for each request and for what goes wrong, on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _note(text: str) -> None:
    print(f"siglance: {text}", file=sys.stderr, flush=True)


@contextmanager
def _signals(server: uvicorn.Server) -> Iterator[None]:
    """Let signals end the server and nothing else.

    uvicorn listens to them while it runs, and hands those that ended it on to whoever had them before.
    """

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
