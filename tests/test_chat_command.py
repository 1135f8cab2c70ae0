"""`siglance chat`: what is typed, what is printed, and that nothing that goes wrong ends it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from PIL import Image
from typer.testing import CliRunner

from siglance.engine import Engine, Sampling, Text, cli, reply_writer
from siglance.engine import Image as Picture
from siglance.engine.sampling import Sampler
from siglance.engine.self_test import formula_picture

GREEDY = Sampling(temperature=0)
OPTIONS = ["--temperature", "0", "--max-tokens", "6"]


@pytest.fixture(scope="module")
def seeing(tiny_model):
    """Folder of a tiny bundle with text and pictures."""
    return tiny_model("gemma4").bundle.folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(formula_picture(120, 200)).save(path)
    return path


@pytest.fixture
def talk(seeing, tmp_path, monkeypatch):
    """talk(*lines, options=[...]) -> (exit code, stdout, lines of stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*lines: str, options=(), bundle=seeing) -> tuple[int, str, list[str]]:
        done = CliRunner().invoke(cli.app, ["chat", str(bundle), *OPTIONS, *options], input="\n".join(lines))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr.splitlines()

    return call


def replies(bundle, *turns, **options) -> list[str]:
    """What the chat of the library says."""
    with Engine.open(bundle) as engine:
        chat = engine.chat(sampling=GREEDY, max_tokens=6, **options)
        return [chat.send(turn).text for turn in turns]


