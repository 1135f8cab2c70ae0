"""OpenAI's client against our server: each test is a row of the client matrix, its parameter a column."""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Literal

import openai
import pydantic
import pytest
from PIL import Image as PillowImage

from siglance.engine import Audio, Engine, Image, Pdf, Sampling, Text, Turn
from siglance.engine.server import openai as protocol
from siglance.engine.server.settings import Settings

from ..audio_files import encoded, tone, wav
from ..pdf_files import numbered_pages
from ..scripted import picture
from .openai_clients import COLUMNS, connected, joined
from .running import serving

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def server(demo):
    """The demo behind OpenAI's protocol."""
    with serving(demo, makers=[protocol.protocol]) as running:
        yield running


@pytest.fixture(scope="module", params=COLUMNS)
def client(request, server):
    with connected(server.url, request.param) as client:
        yield client


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def png() -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(picture()).save(file, "png")
    return file.getvalue()


def image_part(png: bytes, **fields: str) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri("image/png", png), **fields}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def said(demo, *parts, **options) -> str:
    """What the engine says itself."""
    return demo.generate([Turn("user", list(parts))], sampling=GREEDY, **options).text


def test_chat(client, demo):
    completion = client.complete()
    [choice] = completion.choices
    assert choice.message.content == said(demo, Text("describe"))
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert (completion.object, completion.model) == ("chat.completion", "demo")
    assert completion.id.startswith("chatcmpl-")
    assert completion.id != client.complete().id
    assert completion.system_fingerprint == client.complete("count").system_fingerprint


def test_usage(client, demo, png):
    usage = client.complete([image_part(png), text_part("count")]).usage
    reply = demo.generate([Turn("user", [Image(png), Text("count")])], sampling=GREEDY)
    assert usage.prompt_tokens == reply.usage.prompt_tokens
    assert usage.completion_tokens == reply.usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.text_tokens, details.audio_tokens) == (
        reply.usage.by_modality["image"],
        reply.usage.by_modality["text"],
        0,
    )
    again = client.complete([image_part(png), text_part("count")]).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens
    assert again.completion_tokens_details.reasoning_tokens == 0


def test_stream(client):
    whole, chunks = client.complete(), client.stream()
    assert joined(chunks) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk")
    }
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_include_usage(client):
    *chunks, last = client.stream(stream_options={"include_usage": True})
    whole = client.complete()
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    without = client.stream(stream_options={"include_usage": False})
    assert all(chunk.choices for chunk in without)


def test_stream_helper(client):
    """The client puts pieces together as it finds the whole."""
    together = client.put_together(stream_options={"include_usage": True})
    whole = client.complete()
    assert together.choices[0].message.content == whole.choices[0].message.content
    assert together.choices[0].finish_reason == "stop"
    assert together.usage.total_tokens == whole.usage.total_tokens


def test_conversation(client, demo):
    """System and developer messages, and what the assistant said before, given back as the client gives it."""
    first = client.complete("count").choices[0].message
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "count"},
        first,
        {"role": "user", "content": [text_part("de"), text_part("scribe")]},
    ]
    turns = [Turn("user", Text("count")), Turn("assistant", Text(first.content)), Turn("user", Text("describe"))]
    expected = demo.generate(turns, system="Be brief.", sampling=GREEDY)
    completion = client.complete(messages)
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original"])
def test_vision(client, demo, png, detail):
    """`detail` chooses the budget: the bundle's default, smallest or largest."""
    budgets = demo.manifest.image.budgets
    tokens = {"auto": None, "low": budgets[0]}.get(detail, budgets[-1])
    completion = client.complete([image_part(png, detail=detail), text_part("describe")])
    expected = demo.generate([Turn("user", [Image(png, tokens=tokens), Text("describe")])], sampling=GREEDY)
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens_details.image_tokens == expected.usage.by_modality["image"]


def test_vision_keeps_the_order_of_parts(client, demo, png):
    """Case 68."""
    parts = [text_part("before"), image_part(png), text_part("after"), image_part(png), text_part("end")]
    ours = [Text("before"), Image(png), Text("after"), Image(png), Text("end")]
    completion = client.complete(parts)
    assert completion.choices[0].message.content == said(demo, *ours)
    assert completion.choices[0].message.content != said(demo, *sorted(ours, key=lambda part: isinstance(part, Text)))


