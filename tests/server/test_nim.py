"""NVIDIA's endpoint: curl and plain HTTP, as NVIDIA's own samples call it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import uuid

import numpy as np
import pytest
from PIL import Image as PillowImage

from siglance.engine import Image, Sampling, Text, Turn
from siglance.engine.server import nim
from siglance.engine.server.access import Access
from siglance.engine.server.nim.asked import read_chat
from siglance.engine.server.settings import Settings

from ..audio_files import tone, wav
from ..pdf_files import numbered_pages
from ..scripted import picture
from .running import Running, serving

PATH = "/v1/vlm/google/paligemma"
GREEDY = {"temperature": 1e-9, "top_p": 1e-9}


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "png")
    return file.getvalue()


ONE, TWO = png(picture(0)), png(picture(1))


def message(content: object, **fields: object) -> dict:
    return {"messages": [{"role": "user", "content": content}], **fields}


def parts(*items: str | bytes) -> list[dict]:
    return [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "image_url", "image_url": {"url": uri(item)}}
        for item in items
    ]


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo, makers=[nim.protocol]) as running:
        yield running


def said(demo, *items, **options) -> str:
    return demo.generate([Turn("user", list(items))], sampling=Sampling(temperature=0), **options).text


def ask(server: Running, body: object) -> dict:
    answer = server.post(PATH, body)
    assert answer.status == 200, answer.body
    return answer.json()


def text_of(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


def curl(server: Running, *arguments: str, path: str = PATH, data: str | None = None) -> tuple[int, str]:
    """The status and the body that curl prints."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")
    command = [program, "--silent", "--no-buffer", "--noproxy", "*", "--write-out", "\n%{http_code}", *arguments]
    if data is not None:
        command += ["--header", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(
        [*command, server.url + path],
        input=data,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


# -- curl --------------------------------------------------------------------------------------------------------------


def test_curl_chat(server, demo):
    body = json.dumps(message(parts("describe", ONE), **GREEDY))
    status, text = curl(server, "--header", "Accept: application/json", data=body)
    reply = json.loads(text)
    assert status == 200
    assert set(reply) == {"id", "choices", "usage"}
    assert str(uuid.UUID(reply["id"])) == reply["id"]
    expected = said(demo, Text("describe"), Image(ONE))
    assert reply["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": expected}, "finish_reason": "stop"}
    ]
    usage = reply["usage"]
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_curl_stream(server, demo):
    body = json.dumps(message(parts("describe", ONE), stream=True, **GREEDY))
    status, text = curl(server, "--header", "Accept: text/event-stream", data=body)
    assert status == 200
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta["content"] for delta in deltas) == said(demo, Text("describe"), Image(ONE))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert ["usage" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_curl_picture_in_the_text(server, demo):
    body = json.dumps(message(f'What is in this image? <img src="{uri(ONE)}" />', **GREEDY))
    status, text = curl(server, data=body)
    assert status == 200
    assert text_of(json.loads(text)) == said(demo, Text("What is in this image?"), Image(ONE))


def test_curl_error(server):
    status, text = curl(server, data="{}")
    assert status == 422
    assert json.loads(text)["detail"] == "messages is missing"


@pytest.mark.parametrize("state", ["live", "ready"])
def test_curl_health(server, state):
    status, text = curl(server, path=f"/v1/health/{state}")
    assert (status, json.loads(text)) == (200, {"object": "health.response", "message": f"Service is {state}."})


def test_curl_key(demo):
    """Probes come without one."""
    with serving(demo, Settings(api_keys=("sesame",)), makers=[nim.protocol]) as running:
        assert [curl(running, path=f"/v1/health/{state}")[0] for state in ("live", "ready", "other")] == [200, 200, 401]
        body = json.dumps(message("describe"))
        assert curl(running, "--header", "Authorization: Bearer sesame", data=body)[0] == 200
        status, text = curl(running, "--header", "Authorization: Bearer wrong", data=body)
        assert (status, json.loads(text)["title"]) == (401, "Unauthorized")


# -- what a message may hold -------------------------------------------------------------------------------------------


def test_order_of_parts(server, demo):
    """Case 68, in both forms."""
    expected = said(demo, Text("before"), Image(ONE), Text("between"), Image(TWO), Text("after"))
    assert text_of(ask(server, message(parts("before", ONE, "between", TWO, "after"), **GREEDY))) == expected
    written = f'before <img src="{uri(ONE)}" /> between\n<img src="{uri(TWO)}"> after'
    assert text_of(ask(server, message(written, **GREEDY))) == expected
    mixed = [{"type": "text", "text": f'before <img src="{uri(ONE)}"/>between'}, *parts(TWO, "after")]
    assert text_of(ask(server, message(mixed, **GREEDY))) == expected
    other = said(demo, Text("before"), Image(TWO), Text("between"), Image(ONE), Text("after"))
    assert other != expected


@pytest.mark.parametrize("tag", ['<img src="{}" />', '<img src="{}"/>', '<img src="{}">', "<IMG  SRC='{}' >"])
def test_forms_of_the_tag(server, demo, tag):
    expected = said(demo, Image(ONE), Text("describe"))
    assert text_of(ask(server, message(tag.format(uri(ONE)) + "\ndescribe", **GREEDY))) == expected


@pytest.mark.parametrize(
    "text",
    [
        'What does <img src="cat.png"> do?',
        "<img>",
        '<img alt="x">',
        "a < b",
        '<img src="data:image/png;base64,AA',
        "<img src=\"data:image/png;base64,AA'>",
    ],
)
def test_text_about_html_stays_text(server, demo, text):
    assert text_of(ask(server, message(text, **GREEDY))) == said(demo, Text(text))


def test_a_picture_alone(server, demo):
    assert text_of(ask(server, message(f'<img src="{uri(ONE)}" />', **GREEDY))) == said(demo, Image(ONE))


def test_many_open_tags_take_no_time(server):
    """A pattern that looks back and forth would take minutes."""
    text = '<img src="data:' * 5_000 + "<img " * 5_000 + "<img src" + " " * 5_000
    assert server.post(PATH, message(text)).status == 422  # as a prompt it is too long


def test_defaults():
    """Absent and null are the same."""
    for body in (message("describe"), message("describe", temperature=None, top_p=None, max_tokens=None, stream=None)):
        asked = asyncio.run(read_chat(body, Access(Settings())))
        assert asked.request.sampling == Sampling(temperature=0.2, top_p=0.7)
        assert asked.request.max_tokens == 1024
        assert not asked.stream


def test_max_tokens(server, demo):
    reply = ask(server, message("describe", max_tokens=3, **GREEDY))
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


def problem(answer) -> str:
    """The detail of an error, after a look at its shape."""
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == answer.status
    return body["detail"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages has 0 messages, it must have exactly 1"),
        ({"messages": message("a")["messages"] * 2}, "messages has 2 messages, it must have exactly 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is missing"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "messages[0].role is 'assistant', expected one of user",
        ),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name is not known"),
        (message(5), "messages[0].content must be a text or a list of parts"),
        (message(""), "message 0: a user message needs text or a medium"),
        (message(" "), "message 0: a user message needs text or a medium"),
        (message([]), "message 0: a user message needs text or a medium"),
        (message([{}]), "messages[0].content[0].type is missing"),
        (message([{"type": "text"}]), "messages[0].content[0].text is missing"),
        (message([{"type": "audio"}]), "messages[0].content[0].type is 'audio', expected one of text, image_url"),
        (message([{"type": "image_url"}]), "messages[0].content[0].image_url is missing"),
        (message([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].image_url.url is missing"),
        (
            message([{"type": "image_url", "image_url": {"url": uri(ONE), "detail": "low"}}]),
            "messages[0].content[0].image_url.detail is not known",
        ),
        (message("a", model="x"), "model is not known"),
        (message("a", stop="x"), "stop is not known"),
        (message("a", seed=1), "seed is not known"),
        (message("a", temperature=0), "temperature is 0, it must be above 0"),
        (message("a", temperature=1.1), "temperature is 1.1, it must be between 0 and 1"),
        (message("a", top_p=0), "top_p is 0, it must be above 0"),
        (message("a", top_p=2), "top_p is 2, it must be between 0 and 1"),
        (message("a", max_tokens=0), "max_tokens is 0, it must be between 1 and 1024"),
        (message("a", max_tokens=1025), "max_tokens is 1025, it must be between 1 and 1024"),
        (message("a", max_tokens=1.5), "max_tokens is 1.5, expected an integer between 1 and 1024"),
        (message("a", max_tokens="10"), "max_tokens is '10', expected an integer between 1 and 1024"),
        (message("a", stream="yes"), "stream is 'yes', expected true or false"),
    ],
)
def test_bodies_that_are_refused(server, body, detail):
    answer = server.post(PATH, body)
    assert answer.status == 422
    assert problem(answer) == detail


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_bodies_that_are_no_object(server, body):
    answer = server.post(PATH, body)
    assert answer.status == 422
    assert "the body" in problem(answer)


def test_other_content_types(server):
    answer = server.post(PATH, b"{}", content_type="text/plain")
    assert answer.status == 415
    assert "application/json" in problem(answer)


@pytest.mark.parametrize(
    ("url", "status", "detail"),
    [
        ("https://example.com/cat.png", 403, "--allow-host"),
        ("file:///etc/passwd", 403, "--allow-dir"),
        ("data:image/png;asset_id,1234", 422, "not a data URI in base64"),
        ("data:image/png;base64,AAAA", 422, "image 1"),
        (uri(numbered_pages(1)), 422, "is a PDF, expected a picture"),
        (uri(wav(tone(0.1, 16_000))), 422, "is a sound, expected a picture"),
    ],
)
@pytest.mark.parametrize("written", [True, False])
def test_pictures_that_are_not_read(server, url, status, detail, written):
    """Also where they are written into the text: no answer is made up without them (case 73)."""
    content = f'<img src="{url}" />' if written else [{"type": "image_url", "image_url": {"url": url}}]
    answer = server.post(PATH, message(content))
    assert answer.status == status
    assert detail in problem(answer)


def test_limits_of_pictures(server):
    """180,000 characters of base64, as an own limit; 204,800 of a URL."""

    def padded(characters: int) -> str:
        """A picture whose base64 has that many characters: behind its end a PNG may have anything."""
        return uri(ONE + b"\0" * (characters // 4 * 3 - len(ONE)))

    for form in (lambda url: [{"type": "image_url", "image_url": {"url": url}}], lambda url: f"<img src='{url}'>"):
        assert server.post(PATH, message(form(padded(180_000)))).status == 200
        answer = server.post(PATH, message(form(padded(180_004))))
        assert answer.status == 422
        assert "has 180004 characters of base64, over the limit of 180000" in problem(answer)
    long = [{"type": "image_url", "image_url": {"url": "data:" + "x" * 204_796}}]
    assert "has 204801 characters, over the limit of 204800" in problem(server.post(PATH, message(long)))
    text = [{"type": "text", "text": "x" * 204_801}]
    assert "has 204801 characters, over the limit of 204800" in problem(server.post(PATH, message(text)))


# -- which bundle answers ----------------------------------------------------------------------------------------------


def test_the_only_bundle_answers(server):
    assert server.post("/v1/vlm/any/thing", message("describe")).status == 200
    answer = server.post("/v1/vlm/demo", message("describe"))
    assert answer.status == 404
    assert problem(answer) == "there is nothing at this path"
    assert server.get(PATH).status == 405


def test_one_of_several_bundles_answers(demo):
    with serving({"one": demo, "google/two": demo}, makers=[nim.protocol]) as running:
        assert running.post("/v1/vlm/any/one", message("describe")).status == 200
        assert running.post("/v1/vlm/google/two", message("describe")).status == 200
        answer = running.post(PATH, message("describe"))
        assert answer.status == 404
        assert problem(answer) == "there is no model 'google/paligemma'"
