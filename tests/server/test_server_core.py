"""The application around the protocols, by the smallest protocol there is: clients that leave, keys, errors."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from siglance.engine import Sampling, Text
from siglance.engine.errors import Cancelled, ModelOutputError
from siglance.engine.server.failures import Failure
from siglance.engine.server.service import PARALLEL, Model, Service
from siglance.engine.server.settings import Settings

from ..endless import ENDLESS, spinning, turns
from ..pdf_files import numbered_pages
from ..picture_files import encoded, png
from ..scripted import scripted
from .running import Running, serving
from .toy import Gate, as_base64, gated, toy


@pytest.fixture(scope="module")
def running(demo) -> Iterator[Running]:
    with serving(demo, makers=[toy]) as server:
        yield server


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def slow(demo, gate) -> Iterator[Running]:
    """A server each run of whose decoder waits for the gate."""
    with serving({"one": gated(demo, gate)}, Settings(queue=3), makers=[toy]) as server:
        yield server
        gate.free()
        server.settle()


def request_bytes(body: str, path: str = "/toy") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


def begin(server: Running, body: str = '{"text": "describe", "max_tokens": 100}') -> socket.socket:
    """A request whose answer nobody has read yet."""
    connection = server.connect()
    connection.sendall(request_bytes(body))
    return connection


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def line_of(server: Running):
    [desk] = server.service._desks.values()
    return desk.line


# --- answers


def test_a_reply_is_that_of_the_engine(running, demo):
    answer = running.post("/toy", {"text": "describe", "seed": 3})
    alone = demo.generate([Text("describe")], sampling=Sampling(temperature=1.0, seed=3), max_tokens=20)
    assert (answer.status, answer.json()["text"]) == (200, alone.text)
    pieces = running.post("/toy", {"text": "describe", "seed": 3, "stream": True})
    assert pieces.body.decode().replace("\n", "") == alone.text
    assert pieces.headers["transfer-encoding"] == "chunked"
    counts = running.post("/toy", {"text": "describe", "count": True})
    assert counts.json() == demo.count_tokens([Text("describe")])


def test_errors_before_the_first_piece_have_a_status(running):
    for stream in (False, True):
        answer = running.post("/toy", {"text": "", "stream": stream})
        assert (answer.status, answer.json()["kind"]) == (400, "invalid")
        assert "needs text or a medium" in answer.json()["toy"]


def test_models_have_names(running, demo):
    assert running.post("/toy", {"text": "a", "model": "demo"}).status == 200
    answer = running.post("/toy", {"text": "a", "model": "other" * 100})
    assert (answer.status, answer.json()["kind"]) == (404, "not_found")
    assert len(answer.json()["toy"]) < 150


def test_the_first_model_is_the_default(demo):
    one, other = Model("one", demo, 1), Model("other", demo, 2)
    service = Service([one, other], Settings())
    assert service.model("default") is service.model("one") is one
    assert service.model("other") is other
    named = Model("default", demo, 3)
    assert Service([one, named], Settings()).model("default") is named
    with pytest.raises(Failure, match="there is no model ''"):
        service.model("")


def test_health_and_the_document(running):
    assert running.get("/health").json() == {"status": "ok", "models": ["demo"]}
    document = running.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {"/health", "/metrics", "/toy"}
    assert "Toy" in document["components"]["schemas"]


def test_every_answer_has_the_headers_of_one(running):
    for answer in (running.get("/health"), running.post("/toy", {}), running.get("/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_paths_and_methods_that_are_none(running):
    for path, shape in (("/nothing", "error"), ("/toy/a/b", "toy"), ("//health", "error"), ("/toy%00/x/y", "toy")):
        answer = running.get(path)
        assert answer.status == 404, path
        assert shape in answer.json()
    answer = running.get("/toy")
    assert (answer.status, answer.json()["kind"], answer.headers["allow"]) == (405, "method", "POST")
    answer = running.ask("DELETE", "/health")
    assert (answer.status, answer.json()["error"]["type"]) == (405, "method")


def test_head_and_options(running):
    head = running.ask("HEAD", "/health")
    assert (head.status, head.body) == (200, b"")
    options = running.ask("OPTIONS", "/toy")
    assert (options.status, options.headers["allow"], options.body) == (204, "POST, OPTIONS", b"")
    assert running.ask("OPTIONS", "/nothing").status == 404


def metric(server: Running, name: str) -> float:
    lines = server.get("/metrics").body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_metrics(demo):
    with serving(demo, makers=[toy]) as server:
        assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=")
        picture = as_base64(encoded_picture(7))
        replies = [server.post("/toy", {"text": "describe", "image": picture}) for _ in range(2)]
        assert replies[0].json()["text"] == replies[1].json()["text"]
        server.post("/toy", {"text": 1})
        server.post("/toy", {"text": "a", "count": True})
        assert metric(server, 'siglance_requests_total{protocol="toy",status="200"}') == 3
        assert metric(server, 'siglance_requests_total{protocol="toy",status="400"}') == 1
        assert metric(server, "siglance_prompt_tokens_total{") > 20
        assert metric(server, 'siglance_prompt_tokens_total{modality="image",model="demo"}') > 0
        assert metric(server, "siglance_generated_tokens_total{") == 2 * len(
            demo._tokenizer.encode(replies[0].json()["text"], add_special_tokens=False).ids
        )
        assert metric(server, "siglance_cached_prompt_tokens_total{") == sum(
            reply.json()["cached"] for reply in replies
        )
        assert metric(server, "siglance_cached_prompt_tokens_total{") > 0
        assert metric(server, "siglance_time_to_first_token_seconds_count{") == 2
        assert metric(server, "siglance_time_per_token_seconds_count{") == 2
        assert metric(server, "siglance_queue_seconds_count{") == 3
        assert metric(server, "siglance_resident_memory_bytes ") > 10**7
        assert metric(server, "siglance_feature_cache_misses_total{") == demo.features.misses > 0
        assert metric(server, "siglance_feature_cache_hits_total{") == demo.features.hits
        assert metric(server, "siglance_queue_length{") == metric(server, "siglance_running{") == 0


def encoded_picture(seed: int, side: int = 60) -> bytes:
    import PIL.Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return encoded(PIL.Image.fromarray(pixels), "PNG")


# --- clients that leave


def test_a_client_that_leaves_while_the_model_runs(slow, gate):
    """Case 37: whether it waited for all or for a piece, one step more, and the place is free."""
    for body in ('{"text": "describe", "max_tokens": 100}', '{"text": "describe", "max_tokens": 100, "stream": true}'):
        gate.runs = 0
        connection = begin(slow, body)
        gate.begun(1)
        gate.open()
        gate.begun(2)  # the prompt has run, the first step waits
        connection.close()
        until(lambda: not slow.service._cancels)  # the server has seen it
        gate.open(10)
        slow.settle()
        assert gate.runs == 2
        while gate._waiting.acquire(blocking=False):
            pass


def test_a_client_that_leaves_after_some_pieces(slow, gate):
    connection = begin(slow, '{"text": "describe", "max_tokens": 100, "stream": true}')
    gate.open(3)
    received = b""
    while received.count(b"\n") < 10:  # the head and some pieces
        received += connection.recv(4096)
        assert received.startswith(b"HTTP/1.1 200")
    gate.begun(4)
    connection.close()
    until(lambda: not slow.service._cancels)
    gate.open(10)
    slow.settle()
    assert gate.runs == 4


def test_a_client_that_leaves_while_its_prompt_runs(demo, gate):
    """Case 37: between two chunks of a prompt, of which the second never runs."""
    with serving({"one": gated(demo, gate)}, makers=[toy]) as server:
        words = " ".join(["count the red circles"] * 100)
        connection = begin(server, f'{{"text": "{words}"}}')
        gate.begun(1)
        connection.close()
        until(lambda: not server.service._cancels)
        gate.free()
        server.settle()
        assert gate.runs == 1


@pytest.mark.parametrize("part", ["tower", "prompt"])
def test_a_client_that_leaves_in_the_middle_of_a_run(demo, gate, tmp_path, part):
    """Case 37: a run that would not end is ended, of the tower or of the decoder."""
    graph, begun = spinning(tmp_path), threading.Event()

    def endless(*arguments):
        begun.set()
        return graph.run(turns(ENDLESS))

    gate.free()
    engine = gated(demo, gate)
    place, name = (engine.runtime, "encode") if part == "tower" else (engine.runtime.decoder, "run_bound")
    setattr(place, name, endless)
    with serving({"one": engine}, makers=[toy]) as server:
        connection = begin(server, f'{{"text": "hi", "image": "{as_base64(png(8, 8, 8, 0, bytes(72)))}"}}')
        assert begun.wait(30)
        connection.close()
        server.settle()


def test_a_client_that_leaves_while_its_pages_are_looked_at(slow, gate):
    """Case 37: the second page is not looked at."""
    paper = as_base64(numbered_pages(3))
    connection = begin(slow, f'{{"text": "describe", "image": "{paper}"}}')
    gate.begun(1)
    connection.close()
    until(lambda: not slow.service._cancels)
    gate.free()
    slow.settle()
    assert gate.runs == 1


def test_clients_that_leave_while_they_wait(slow, gate):
    """Case 37: they are out of the line at once, and nothing of them ever runs."""
    inside = [begin(slow) for _ in range(PARALLEL)]
    gate.begun(1)
    until(lambda: line_of(slow).running == PARALLEL)
    outside = [begin(slow) for _ in range(3)]
    until(lambda: line_of(slow).waiting == 3)
    outside[1].close()
    until(lambda: line_of(slow).waiting == 2)
    outside[0].close()
    outside[2].close()
    until(lambda: line_of(slow).waiting == 0)
    for connection in inside:
        connection.close()
    until(lambda: not slow.service._cancels)
    gate.free()
    slow.settle()
    assert gate.runs <= PARALLEL


def test_a_request_after_one_that_was_left_begins_at_once(slow, gate):
    connection = begin(slow)
    gate.begun(1)
    connection.close()
    until(lambda: not slow.service._cancels)
    gate.free()
    assert slow.post("/toy", {"text": "describe"}).status == 200


# --- the engine's side of it


@pytest.mark.parametrize("asks", [1, 2, 3, 4, 6, 9])
def test_the_engine_stops_where_it_is_told_to(demo, asks):
    left = asks

    def cancelled() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    with pytest.raises(Cancelled):
        list(demo.stream([Text("describe " * 400)], max_tokens=40, cancelled=cancelled, cache=False))
    assert left == -1  # and is not asked again


def test_no_step_runs_after_a_cancellation(demo):
    double, runtime = scripted(demo, [20, 21, 22])
    stop = False
    stream = double.stream([Text("describe")], max_tokens=50, cancelled=lambda: stop)
    pieces = [next(stream) for _ in range(3)]
    steps = runtime.steps
    stop = True
    with pytest.raises(Cancelled):
        list(stream)
    assert pieces
    assert runtime.steps == steps


# --- full lines, fairness, the end


def test_a_full_line(slow, gate):
    busy = [begin(slow) for _ in range(PARALLEL + 3)]
    until(lambda: line_of(slow).waiting == 3)
    answer = slow.post("/toy", {"text": "describe"})
    assert (answer.status, answer.json()["kind"]) == (429, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert slow.get("/health").status == 200
    assert metric(slow, "siglance_queue_length{") == 3
    assert metric(slow, "siglance_running{") == PARALLEL
    gate.free()
    for connection in busy:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()


def test_keys_share_the_line(demo, gate):
    """A client with many requests and one with a single one: the single one is second."""
    settings = Settings(queue=10, api_keys=("first-key", "second-key"))
    with serving({"one": gated(demo, gate)}, settings, makers=[toy]) as server:
        order: list[int] = []
        enter = line_of(server).enter

        async def noting(client, gone):
            place = await enter(client, gone)
            order.append(client)
            return place

        line_of(server).enter = noting
        body = '{"text": "describe", "max_tokens": 1}'
        connections = []

        def ask(key: str) -> None:
            connections.append(server.connect())
            connections[-1].sendall(request_bytes(body, f"/toy?key={key}"))

        for number in range(PARALLEL + 4):
            ask("first-key")
            until(lambda number=number: line_of(server).running + line_of(server).waiting == number + 1)
        ask("second-key")
        until(lambda: line_of(server).waiting == 5)
        gate.free()
        server.settle()
        assert order[:PARALLEL] == [1] * PARALLEL
        assert 2 in order[PARALLEL : PARALLEL + 2]
        for connection in connections:
            connection.close()


def test_the_end_of_a_server(demo, gate):
    with serving({"one": gated(demo, gate)}, makers=[toy]) as server:
        running = [begin(server) for _ in range(PARALLEL)]
        until(lambda: line_of(server).running == PARALLEL)
        waiting = begin(server)
        until(lambda: line_of(server).waiting == 1)
        server.call(server.service.drain)
        assert waiting.recv(12) == b"HTTP/1.1 503"
        assert server.post("/toy", {"text": "describe"}).status == 503
        for cancel in list(server.service._cancels):
            cancel.set()
        gate.free()
        for connection in running:
            assert connection.recv(12) == b"HTTP/1.1 503"
            connection.close()
        waiting.close()


# --- the event loop


def slowest_health(server: Running, seconds: float, done) -> float:
    """The slowest of as many looks at /health as there are until `done`."""
    slowest, end = 0.0, time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        begin = time.perf_counter()
        assert server.get("/health").status == 200
        slowest = max(slowest, time.perf_counter() - begin)
    return slowest


def test_health_answers_while_the_model_runs(slow, gate):
    connections = [begin(slow) for _ in range(PARALLEL)]
    gate.begun(1)
    count = 0

    def done() -> bool:
        nonlocal count
        count += 1
        return count > 20

    slowest_health(slow, 10, done)  # that it answers at all: the model stands still
    gate.free()
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()


# --- what goes wrong


def test_errors_of_the_model_cost_one_request(demo):
    double, runtime = scripted(demo, [20, 21, 1], errors={1: RuntimeError("SECRET of the runtime")})
    with serving(double, makers=[toy]) as server:
        answer = server.post("/toy", {"text": "describe"})
        assert (answer.status, answer.json()["kind"]) == (500, "internal")
        assert "SECRET" not in answer.body.decode()
        runtime.errors = {0: ModelOutputError("logits are not finite")}
        assert server.post("/toy", {"text": "describe"}).json()["toy"] == "logits are not finite"
        runtime.errors = {}
        assert server.post("/toy", {"text": "describe"}).status == 200
        server.settle()


def test_errors_behind_the_first_piece_break_the_answer_off(demo):
    """The end of the answer must not look like one."""
    double, _ = scripted(demo, [20, 21, 22, 1], errors={2: RuntimeError("no")})
    with serving(double, makers=[toy]) as server, begin(server, '{"text": "describe", "stream": true}') as connection:
        received = b""
        while piece := connection.recv(4096):
            received += piece
        assert received.startswith(b"HTTP/1.1 200")
        assert not received.endswith(b"0\r\n\r\n")
        assert b"Trace" not in received


def test_unexpected_errors_are_logged_without_what_was_asked(running, caplog, demo):
    with caplog.at_level(logging.INFO):
        answer = running.post("/toy?key=my-key", {"text": "my prompt", "fail": "SECRET"})
        until(lambda: "500" in caplog.text)
    assert (answer.status, answer.json()) == (500, {"toy": "the server failed; its log says why", "kind": "internal",
                                                    "field": None})  # fmt: skip
    # (The test framework takes lines of uvicorn's access log, which goes nowhere.)
    log = "\n".join(record.getMessage() for record in caplog.records if record.name != "uvicorn.access")
    assert "ValueError at" in log
    assert "toy.py" in log
    assert "SECRET" not in log
    assert "prompt" not in log
    assert "my-key" not in log


def test_what_was_asked_is_logged_on_request(running, caplog, demo):
    body = {"text": "a question\nof two lines", "image": as_base64(encoded_picture(3))}
    with caplog.at_level(logging.INFO, "siglance.server"):
        answer = running.post("/toy", body).json()["text"]
        assert "question" not in caplog.text
        with serving(demo, Settings(log_prompts=True), makers=[toy]) as server:
            assert server.post("/toy", body).json()["text"] == answer
            server.post("/toy", {"fail": "SECRET"})
            until(lambda: "SECRET" in caplog.text)
    log = [record.getMessage() for record in caplog.records]
    assert "demo is asked: user: <Image> 'a question\\nof two lines'" in log
    assert f"demo answers: {[answer]!r}" in log


def test_one_line_of_log_for_each_request(running, caplog):
    with caplog.at_level(logging.INFO, "siglance.server"):
        running.post("/toy?key=secret", {"text": "describe"})
        running.get("/a%0d%0aforged%20line")
        until(lambda: len(caplog.records) >= 2)
    first, second = (record.getMessage() for record in caplog.records if record.name == "siglance.server")
    assert first.startswith("127.0.0.1 POST /toy 200 ")
    assert second.startswith("127.0.0.1 GET /a%0D%0Aforged%20line 404 ")


def test_many_large_bodies_at_once_are_refused(demo):
    """Four of the largest size are held; the rest of one that comes then is not taken."""
    size = 100_000
    with serving(demo, Settings(body_bytes=size), makers=[toy]) as server:
        assert server.get("/health").status == 200  # by which the application is put together
        held = []
        for _ in range(4):
            connection = server.connect()
            head = f"POST /toy HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}"
            connection.sendall(head.encode() + b"\r\n\r\n" + b" " * (size - 1))
            held.append(connection)
        gate = gate_of(server)
        until(lambda: gate._held == 4 * (size - 1))
        answer = server.post("/toy", b'{"text": "describe"}' + b" " * 100)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        for connection in held:
            connection.close()
        until(lambda: gate._held == 0)
        assert server.post("/toy", {"text": "describe"}).status == 200


def gate_of(server: Running):
    """The gate of a server's application."""
    layer = server.app.middleware_stack
    while not hasattr(layer, "_held"):
        layer = layer.app  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def test_a_body_over_the_limit(demo):
    with serving(demo, Settings(body_bytes=100), makers=[toy]) as server:
        answer = server.post("/toy", {"text": "x" * 100})
        assert (answer.status, answer.json()["kind"]) == (413, "too_large")
        assert "100 bytes" in answer.json()["toy"]


