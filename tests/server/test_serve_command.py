"""`siglance serve` as people start it: a process of its own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from siglance.engine.bundle import demo_folder
from siglance.engine.cli import app
from siglance.engine.errors import InputError, SiglanceError
from siglance.engine.server import command
from siglance.engine.server.listening import listen, url_of

from .process import started

ASK = {"messages": [{"role": "user", "content": "describe"}], "max_tokens": 8, "model": "default"}


def test_a_server_from_start_to_end():
    with started(SIGLANCE_API_KEY="first second") as server:
        host, port = server.address()
        assert (host, port > 0) == ("127.0.0.1", True)
        assert server.lines == [f"siglance: serving demo on http://127.0.0.1:{port}"]
        assert server.ask("GET", "/health") == (200, b'{"status":"ok","models":["demo"]}')
        assert server.ask("GET", "/v1/models")[0] == 401
        for key in ("first", "second"):
            assert server.ask("GET", "/v1/models", authorization=f"Bearer {key}")[0] == 200
        status, body = server.ask("POST", "/v1/chat/completions", ASK, authorization="Bearer first")
        assert (status, json.loads(body)["object"]) == (200, "chat.completion")
        server.line("POST /v1/chat/completions 200")
        assert server.end(signal.SIGTERM) == 0
        assert not [line for line in server.lines if "Traceback" in line]


def test_the_interrupt_key_ends_it_without_a_trace():
    with started() as server:
        server.address()
        assert server.end(signal.SIGINT) == 0
        assert len(server.lines) == 1


def test_a_running_request_is_finished_first():
    with started() as server:
        with socket.create_connection(server.address(), timeout=60) as connection:
            body = json.dumps(ASK | {"stream": True, "max_tokens": 60})
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            received = connection.recv(1)
            server.process.send_signal(signal.SIGTERM)
            while piece := connection.recv(4096):
                received += piece
        assert received.endswith(b"0\r\n\r\n")
        assert b"data: [DONE]" in received
        assert server.process.wait(60) == 0


def run(*arguments: str) -> str:
    """The error of a server that does not start."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, SiglanceError), result.output
    return str(result.exception)


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run("--port", str(port)) == f"cannot listen on http://127.0.0.1:{port}: Address already in use"


def test_an_address_of_another_machine():
    assert "cannot listen on http://192.0.2.1:8000: " in run("--host", "192.0.2.1")
    assert "cannot listen on http://not a name:8000: " in run("--host", "not a name")


def test_two_bundles_of_one_name(tmp_path):
    shutil.copytree(demo_folder(), tmp_path / "other")
    assert run("demo", str(tmp_path / "other"), "--port", "0") == "two bundles are called 'demo'"


def test_a_name_that_cannot_be_part_of_a_path(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(demo_folder(), folder)
    manifest = folder / "siglance.json"
    manifest.write_text(manifest.read_text().replace('"name": "demo"', '"name": "a/b"'))
    assert run(str(folder), "--port", "0").endswith("is called 'a/b', which cannot be part of a path")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing-bundle",), "no bundle 'missing-bundle'"),
        (("--allow-dir", "/no/such/folder"), "--allow-dir /no/such/folder: there is no such folder"),
        (("--allow-host", "http://a"), "--allow-host http://a: expected NAME or NAME:PORT"),
        (("--api-key", ""), "API key 1 is empty"),
        (("--api-key", "a", "--api-key", "b c"), "API key 2 is empty or has other characters"),
        (("--limit", "bytes=0"), "max_bytes is 0"),
    ],
)
def test_options_that_cannot_be_used(arguments, message):
    assert message in run("--port", "0", *arguments)


@pytest.mark.parametrize("arguments", [("--port", "65536"), ("--port", "-1"), ("--queue", "-1"), ("--port", "x")])
def test_options_out_of_range(arguments):
    assert CliRunner().invoke(app, ["serve", *arguments]).exit_code == 2


def test_options_arrive():
    settings = command.settings_of("::1", 0, 5, ["k"], [Path("/tmp")], ["h"], ["bytes=1000", "pages=3"], True, 7.5)
    assert (settings.host, settings.port, settings.queue, settings.api_keys) == ("::1", 0, 5, ("k",))
    assert (settings.allow_dirs, settings.allow_hosts, settings.log_prompts) == ((Path("/tmp"),), ("h",), True)
    assert (settings.limits.max_bytes, settings.limits.max_pages, settings.body_bytes) == (1000, 3, 1500)
    assert settings.timeout == 7.5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_timeout_is_a_time(seconds):
    with pytest.raises(InputError, match="expected a number of seconds"):
        command.settings_of("::1", 0, 5, None, None, None, None, False, seconds)


def test_without_the_extra():
    code = (
        "import sys\nsys.modules['starlette'] = sys.modules['uvicorn'] = None\n"
        "from siglance.engine.cli import main\nsys.argv = ['siglance', 'serve']\nmain()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"siglance: serve needs the package '\w+': pip install 'siglance\[server\]'\n", done.stderr)


def test_a_server_for_others_without_a_key_is_warned_about(monkeypatch, capsys):
    """The server itself is left out: no test listens to other machines."""
    monkeypatch.setattr(command, "listen", lambda host, port: socket.create_server(("127.0.0.1", 0)))
    monkeypatch.setattr(command._Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(command, "_set_up_log", lambda: None)
    for host, keys, warned in (
        ("0.0.0.0", [], True),
        ("::", [], True),
        ("0.0.0.0", ["k"], False),
        ("127.0.0.1", [], False),
    ):
        command.serve(["demo"], command.settings_of(host, 0, 1, keys, None, None, None, False, 30.0), device="cpu")
        written = capsys.readouterr().err
        assert ("warning: whoever can reach" in written) == warned, host


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        with listen("::1", 0) as listening:
            assert url_of("::1", listening.getsockname()[1]).startswith("http://[::1]:")
    except InputError as error:
        pytest.skip(f"this machine has no IPv6 address of its own: {error}")


def test_small_pieces_do_not_wait():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
