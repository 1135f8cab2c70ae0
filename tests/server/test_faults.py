"""Faults of the world around a server: what its clients see, and that nothing but the request in flight is lost."""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from siglance.engine import Engine
from siglance.engine.bundle import Bundle, demo_folder
from siglance.engine.errors import ModelOutputError
from siglance.engine.self_test import formula_picture

from ..picture_files import encoded
from ..scripted import scripted
from .process import started
from .running import Running, serving
from .toy import as_base64, toy

ASK = {"messages": [{"role": "user", "content": "describe"}], "max_tokens": 8, "model": "default", "seed": 1}


def picture(index: int) -> str:
    return as_base64(encoded(PIL.Image.fromarray(np.roll(formula_picture(60, 90), 13 * index, axis=1)), "PNG"))


def test_a_server_that_is_killed_and_started_again(tmp_path):
    """The request in flight ends without an end; what was kept on disk is whole, and the answers are the same."""
    cache, answers = tmp_path / "cache", []
    body = {**ASK, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(0)}"}},
        {"type": "text", "text": "describe"},
    ]}]}  # fmt: skip
    endless = {str(id): -100 for id in Bundle.open("demo").manifest.stop_ids}
    for _ in range(2):
        with started("--feature-cache", str(cache)) as server:
            status, answer = server.ask("POST", "/v1/chat/completions", body)
            assert status == 200
            answers.append(json.loads(answer)["choices"])
            # More bytes than the buffers of a connection hold: the reply cannot end before somebody reads it.
            long = {"stream": True, "max_tokens": 1000, "n": 8, "logprobs": True, "top_logprobs": 20}
            with socket.socket() as connection:
                connection.settimeout(60)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(server.address())
                data = json.dumps({**ASK, **long, "logit_bias": endless}).encode()
                connection.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    + f"Content-Length: {len(data)}\r\n\r\n".encode()
                    + data
                )
                received = connection.recv(1)
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
                try:
                    while piece := connection.recv(4096):
                        received += piece
                except ConnectionResetError:
                    pass
            assert b"[DONE]" not in received
    assert answers[0] == answers[1]
    files = list(cache.iterdir())
    assert [file.suffix for file in files] == [".features"]


class FullDisk:
    """Files that take some bytes and no more."""

    def __init__(self, room: int):
        self.room, self.refused = room, 0

    def write(self, original):
        def write(self_, data):
            if len(data) > self.room:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(data)
            return original(self_, data)

        return write


def test_a_full_disk_costs_the_cache_and_no_request(tmp_path, monkeypatch, caplog):
    import tempfile

    disk = FullDisk(room=5000)
    real = tempfile.NamedTemporaryFile

    def narrow(*arguments, **options):
        file = real(*arguments, **options)
        write = file.file.write
        file.write = lambda data: disk.write(lambda _, data: write(data))(file, data)
        return file

    monkeypatch.setattr("siglance.engine.feature_cache.tempfile.NamedTemporaryFile", narrow)
    with Engine.open("demo", feature_cache_dir=tmp_path) as engine, serving(engine, makers=[toy]) as server:
        for index in range(4):
            assert server.post("/toy", {"text": "describe", "image": picture(index)}).status == 200
        assert disk.refused >= 2
        files = [file.suffix for file in tmp_path.iterdir()]
        assert set(files) <= {".features"}  # nothing that was begun is left
        assert len(files) < 4
        warnings = [record for record in caplog.records if record.name == "siglance" and "disk" in record.getMessage()]
        assert len(warnings) == 1


def test_a_folder_of_the_cache_that_goes_away(tmp_path):
    folder = tmp_path / "cache"
    with Engine.open("demo", feature_cache_dir=folder) as engine, serving(engine, makers=[toy]) as server:
        shutil.rmtree(folder)
        for index in range(2):
            assert server.post("/toy", {"text": "describe", "image": picture(index)}).status == 200


