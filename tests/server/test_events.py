"""Streams of OpenAI's protocol and NVIDIA's: clients that leave, and clients that come too many."""

from __future__ import annotations

import json
import socket

import openai
import pytest

from siglance.engine.server import nim
from siglance.engine.server import openai as protocol
from siglance.engine.server.service import PARALLEL
from siglance.engine.server.settings import Settings

from .openai_clients import COLUMNS, connected
from .running import Running, serving
from .test_server_core import until
from .toy import Gate, gated

SAID = {"messages": [{"role": "user", "content": "describe"}], "max_tokens": 100, "stream": True}
PATHS = {
    "openai": ("/v1/chat/completions", SAID | {"model": "default"}),
    "nim": ("/v1/vlm/google/paligemma", SAID | {"temperature": 1e-9}),
}


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def slow(demo, gate):
    """A server each run of whose decoder waits for the gate; one request may wait."""
    with serving({"one": gated(demo, gate)}, Settings(queue=1), makers=[protocol.protocol, nim.protocol]) as server:
        yield server
        gate.free()
        server.settle()


def begin(server: Running, name: str) -> socket.socket:
    """A stream that nobody reads yet."""
    path, fields = PATHS[name]
    body = json.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = server.connect()
    connection.sendall(f"{head}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("name", list(PATHS))
def test_a_client_that_leaves_a_stream(slow, gate, name):
    """At most the step that runs is finished."""
    connection = begin(slow, name)
    gate.open(3)
    received = b""
    while received.count(b"data: ") < 2:
        received += connection.recv(4096)
    gate.begun(4)
    connection.close()
    until(lambda: not slow.service._cancels)  # the server has seen it
    gate.open(10)
    slow.settle()
    assert gate.runs == 4


@pytest.mark.parametrize("name", list(PATHS))
def test_a_full_line(slow, gate, name):
    """The error has a status, the protocol's shape and the time to come back."""
    busy = [begin(slow, name) for _ in range(PARALLEL + 1)]
    gate.begun(1)
    [desk] = slow.service._desks.values()
    until(lambda: desk.line.waiting == 1)
    path, body = PATHS[name]
    answer = slow.post(path, body)
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    if name == "openai":
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        for column in COLUMNS:
            with connected(slow.url, column) as client, pytest.raises(openai.RateLimitError):
                client.stream(model="default")
    else:
        assert answer.json()["title"] == "Too Many Requests"
    gate.free()
    for connection in busy:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, body | {"max_tokens": 2}) for path, body in PATHS.values()),
        *(
            (f"/v1beta/models/demo:streamGenerateContent{query}", {"contents": {"parts": {"text": "count"}}})
            for query in ("", "?alt=sse")
        ),
    ],
)
def test_proxies_are_asked_not_to_keep_streams_back(server, path, body):
    answer = server.post(path, body)
    assert (answer.status, answer.headers["x-accel-buffering"]) == (200, "no")