# --- keys and names


KEYS = Settings(api_keys=("key-one", "key/two+="))


@pytest.fixture(scope="module")
def locked(demo) -> Iterator[Running]:
    with serving(demo, KEYS, makers=[toy]) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/toy", {"authorization": "Bearer key-one"}),
        ("/toy", {"authorization": "bearer  key/two+= "}),
        ("/toy", {"x_goog_api_key": "key/two+="}),
        ("/toy?key=key-one", {}),
        ("/toy?a=b&key=key%2Ftwo%2B%3D", {}),
        ("/toy", {"authorization": "Bearer wrong", "x_goog_api_key": "key-one"}),
    ],
)
def test_each_way_to_give_a_key(locked, path, headers):
    assert locked.post(path, {"text": "describe"}, **headers).status == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/toy", {}),
        ("/toy", {"authorization": "Bearer key-on"}),
        ("/toy", {"authorization": "Bearer key-onee"}),
        ("/toy", {"authorization": "key-one"}),
        ("/toy", {"authorization": "Basic key-one"}),
        ("/toy", {"authorization": "Bearer"}),
        ("/toy", {"authorization": "Bearer \xff"}),
        ("/toy", {"x_goog_api_key": "KEY-ONE"}),
        ("/toy?key=", {}),
        ("/toy?key=key%2Ftwo+%3D", {}),
        ("/toy?" + "&".join("key=x" for _ in range(200)), {}),
        ("/toy?Key=key-one", {}),
        ("/toy/nothing/here", {}),
        ("/metrics", {}),
        ("/openapi.json", {}),
        ("/nothing", {}),
        ("/health/", {}),
    ],
)
def test_everything_else_is_locked(locked, path, headers):
    for answer in (locked.post(path, {"text": "describe"}, **headers), locked.get(path, **headers)):
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert ("toy" in answer.json()) == path.startswith("/toy")