def test_a_bundle_that_is_replaced_under_a_server(tmp_path):
    """As export replaces one: the old folder is moved away, and a new one takes its place. The server goes on with what
    it has opened, down to the last byte of its memory-mapped weights."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_folder(), folder)
    with Engine.open(folder) as engine, serving(engine, makers=[toy]) as server:
        asked = [{"text": text, "image": picture(9)} for text in ("describe", "count", "detect all")]
        before = [server.post("/toy", body).json()["text"] for body in asked]
        engine._reuse.clear()
        folder.rename(tmp_path / "old")
        shutil.copytree(demo_folder(), folder)
        (folder / "weights.bin").write_bytes(bytes((folder / "weights.bin").stat().st_size))
        for old in (tmp_path / "old").iterdir():
            old.unlink()
        assert [server.post("/toy", body).json()["text"] for body in asked] == before
        assert server.get("/health").status == 200


def test_a_bundle_that_is_written_over_under_a_server(tmp_path):
    """Its weights are mapped into memory: requests are refused, and none is answered from other weights."""
    folder = tmp_path / "bundle"
    shutil.copytree(demo_folder(), folder)
    with Engine.open(folder) as engine, serving(engine, makers=[toy]) as server:
        assert server.post("/toy", {"text": "describe"}).status == 200
        with (folder / "weights.bin").open("r+b") as file:
            file.write(bytes(1000))
        for stream in (False, True):
            answer = server.post("/toy", {"text": "describe", "stream": stream})
            assert (answer.status, answer.json()["kind"]) == (503, "unavailable")
            assert "start the server again" in answer.json()["toy"]
        assert server.get("/health").status == 200


def test_a_step_of_the_model_that_raises(demo):
    """One request fails, whoever runs beside it does not notice, and what comes next is answered."""
    double, runtime = scripted(demo, [20, 21, 22, 1])
    with serving({"steps": double, "demo": demo}, makers=[toy]) as server:
        right = server.post("/toy", {"text": "describe", "model": "steps"}).json()["text"]
        for run, error in enumerate((ModelOutputError("not finite"), RuntimeError("of the runtime"), MemoryError())):
            runtime.errors = {run: error}
            for stream in (False, True):
                answer = ask(server, {"text": "describe", "model": "steps", "stream": stream})
                assert answer != right
                beside = server.post("/toy", {"text": "describe", "model": "demo"})
                assert beside.status == 200
            runtime.errors = {}
            assert server.post("/toy", {"text": "describe", "model": "steps"}).json()["text"] == right
        server.settle()


def ask(server: Running, body: dict) -> str:
    """The answer, or why there is none."""
    try:
        answer = server.post("/toy", body)
    except http.client.IncompleteRead:
        return "broken off"
    return answer.body.decode() if answer.status == 200 else f"status {answer.status}"


@pytest.mark.parametrize("name", ["graph", "state"])
def test_a_graph_that_fails_in_the_middle_leaves_nothing_behind(demo, name):
    """The real model; its decoder fails once, before or after the state was written to."""
    import copy

    double = copy.copy(demo)
    double._reuse = demo._reuse.off()
    runtime = copy.copy(demo.runtime)
    runtime.decoder = copy.copy(runtime.decoder)
    real, left = runtime.decoder.run_bound, [3]

    def failing(binding) -> None:
        left[0] -= 1
        if name == "state":
            real(binding)
        if left[0] == 0:
            raise ModelOutputError("the device is gone")
        if name == "graph":
            real(binding)

    runtime.decoder.run_bound = failing
    double._runtime = runtime
    with serving(double, makers=[toy]) as server:
        assert server.post("/toy", {"text": "describe"}).status == 500
        answers = [server.post("/toy", {"text": "describe"}).json()["text"] for _ in range(2)]
    assert answers == [demo.generate("describe", max_tokens=20).text] * 2


def test_a_process_that_reads_a_document_and_dies(demo, monkeypatch):
    """The document is refused; the server and its next document are well."""
    from siglance.engine import pdf_worker

    from ..pdf_files import pdf, quadrants

    paper = as_base64(pdf(quadrants()))
    with serving(demo, makers=[toy]) as server:
        real = subprocess.run

        def dying(command, **options):
            if Path(str(command[2])).name == Path(pdf_worker.__file__).name:
                command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
            return real(command, **options)

        monkeypatch.setattr(subprocess, "run", dying)
        answer = server.post("/toy", {"text": "describe", "image": paper})
        assert (answer.status, answer.json()["kind"]) == (400, "invalid")
        assert "SIGKILL" in answer.json()["toy"]
        monkeypatch.undo()
        assert server.post("/toy", {"text": "describe", "image": paper}).status == 200
