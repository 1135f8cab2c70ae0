"""What options of the command line make of files."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from typer.testing import CliRunner

from siglance.engine import Audio, Engine, Image, Pdf, Video, cli
from siglance.engine.attachments import Scene, attach, attach_all, named_files
from siglance.engine.errors import InputError

from .audio_files import tone, video_with_sound, wav
from .pdf_files import numbered_pages
from .test_cli import siglance as siglance  # a fixture


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny E2B: it reads, sees, watches and hears."""
    with Engine(tiny_model("gemma4_audio").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "clip.mp4").write_bytes(video_with_sound(2.0))
    (folder / "silent.mp4").write_bytes(video_with_sound(1.0, with_sound=False))
    (folder / "sound.wav").write_bytes(wav(tone(2.0, 16_000)))
    (folder / "pages.pdf").write_bytes(numbered_pages(3))
    PillowImage.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "picture.png")
    return folder


def test_each_file_becomes_what_its_content_says(files):
    scene = Scene(2.0, 0.5, 1.5, True)
    video = attach(f"{files}/clip.mp4@140", None, scene)
    assert isinstance(video, Video)
    assert (video.fps, video.start, video.end, video.tokens, video.sound) == (2.0, 0.5, 1.5, 140, True)
    assert isinstance(attach(f"{files}/pages.pdf", "2", scene), Pdf)
    picture = attach(f"{files}/picture.png@70", "2", scene)
    assert isinstance(picture, Image)
    assert picture.tokens == 70
    sound = attach(f"{files}/sound.wav", None, scene)
    assert isinstance(sound, Audio)
    assert (sound.start, sound.end) == (0.5, 1.5)


def piped_in(monkeypatch, data: bytes):
    """What the program finds on its standard input."""
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)
    return stdin


@pytest.mark.parametrize("name", ["clip.mp4", "sound.wav", "pages.pdf", "picture.png"])
def test_what_is_piped_in_is_what_its_content_says(files, name, monkeypatch):
    """A pipe gives its bytes once, and no name tells what it is."""
    data = (files / name).read_bytes()
    pages = "2" if name == "pages.pdf" else None
    scene = Scene(start=0.5) if name in ("clip.mp4", "sound.wav") else Scene()
    [expected] = attach_all([f"{files}/{name}"], pages, scene)
    piped_in(monkeypatch, data)
    [found] = attach_all(["-"], pages, scene)
    assert type(found) is type(expected)
    assert found.source == data
    read, write = os.pipe()
    with open(write, "wb") as end:
        writer = threading.Thread(target=lambda: (end.write(data), end.close()))
        writer.start()
        [found] = attach_all([f"/dev/fd/{read}@70"] if name == "picture.png" else [f"/dev/fd/{read}"], pages, scene)
        writer.join()
    os.close(read)
    assert type(found) is type(expected)
    assert found.source == data


def test_a_picture_from_a_pipe_is_drawn_on(siglance, monkeypatch, tmp_path, files):
    """It is needed twice: by the model, and under the boxes."""
    piped_in(monkeypatch, (files / "picture.png").read_bytes())
    code, _, err = siglance("run", "-i", "-@9", "-p", "detect all", "--draw", tmp_path / "drawn.png")
    assert code == 0, err
    with PillowImage.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (8, 8)


@pytest.mark.parametrize(("prompt", "boxes"), [("detect all", True), ("describe", False)])
def test_a_drawing_without_boxes_says_so(siglance, tmp_path, prompt, boxes):
    scene = Path(__file__).parent / "data" / "scene.png"
    code, _, err = siglance("run", "-i", scene, "-p", prompt, "--draw", tmp_path / "drawn.png")
    assert code == 0
    assert ("the reply has no boxes, so none are drawn" in err) is not boxes


def test_a_pipe_has_a_limit(siglance, monkeypatch):
    piped_in(monkeypatch, bytes(2000))
    code, _, err = siglance("run", "-i", "-", "-p", "x", "--limit", "bytes=1000")
    assert (code, err) == (1, "siglance: -: over the limit of 1000 bytes of encoded data\n")


