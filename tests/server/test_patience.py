"""Clients that are silent, slow or do not read are not waited for without end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from time import perf_counter

import pytest
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from siglance.engine.server.failures import Failure
from siglance.engine.server.gate import Gate
from siglance.engine.server.metrics import Metrics
from siglance.engine.server.patience import LEAST_RATE
from siglance.engine.server.protocol import Protocol
from siglance.engine.server.settings import Settings

from .running import Running, serving
from .toy import toy, write_failure

SOON = 0.05
HEAD = b"POST /toy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty(demo) -> Iterator[Running]:
    with serving(demo, Settings(timeout=SOON), [toy]) as running:
        yield running


def rest(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.mark.parametrize("said", [b"", b"GET /hea", HEAD, HEAD + b"X-More: 1\r\n"])
def test_half_a_head_is_not_waited_for(hasty, said):
    with hasty.connect() as connection:
        connection.sendall(said)
        assert rest(connection) == b""


def test_half_a_head_behind_a_request_is_not_waited_for_either(hasty):
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert rest(connection).count(b"HTTP/1.1") == 0


def test_half_a_body_is_a_timeout(hasty):
    with hasty.connect() as connection:
        connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"text"')
        head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    assert json.loads(body) == {
        "toy": "the body has not arrived within 0.05 seconds",
        "kind": "timeout",
        "field": None,
    }


def test_a_body_that_nobody_wants_any_more_ends_the_connection(hasty):
    """The answer is there before the body, which never ends."""
    with hasty.connect() as connection:
        connection.sendall(HEAD.replace(b"application/json", b"text/plain") + b"Content-Length: 100\r\n\r\n{")
        assert rest(connection).startswith(b"HTTP/1.1 415")


def test_who_answers_takes_as_long_as_needed(demo):
    """Only clients are timed, and only until their request is there."""
    go_on = threading.Event()

    async def slow(http: HttpRequest) -> Response:
        await http.body()
        await asyncio.to_thread(go_on.wait, 30)
        return Response("late")

    def make(service, settings, access) -> Protocol:
        return Protocol(
            name="slow",
            routes=[Route("/slow", slow, methods=["POST"])],
            owns=lambda path: False,
            write_failure=write_failure,
            openapi={},
        )

    with serving(demo, Settings(timeout=SOON), [make]) as server, server.connect() as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
        with server.connect() as silent:
            assert rest(silent) == b""  # whose time is over meanwhile
        go_on.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_left(demo):
    """A stream that its client does not take is cancelled."""
    ended = threading.Event()

    async def endless(http: HttpRequest) -> Response:
        async def pieces():
            try:
                while True:
                    yield b"x" * 65536
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(pieces())

    def make(service, settings, access) -> Protocol:
        return Protocol(
            name="endless",
            routes=[Route("/endless", endless)],
            owns=lambda path: False,
            write_failure=write_failure,
            openapi={},
        )

    with serving(demo, Settings(timeout=SOON), [make]) as server, server.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(30)


def test_a_long_body_has_more_time():
    """A second for each `LEAST_RATE` bytes that are there."""
    gate = Gate(lambda *_: None, [], Settings(timeout=0.0), Metrics())  # pyright: ignore

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request"}

    asyncio.run(gate._in_time(receive, perf_counter(), LEAST_RATE * 30))
    with pytest.raises(Failure, match="has not arrived"):
        asyncio.run(gate._in_time(receive, perf_counter(), 0))
