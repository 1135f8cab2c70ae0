"""Nothing long runs in the event loop: /health answers while a body is parsed, read, or its files are decoded."""

from __future__ import annotations

import threading

import pytest

from siglance.engine.server import access, bodies
from siglance.engine.server.gemini import config as gemini
from siglance.engine.server.nim import asked as nim
from siglance.engine.server.openai import config as openai

from ..picture_files import png
from .running import Running, serving
from .toy import as_base64

PICTURE = as_base64(png(8, 8, 8, 0, bytes(72)) + bytes(300_000))
PARTS = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]
REQUESTS = {
    "gemini": ("/v1beta/models/demo:generateContent", {"contents": [{"parts": [{"text": "hi"}]}]}),
    "gemini files": (
        "/v1beta/models/demo:countTokens",
        {"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": PICTURE}}]}]},
    ),
    "openai": ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}),
    "openai files": (
        "/v1/chat/completions",
        {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": PARTS}]},
    ),
    "nim": ("/v1/vlm/google/demo", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
}
WORK = [
    ("openai files", bodies, "parse_object"),
    ("gemini", gemini, "read_contents"),
    ("gemini files", access.Access, "base64"),
    ("openai", openai, "read_messages"),
    ("openai files", access.Access, "data_uri"),
    ("nim", nim, "_turn"),
]


@pytest.fixture(scope="module")
def own(demo):
    with serving(demo) as running:
        yield running


@pytest.mark.parametrize(("request_name", "place", "name"), WORK)
def test_health_answers_meanwhile(own: Running, monkeypatch, request_name, place, name):
    begun, go_on = threading.Event(), threading.Event()
    work = getattr(place, name)

    def held(*arguments):
        begun.set()
        assert go_on.wait(30)
        return work(*arguments)

    monkeypatch.setattr(place, name, held)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(own.post(*REQUESTS[request_name])))
    asking.start()
    try:
        assert begun.wait(30)
        assert own.get("/health").status == 200
    finally:
        go_on.set()
        asking.join(30)
    assert answers[0].status == 200
