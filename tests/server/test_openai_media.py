"""Media of requests to OpenAI's paths that are not read: refused by place; no answer is made up without them."""

from __future__ import annotations

import base64

import pytest

from siglance.engine import Engine
from siglance.engine.server import openai as protocol

from ..audio_files import tone, video_with_sound, wav
from ..pdf_files import numbered_pages
from .running import serving
from .test_openai_requests import HELLO, PATH, error_of, png, refused, uri
from .test_openai_requests import server as server  # a fixture


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("cat.png", 400, "only data:, file:, http:, https:"),
        ("", 400, "only data:"),
        ("https://example.com/cat.png", 403, "--allow-host"),
        ("http://127.0.0.1:8000/health", 403, "--allow-host"),
        ("file:///etc/passwd", 403, "--allow-dir"),
        ("ftp://example.com/cat.png", 400, "only data:"),
        ("data:image/png;base64,", 400, "empty"),
        ("data:image/png;base64,!", 400, "base64"),
        ("data:image/png,abc", 400, "base64"),
        (uri("image/png", b"no picture"), 400, "image 1"),
        (uri("image/png", numbered_pages(1)), 400, "is a PDF, expected a picture"),
        (uri("image/png", wav(tone(0.1, 16_000))), 400, "is a sound, expected a picture"),
        (uri("image/png", video_with_sound(0.2)), 400, "is a video, expected a picture"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_pictures_that_are_not_read(server, url, status, message):
    body = HELLO | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    assert message in refused(server, body, status)["message"]


@pytest.mark.parametrize("data", [b"no document", png()])
def test_files_that_are_no_pdf(server, data):
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": uri("application/pdf", data)}}
    error = error_of(server, [part])
    assert error["message"] == "messages[0].content[0].file.file_data is no PDF; other files are not read"


@pytest.mark.parametrize(("data", "form"), [(wav(tone(0.1, 16_000)), "mp3"), (b"ID3 is not RIFF", "wav")])
def test_sounds_of_another_format(server, data, form):
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}
    assert "is not what its format says" in error_of(server, [part])["message"]


@pytest.fixture(scope="module")
def reader(tiny_model):
    """A bundle that only reads."""
    with Engine(tiny_model("gemma3").bundle, threads=1) as engine:
        assert engine.manifest.modalities == ("text",)
        with serving({"reader": engine}, makers=[protocol.protocol]) as running:
            yield running


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": uri("image/png", png())}}, "no vision input"),
        ({"type": "image_url", "image_url": {"url": uri("image/png", png()), "detail": "low"}}, "no vision input"),
        ({"type": "file", "file": {"file_data": uri("application/pdf", numbered_pages(1))}}, "no vision input"),
        (
            {"type": "input_audio", "input_audio": {"data": uri("", wav(tone(0.1, 16_000)))[13:], "format": "wav"}},
            "no audio input",
        ),
    ],
)
def test_media_for_a_model_that_has_no_senses(reader, part, message):
    """Case 73."""
    content = [part, {"type": "text", "text": "What is this?"}]
    answer = reader.post(PATH, {"model": "reader", "messages": [{"role": "user", "content": content}]})
    assert answer.status == 400
    assert message in answer.json()["error"]["message"]
    assert reader.get("/v1/models").json()["data"][0]["modalities"] == ["text"]