def printed(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_replies_are_alone_on_stdout(talk, seeing):
    code, out, notes = talk("hello", "", "  and the cat?  ")
    assert code == 0
    assert out == printed(*replies(seeing, "hello", "and the cat?"))
    assert len(notes) == 2
    assert "of them cached; first token after" in notes[1]
    assert "cut by --max-tokens" in notes[0]


def test_pictures_go_with_the_next_message(talk, seeing, photo):
    lines = [f"/image {photo}@70", "what is this?", "and?", "/image photo.png@70", f"/image '{photo}'", "these?"]
    code, out, notes = talk(*lines, options=["--image-tokens", "140"])
    turns = (
        [Picture(photo, 70), Text("what is this?")],
        "and?",
        [Picture(photo, 70), Picture(photo, 140), Text("these?")],
    )
    assert (code, out) == (0, printed(*replies(seeing, *turns)))
    with Engine.open(seeing) as engine:
        tokens = [len(engine.encode(photo, image_tokens=budget)) for budget in (70, 140)]
    assert [note for note in notes if "goes with" in note] == [
        f"{photo}@70: {tokens[0]} tokens, goes with the next message",
        f"photo.png@70: {tokens[0]} tokens, goes with the next message",
        f"{photo}: {tokens[1]} tokens, goes with the next message",
    ]


def test_a_picture_that_can_never_fit_is_refused_at_once(talk, photo):
    """It would stay attached, and no later message could be answered."""
    code, out, notes = talk(f"/image {photo}@1120", "hello")
    assert code == 0
    assert out.strip()
    assert any("the context of this bundle holds" in note for note in notes)


def test_the_path_of_a_file_is_a_picture(talk, seeing, photo):
    """As for the engine, if there is such a file; what merely mentions one is a message."""
    code, out, _ = talk(str(photo), "what?", "what is in photo.png", "no-such-file.png")
    turns = ([photo, Text("what?")], Text("what is in photo.png"), Text("no-such-file.png"))
    assert (code, out) == (0, printed(*replies(seeing, *turns)))


def test_paths_as_terminals_write_them(talk, seeing, photo, tmp_path, monkeypatch):
    """Dropped into the window, or typed as a shell would take them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    other = tmp_path / "an odd (name).png"
    other.write_bytes(photo.read_bytes())
    forms = ["an\\ odd\\ \\(name\\).png", f"'{other}'", f'"{other}"', other.as_uri(), "~/an odd (name).png"]
    forms += ["/image an\\ odd\\ \\(name\\).png@140", "/image ~/an\\ odd\\ (name).png"]
    code, out, notes = talk(*forms, "~/no-such.png", "/save ~/talk.json", options=["--image-tokens", "70"])
    parts = [*[Picture(photo, 70)] * 5, Picture(photo, 140), Picture(photo, 70)]
    assert (code, out) == (0, printed(*replies(seeing, [*parts, Text("~/no-such.png")])))
    assert sum("goes with the next message" in note for note in notes) == len(forms)
    assert (tmp_path / "talk.json").is_file()


def test_a_picture_that_is_only_named_is_not_seen(talk, photo):
    remark = "the model does not see the file photo.png: /image photo.png shows it"
    asked = ("what is in photo.png?", "photo.png", "and what is in photo.png?", "/reset", "photo.png what?")
    notes = talk(*asked)[2]
    assert [note for note in notes if note == remark] == [remark] * 2
    assert notes.index(remark) < notes.index(next(note for note in notes if "goes with" in note))


def test_slashes(talk, seeing):
    code, out, notes = talk("//image is what I say", "/nothing", "/ image", "/images x")
    assert (code, out) == (0, printed(*replies(seeing, "/image is what I say")))
    assert [note for note in notes if "no command" in note] == [
        f"there is no command {command}; /help lists them, and //... is a message"
        for command in ("/nothing", "/", "/images")
    ]


def test_help_and_quit(talk):
    code, out, notes = talk("/help", "/quit", "never said")
    assert (code, out) == (0, "")
    text = "\n".join(notes)
    for command in ("/image", "/reset", "/save", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in text


def test_reset(talk, seeing, photo):
    code, out, _ = talk("hello", f"/image {photo}", "/reset", "hello", "and?")
    first, *again = replies(seeing, "hello", "and?")
    assert (code, out) == (0, printed(first, first, *again))


def test_the_system_text_and_the_options(talk, seeing):
    options = ["--system", "Be brief.", "--temperature", "1.5", "--seed", "3", "--top-k", "40", "--max-tokens", "9"]
    code, out, _ = talk("hello", "and?", options=[*options, "--cache", "off"])
    with Engine.open(seeing) as engine:
        sampling = Sampling(temperature=1.5, seed=3, top_k=40)
        chat = engine.chat(system="Be brief.", sampling=sampling, max_tokens=9)
        assert (code, out) == (0, printed(*(chat.send(turn).text for turn in ("hello", "and?"))))


def test_errors_are_one_line_and_the_chat_goes_on(talk, seeing, photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:100])
    lines = ["hello", "/image", "/image nothing.png", f"/image {broken}", f"/image {photo}@71", "x" * 5000]
    lines += ["/save", "/save nowhere/x.json", "/save .", f"{broken}"]
    code, out, notes = talk(*lines, "and?")
    assert (code, out) == (0, printed(*replies(seeing, "hello", "and?")))
    errors = notes[1:-1]
    assert len(errors) == len(lines) - 1
    for note, part in zip(
        errors,
        [
            "needs the path",
            "nothing.png",
            "broken.png",
            "71",
            "context",
            "needs the path",
            "nowhere",
            "folder",
            "broken",
        ],
        strict=True,
    ):
        assert part in note


def test_pictures_stay_attached_when_a_turn_fails(talk, seeing, photo):
    code, out, notes = talk(f"/image {photo}", "x" * 5000, "what?")
    assert (code, out) == (0, printed(*replies(seeing, [photo, Text("what?")])))
    assert any("context" in note for note in notes)


def test_text_that_is_no_text(seeing):
    command = [sys.executable, "-m", "siglance.engine", "chat", str(seeing), *OPTIONS]
    done = subprocess.run(command, input=b"caf\xe9\nhello\n", capture_output=True, cwd="/", check=True)
    assert done.stdout.decode() == printed(*replies(seeing, "hello"))
    assert b"not valid Unicode" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_bundle_without_pictures(talk, tiny_model, photo):
    bundle = tiny_model("gemma3").bundle.folder
    code, out, notes = talk(f"/image {photo}", "hello", bundle=bundle)
    assert (code, out) == (0, printed(*replies(bundle, "hello")))
    assert "no vision input" in notes[0]


def test_a_bundle_without_roles(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["siglance", "chat", str(tiny_model("paligemma").bundle.folder)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        "siglance: a chat needs a chat template with roles, which this bundle does not have\n"
    )


def test_save(talk, seeing, photo, tmp_path):
    lines = [f"/image {photo}@70", "what is this?", "/save talk.json", "café 🦝", "/save 'all of it.json'"]
    code, _, notes = talk(*lines, options=["--system", "Be brief."])
    assert code == 0
    first, second = (json.loads((tmp_path / name).read_text("utf-8")) for name in ("talk.json", "all of it.json"))
    assert "talk.json: 2 messages" in notes
    texts = replies(seeing, [Picture(photo, 70), Text("what is this?")], "café 🦝", system="Be brief.")
    assert second == {
        "bundle": "bundle",
        "system": "Be brief.",
        "turns": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": f"{photo}@70"},
                    {"type": "text", "text": "what is this?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": texts[0]}]},
            {"role": "user", "content": [{"type": "text", "text": "café 🦝"}]},
            {"role": "assistant", "content": [{"type": "text", "text": texts[1]}]},
        ],
    }
    assert first["turns"] == second["turns"][:2]


def test_encoded_pictures_outlive_the_program(talk, seeing, photo, tmp_path):
    folder = tmp_path / "features"
    for _ in range(2):
        code, _, _ = talk(f"/image {photo}", "what?", options=["--feature-cache", str(folder)])
        assert code == 0
        assert len(list(folder.iterdir())) == 1


# --- interruptions


def test_ctrl_c_stops_the_reply_and_not_the_program(talk, seeing, monkeypatch, photo):
    """Whenever it comes, the turn is not kept, and the next message gets the answer it would have got anyway."""
    expected = replies(seeing, "hello", [photo, Text("and?")])
    for at in range(6, 12):
        calls = iter(range(1000))
        sample = Sampler.__call__

        def interrupted(self, logits, mask=None, calls=calls, at=at, sample=sample):
            if next(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return sample(self, logits, mask)

        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "__call__", interrupted)
            code, out, notes = talk("hello", f"/image {photo}", "stop this", "and?")
        assert code == 0
        lines = out.splitlines()
        assert (lines[0], lines[-1]) == (expected[0], expected[1])
        assert "stopped, this turn is not kept" in notes


def read_until(terminal: int, ending: bytes, press: Callable[[], object] = lambda: None) -> bytes:
    """What a terminal shows, up to `ending` or until the other side is closed.

    `press` is done again while nothing is shown: a signal is not heard just before a process waits for input.
    """
    seen, deadline = b"", time.monotonic() + 60
    press()
    while not seen.endswith(ending):
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                seen += os.read(terminal, 1)
            except OSError:
                break
        else:
            assert time.monotonic() < deadline, f"no {ending!r} in {seen!r}"
            press()
    return seen


def test_in_a_terminal(seeing):
    """A prompt, Ctrl-C at it, and Ctrl-D at the end."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are of Unix")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "siglance.engine", "chat", str(seeing), *OPTIONS]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, cwd="/", env=os.environ | {"TERM": "dumb"}, **streams) as process:
        os.close(theirs)
        try:
            assert b"/help lists the commands" in read_until(ours, b"> ")
            os.write(ours, b"half a mess")
            read_until(ours, b"half a mess")
            read_until(ours, b"> ", lambda: process.send_signal(signal.SIGINT))
            os.write(ours, b"hello\n")
            read_until(ours, b"of them cached")
            read_until(ours, b"> ")
            os.write(ours, b"\x04")
            read_until(ours, b"the end")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)


def test_a_terminal_gets_no_escape_sequences():
    """Text of a model is text, whatever it spells."""
    assert "\x1b[2J\x07 a\tb\n\x9b1m".translate(reply_writer._CONTROLS) == "\ufffd[2J\ufffd a\tb\n\ufffd1m"