def test_a_path_with_the_address_in_front(running, locked):
    """As proxies write it, and RFC 9112 wants it to be taken."""
    for server, path, status in (
        (running, b"http://localhost/health", b"200"),
        (running, b"HTTP://localhost:1/toy", b"405"),
        (running, b"http://localhost", b"404"),
        (running, b"http://[/", b"404"),
        (locked, b"http://localhost/metrics", b"401"),
        (locked, b"http://localhost/health", b"200"),
    ):
        with server.connect() as connection:
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(65536).split()[1] == status, path


def test_a_slash_too_many_leads_nowhere(running):
    """A redirection would name the address that this server is known by to itself."""
    for method, path in (("GET", "/health/"), ("POST", "/toy/")):
        answer = running.ask(method, path)
        assert (answer.status, answer.headers.get("location")) == (404, None)


def test_health_needs_no_key(locked):
    assert locked.get("/health").status == 200


def test_names_that_pages_of_the_web_could_give_this_machine(running, locked):
    """Without a key a server of this machine answers to its own names only."""
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000"):
        assert running.get("/health", host=host).status == 200, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "x" * 900,
    ):
        answer = running.get("/health", host=host)
        assert (answer.status, len(answer.body) < 250) == (403, True), host
    assert locked.get("/health", host="evil.example").status == 200


def test_any_name_where_the_server_is_there_for_others(demo):
    with serving(demo, Settings(host="0.0.0.0"), makers=[toy]) as server:
        assert server.get("/health", host="box.example").status == 200
