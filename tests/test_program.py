"""The program as a process: where its output goes, what was closed, how its files are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from siglance.engine import cli, option_files

from .test_cli import siglance as siglance  # a fixture

FULL = Path("/dev/full")


def _program(*arguments: str, **streams: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "siglance.engine", *arguments]
    return subprocess.run(command, timeout=60, check=False, **streams)  # pyright: ignore


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("arguments", [("run", "-p", "count"), ("count-tokens", "-p", "count", "--json")])
def test_a_full_disk_is_one_line_and_exit_code_1(arguments: tuple[str, ...]):
    with FULL.open("wb") as full:
        done = _program(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"siglance: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="descriptors are closed between fork and exec")
@pytest.mark.parametrize(
    ("closed", "arguments"),
    [(0, ("chat",)), (1, ("run", "-p", "count")), (2, ("run", "-p", "count"))],
    ids=["stdin", "stdout", "stderr"],
)
def test_a_stream_that_the_caller_has_closed(closed: int, arguments: tuple[str, ...]):
    names = ["stdin", "stdout", "stderr"]
    streams = {name: subprocess.DEVNULL if name == "stdin" else subprocess.PIPE for name in names}
    del streams[names[closed]]
    done = _program(*arguments, **streams, preexec_fn=lambda: os.close(closed))
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in (done.stderr or b"")


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["siglance", "--version"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert (left.value.code, capsys.readouterr().out) == (0, f"siglance {metadata.version('siglance')}\n")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_files_written_on_windows_are_read(mark: bytes, end: bytes, tmp_path: Path):
    def file(text: str) -> Path:
        (tmp_path / "file").write_bytes(mark + text.encode().replace(b"\n", end))
        return tmp_path / "file"

    grammar = option_files.read_format(file('{\n"type": "integer"\n}\n'), None, None, False)
    assert grammar is not None
    assert json.loads(grammar.source) == {"type": "integer"}
    assert option_files.read_format(None, None, file('start: "a"\n'), False) is not None
    assert option_files.read_ids(file("[\n1, 2\n]\n")) == [1, 2]
    [tool] = option_files.read_tools_file(file('[{"name": "f",\n"description": "d", "parameters": {}}]\n'))
    assert tool.name == "f"


def test_what_windows_pipes_into_a_chat_is_no_part_of_the_first_message():
    plain, marked = (
        _program("chat", "--temperature", "0", input=mark + b"count\r\n", capture_output=True)
        for mark in (b"", b"\xef\xbb\xbf")
    )
    assert plain.returncode == 0
    assert marked.stdout == plain.stdout
    assert marked.stderr.splitlines()[1].split(b";")[0] == plain.stderr.splitlines()[1].split(b";")[0]  # prompt tokens


@pytest.mark.parametrize("command", [(), ("run",)])
def test_help_has_a_short_name(siglance, command: tuple[str, ...]):
    code, out, _ = siglance(*command, "-h")
    assert (code, out) == (0, siglance(*command, "--help")[1])


@pytest.mark.parametrize("option", ["--schema", "--grammar", "--tools", "--prompt-ids"])
def test_a_file_that_cannot_be_read_is_named_once(siglance, option: str):
    assert siglance("run", "-p", "count", option, "no-such") == (
        1,
        "",
        f"siglance: {option} no-such: No such file or directory\n",
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_replies_in_any_language_are_written_whatever_the_output_can(encoding: str):
    """Windows gives pipes the code page of a country; a reply in another language must not be a crash."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    text = "é日\U0001f642"
    asked = ("run", "-p", "count", "--regex", text)
    plain, as_json = (_program(*asked, *more, capture_output=True, env=environment) for more in ((), ("--json",)))
    assert (plain.returncode, as_json.returncode) == (0, 0), plain.stderr
    assert plain.stdout.decode(encoding).strip() == text.encode(encoding, "backslashreplace").decode(encoding)
    assert json.loads(as_json.stdout.decode(encoding))["text"] == text


def test_what_is_piped_into_a_chat_is_utf_8():
    """Else every accent of a question would be two other letters, without a word."""
    replies = [
        _program("chat", "--temperature", "0", input="é日\n".encode(), capture_output=True, env=os.environ | variables)
        for variables in ({"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"})
    ]
    assert [reply.returncode for reply in replies] == [0, 0, 0]
    tokens = {reply.stderr.splitlines()[1].split(b" prompt tokens")[0] for reply in replies}
    assert len(tokens) == 1, tokens
    assert len({reply.stdout for reply in replies}) == 1
