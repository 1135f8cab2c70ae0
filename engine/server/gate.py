"""What every request passes: keys, errors in the shape of its protocol, a line in the log, a count."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import urllib.parse
from collections.abc import Sequence
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Failure, failure_of, trace_of
from .metrics import Metrics
from .patience import LEAST_RATE
from .protocol import Protocol
from .settings import Settings

__all__ = ["Gate", "is_loopback", "respond"]

_OPEN = "/health"  # needs no key
_MOST_FIELDS = 100  # of a query that may have a key
_BODIES = 4  # of the largest size, held at a time
_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

_log = logging.getLogger("siglance.server")


class Gate:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, protocols: Sequence[Protocol], settings: Settings, metrics: Metrics):
        self._app = app
        self._protocols = protocols
        self._settings = settings
        self._metrics = metrics
        self._open = {_OPEN}.union(*(protocol.open_paths for protocol in protocols))
        self._keys = [_digest(key) for key in settings.api_keys]
        self._held, self._most_held = 0, _BODIES * settings.body_bytes  # bytes of bodies
        # Pages of the web can make a name of theirs stand for this machine, and a browser would take them for one
        # place. They cannot know a key.
        guard = is_loopback(settings.host) and not self._keys
        self._names = {settings.host.lower(), f"[{settings.host}]", *_LOCAL_NAMES} if guard else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = _path(scope["path"])
        begin, status, held, whole = perf_counter(), 0, 0, False

        async def take() -> Message:
            nonlocal held, whole
            message = await receive() if whole else await self._in_time(receive, begin, held)
            whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            held, self._held = held + size, self._held + size
            if self._held > self._most_held:
                raise Failure(503, "the server holds too many large requests", kind="busy", retry_after=5)
            return message

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, take, note)
        except Exception as error:
            failure = failure_of(error)
            if failure.kind == "internal":
                _log.error("a request failed: %s", trace_of(error, self._settings))
            if status:
                raise _Broken from None  # the answer has begun: its end must be seen to be missing
            await respond(self._protocols, scope["path"], failure)(scope, receive, note)
        finally:
            self._held -= held
            protocol = _owner(self._protocols, scope["path"])
            name = protocol.name if protocol else "server"
            self._metrics.requests.labels(name, str(status)).inc()
            # Without the query, which may have a key in it.
            client = scope["client"][0] if scope.get("client") else "-"
            took = 1e3 * (perf_counter() - begin)
            path = urllib.parse.quote(scope["path"][:200], safe="/:")
            _log.info("%s %s %s %d %.0f ms", client, scope["method"], path, status, took)

    async def _in_time(self, receive: Receive, begin: float, held: int) -> Message:
        """A further piece of a body of which so many bytes are there. Raises Failure for a client that takes too long
        over it."""
        left = begin + self._settings.timeout + held / LEAST_RATE - perf_counter()
        try:
            return await asyncio.wait_for(receive(), max(left, 0))
        except TimeoutError:
            problem = f"the body has not arrived within {self._settings.timeout:g} seconds"
            raise Failure(408, problem, kind="timeout") from None

    def _admit(self, scope: Scope) -> None:
        """Raise Failure unless the request may come in; remember whose it is."""
        headers = Headers(scope=scope)
        if self._names is not None:
            name = _without_port(headers.get("host", ""))
            if name not in self._names:
                raise Failure(403, f"this server is not called {name[:100]!r}", kind="forbidden")
        if not self._keys or scope["path"] in self._open:
            return
        number = self._number(_given_keys(headers, scope))
        if number is None:
            raise Failure(
                401,
                "a key is needed: Authorization: Bearer KEY, x-goog-api-key: KEY or ?key=KEY",
                kind="unauthorized",
            )
        scope["siglance.client"] = number

    def _number(self, given: Sequence[str]) -> int | None:
        """Which key it is. Each is compared with all, so that the time tells nothing."""
        found = None
        for key in map(_digest, given):
            for number, known in enumerate(self._keys, 1):
                if hmac.compare_digest(key, known):
                    found = number
        return found


class _Broken(Exception):
    """An answer that had begun could not be finished; the log says why."""


def respond(protocols: Sequence[Protocol], path: str, failure: Failure) -> Response:
    """A failure in the shape of the protocol whose path it is."""
    protocol = _owner(protocols, path)
    response = protocol.write_failure(failure) if protocol else _write_failure(failure)
    if failure.retry_after is not None:
        response.headers.setdefault("retry-after", str(failure.retry_after))
    if failure.status == 401:
        response.headers.setdefault("www-authenticate", "Bearer")
    if failure.status == 408:
        response.headers.setdefault("connection", "close")
    return response


def _owner(protocols: Sequence[Protocol], path: str) -> Protocol | None:
    return next((protocol for protocol in protocols if protocol.owns(path)), None)


def _write_failure(failure: Failure) -> Response:
    """A failure where no protocol has a shape for it."""
    return JSONResponse({"error": {"message": failure.message, "type": failure.kind}}, failure.status)


def is_loopback(host: str) -> bool:
    """Whether a server at this address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    """Of one length for keys of all lengths."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_keys(headers: Headers, scope: Scope) -> list[str]:
    kind, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip()] if kind.lower() == "bearer" else []
    given += headers.getlist("x-goog-api-key")
    query = scope["query_string"].decode("latin-1")
    if query.count("&") <= _MOST_FIELDS:
        given += urllib.parse.parse_qs(query).get("key", ())
    return [key for key in given if key]


def _path(target: str) -> str:
    """The path of a request, which proxies may write with the whole address in front."""
    scheme, _, rest = target.partition("://")
    return f"/{rest.partition('/')[2]}" if scheme.lower() in ("http", "https") else target


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and (port.isdecimal() or not port) else host).lower()