def test_files_that_a_text_names(files, monkeypatch):
    monkeypatch.chdir(files)
    text = "what is in (./picture.png), 'sound.wav' and clip.mp4? picture.png, no.png or pages? picture.png"
    assert named_files(text) == ["./picture.png", "sound.wav", "clip.mp4", "picture.png"]
    assert named_files("describe") == []
    assert named_files("\0.png \ud800.png " + "x" * 10_000 + ".png") == []


def test_a_picture_that_is_only_named_is_not_seen(siglance, files, monkeypatch):
    monkeypatch.chdir(files)
    remark = "the model does not see the file picture.png: -i picture.png shows it"
    assert remark in siglance("run", "-p", "count picture.png")[2]
    assert remark not in siglance("run", "-p", "count picture.png", "-i", "picture.png")[2]


@pytest.mark.parametrize("scene", [Scene(fps=2.0, start=1.0), Scene(start=1.0, sound=True)])
def test_a_part_is_chosen_of_sounds_beside_videos_too(files, scene):
    """Options for videos take nothing from those for both."""
    sound, video = attach_all([f"{files}/sound.wav", f"{files}/clip.mp4"], None, scene)
    assert isinstance(sound, Audio)
    assert isinstance(video, Video)
    assert sound.start == video.start == 1.0


@pytest.mark.parametrize(
    ("name", "scene", "error"),
    [
        ("picture.png", Scene(fps=2.0, end=3.0), "--fps 2 --end 3: none of the files is a video"),
        ("picture.png", Scene(start=1.0), "--start 1: none of the files is a video or a sound"),
        ("sound.wav", Scene(fps=2.0), "--fps 2: none of the files is a video"),
        ("sound.wav", Scene(sound=True), "--sound: none of the files is a video"),
        ("sound.wav", Scene(end=1.0, sound=True), "--end 1 --sound: none of the files is a video"),
    ],
)
def test_options_that_are_for_none_of_the_files_are_refused(files, name, scene, error):
    with pytest.raises(InputError) as caught:
        attach_all([f"{files}/{name}"], None, scene)
    assert str(caught.value) == error


def test_the_sound_of_a_video_on_the_command_line(siglance, engine, files):
    """Seen and heard with --sound, seen only without it."""
    counts = {}
    for option in ((), ("--sound",)):
        arguments = ("count-tokens", engine.bundle.folder, "-i", files / "clip.mp4", "-p", "what?", *option, "--json")
        code, out, _ = siglance(*arguments)
        assert code == 0
        counts[option] = json.loads(out)
    assert "audio" not in counts[()]
    assert counts[("--sound",)]["video"] == counts[()]["video"] > 0
    assert counts[("--sound",)]["audio"] in (50, 51)  # 2 s, which AAC fills up to whole packets
    assert counts[("--sound",)] == engine.count_tokens([Video(files / "clip.mp4", sound=True), "what?"])
    code, out, _ = siglance(
        *("run", engine.bundle.folder, "-i", files / "clip.mp4", "--sound", "-p", "what?", "--max-tokens", 2),
        *("--temperature", 0, "--json"),
    )
    assert code == 0
    assert json.loads(out)["usage"]["by_modality"]["audio"] == counts[("--sound",)]["audio"]
    code, _, err = siglance("run", engine.bundle.folder, "-i", files / "silent.mp4", "--sound", "-p", "what?")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "video 1 (silent.mp4)" in err or "audio 1 (silent.mp4)" in err


def test_the_sound_of_a_video_in_a_chat(engine, files):
    arguments = ["chat", str(engine.bundle.folder), "--sound", "--max-tokens", "2", "--temperature", "0"]
    done = CliRunner().invoke(cli.app, arguments, input=f"/image {files}/clip.mp4\nwhat?\n")
    assert done.exit_code == 0
    seen = engine.count_tokens([Video(files / "clip.mp4", sound=True)])
    assert f"{seen['total'] - seen['text']} tokens, goes with the next message" in done.stderr


def test_the_demo_has_no_ears(siglance, files):
    code, _, err = siglance("run", "-i", files / "clip.mp4", "--sound", "-p", "what?")
    assert code == 1
    assert "does not know videos" in err