def test_pdf_file(client, demo):
    document = numbered_pages(2)
    file = {"filename": "pages.pdf", "file_data": data_uri("application/pdf", document)}
    completion = client.complete([{"type": "file", "file": file}, text_part("describe")])
    expected = demo.generate([Turn("user", [Pdf(document), Text("describe")])], sampling=GREEDY)
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens_details.image_tokens == expected.usage.by_modality["document"]
    plain = {"file_data": base64.b64encode(document).decode()}
    again = client.complete([{"type": "file", "file": plain}, text_part("describe")])
    assert again.choices[0].message.content == expected.text


@pytest.fixture(scope="module")
def ears(tiny_model):
    """A bundle that hears."""
    engine = Engine(tiny_model("gemma4_audio").bundle, threads=1)
    with engine, serving({"ears": engine}, makers=[protocol.protocol]) as running:
        yield running


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ["wav", "mp3"])
def test_audio(ears, column, name):
    data = wav(tone(0.5, 16_000)) if name == "wav" else encoded("mp3")
    part = {"type": "input_audio", "input_audio": {"data": as_base64(data), "format": name}}
    with connected(ears.url, column) as client:
        completion = client.complete([part, text_part("hi")], model="ears", max_tokens=3, temperature=0)
    engine = ears.service.models[0].engine
    expected = engine.generate([Turn("user", [Audio(data), Text("hi")])], sampling=GREEDY, max_tokens=3)
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens_details.audio_tokens == expected.usage.by_modality["audio"] > 0


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_audio_is_refused_by_a_bundle_that_does_not_hear(client):
    part = {"type": "input_audio", "input_audio": {"data": as_base64(wav(tone(0.1, 16_000))), "format": "wav"}}
    with pytest.raises(openai.BadRequestError, match="this bundle has no audio input"):
        client.complete([part, text_part("hi")])


class Colour(pydantic.BaseModel):
    name: Literal["red", "green", "blue"]
    bright: bool


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["red", "green"]}, "bright": {"type": "boolean"}},
    "required": ["name", "bright"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("strict", [True, False, None])
def test_json_schema(client, strict):
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": strict}}
    completion = client.complete(response_format=form)
    answer = json.loads(completion.choices[0].message.content)
    assert answer["name"] in ("red", "green")
    assert isinstance(answer["bright"], bool)
    assert completion.choices[0].finish_reason == "stop"
    assert joined(client.stream(response_format=form)) == completion.choices[0].message.content


def test_parse_with_pydantic(client):
    parsed = client.parse(response_format=Colour).choices[0].message.parsed
    assert isinstance(parsed, Colour)
    assert client.put_together(response_format=Colour).choices[0].message.parsed == parsed


def test_json_object(client):
    completion = client.complete(response_format={"type": "json_object"}, max_tokens=200)
    text = completion.choices[0].message.content
    assert text.startswith("{")
    if completion.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_json_that_is_cut(client):
    """Case 70: what there is comes back, with the reason; the client's own parser then says so."""
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    completion = client.complete(response_format=form, max_tokens=3)
    assert completion.choices[0].message.content.startswith('{"')
    assert completion.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.parse(response_format=Colour, max_tokens=3)


def test_response_format_text(client, demo):
    assert client.complete(response_format={"type": "text"}).choices[0].message.content == said(demo, Text("describe"))


def test_logprobs(client, demo):
    choice = client.complete(logprobs=True, top_logprobs=3).choices[0]
    expected = demo.generate([Turn("user", Text("describe"))], sampling=GREEDY, logprobs=3).logprobs
    content = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == choice.message.content
    assert "".join(one.token for one in content) == choice.message.content
    for one, ours in zip(content, expected, strict=True):
        assert math.isclose(one.logprob, ours.logprob, abs_tol=1e-4)
        assert [other.token for other in one.top_logprobs] == [other.text for other in ours.top]
        assert one.top_logprobs[0].token == one.token  # greedy
    streamed = client.stream(logprobs=True, top_logprobs=3)
    pieces = [choice.logprobs for chunk in streamed for choice in chunk.choices if choice.logprobs]
    assert [one.token for piece in pieces for one in piece.content] == [one.token for one in content]
    bare = client.complete(logprobs=True).choices[0].logprobs.content
    assert all(one.top_logprobs == [] for one in bare)


def test_n(client, demo):
    options = {"n": 3, "temperature": 1.5, "seed": 5}
    completion = client.complete(**options)
    expected = demo.generate([Turn("user", Text("describe"))], sampling=Sampling(temperature=1.5, seed=5), candidates=3)
    texts = [candidate.text for candidate in expected.candidates]
    assert [choice.message.content for choice in completion.choices] == texts
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    chunks = client.stream(**options)
    assert [joined(chunks, index) for index in range(3)] == texts
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    roles = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert sorted(ends) == sorted(roles) == [0, 1, 2]


def test_seed(client, demo):
    def texts(**options):
        options |= {"temperature": 1.8, "max_tokens": 20}
        return [client.complete(**options).choices[0].message.content for _ in range(2)]

    one, same = texts(seed=1)
    assert one == same
    sampling = Sampling(temperature=1.8, seed=1)
    assert one == demo.generate([Turn("user", Text("describe"))], sampling=sampling, max_tokens=20).text
    assert texts(seed=2)[0] != one
    negative, again = texts(seed=-1)
    assert negative == again


def test_sampling(client, demo):
    """Temperature, top_p and penalties, and what other servers take in `extra_body`."""
    options = {"temperature": 1.2, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 3}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    expected = demo.generate([Turn("user", Text("describe"))], sampling=Sampling(**options, **extra))
    assert client.complete(**options, extra_body=extra).choices[0].message.content == expected.text


def test_logit_bias(client, demo):
    first = demo.generate([Turn("user", Text("describe"))], sampling=GREEDY).token_ids[0]
    expected = demo.generate(
        [Turn("user", Text("describe"))], sampling=Sampling(temperature=0, logit_bias={first: -100})
    )
    completion = client.complete(logit_bias={str(first): -100})
    assert completion.choices[0].message.content == expected.text != said(demo, Text("describe"))


@pytest.mark.parametrize("stop", ["word", ["word"], ["none of it", "word", "a", "b"]])
def test_stop(client, demo, stop):
    text = said(demo, Text("describe"))
    word = text.split()[2]
    stop = word if stop == "word" else [word if one == "word" else f"\0{one}" for one in stop]
    completion = client.complete(stop=stop)
    assert completion.choices[0].message.content == text[: text.index(word)]
    assert completion.choices[0].finish_reason == "stop"
    assert joined(client.stream(stop=stop)) == completion.choices[0].message.content


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client, demo, name):
    completion = client.complete(**{name: 3})
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 3
    assert completion.choices[0].message.content == said(demo, Text("describe"), max_tokens=3)
    assert client.stream(**{name: 3})[-1].choices[0].finish_reason == "length"


def test_bookkeeping_changes_nothing(client, demo):
    completion = client.complete(
        user="me",
        metadata={"run": "7"},
        store=False,
        safety_identifier="a",
        prompt_cache_key="b",
        service_tier="auto",
        modalities=["text"],
        parallel_tool_calls=True,
    )
    assert completion.choices[0].message.content == said(demo, Text("describe"))
    assert completion.service_tier == "default"


def test_models_list(client):
    [model] = client.models()
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "siglance")
    assert model.model_extra == {"modalities": ["text", "image"], "context_length": 2048}


def test_models_retrieve(client):
    assert client.model("demo").id == client.model("default").id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.model("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_request(client, streamed):
    """The client has the error before a stream begins."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.complete(temperature=2.5, stream=streamed)
    error = caught.value
    assert error.status_code == 400
    assert (error.type, error.param, error.code) == ("invalid_request_error", "temperature", None)
    assert error.body["message"] == "temperature is 2.5, it must be between 0 and 2"


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'") as caught:
        client.complete(model="gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_that_does_not_fit(client):
    with pytest.raises(openai.BadRequestError, match="the context of this bundle holds 2048") as caught:
        client.complete("many words " * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_remote_pictures_are_refused(client):
    part = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.complete([part, text_part("describe")])
    assert caught.value.param == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("column", COLUMNS)
def test_key(demo, column):
    with serving(demo, Settings(api_keys=("sesame",)), makers=[protocol.protocol]) as running:
        with connected(running.url, column, "sesame") as client:
            assert client.complete().choices[0].message.content == said(demo, Text("describe"))
        with connected(running.url, column, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.complete()
            assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")
