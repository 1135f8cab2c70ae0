"""Requests to OpenAI's paths as bytes on the wire: what no client would send, and the exact form of what comes back."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image as PillowImage

from siglance.engine import Image, Sampling, Text, Turn
from siglance.engine.server import openai as protocol

from ..scripted import picture
from .running import serving

PATH = "/v1/chat/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "describe"}]}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png() -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(picture()).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo, makers=[protocol.protocol]) as running:
        yield running


def refused(server, body: object, status: int = 400, **headers: str) -> dict:
    """The error, after a look at its shape."""
    answer = server.post(PATH, body, **headers)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    [(name, error)] = answer.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == {403: "permission_error"}.get(status, "invalid_request_error")
    return error


def error_of(server, content=None, message=None, **fields) -> dict:
    """The error of a request that is right but for some fields."""
    said = message or {"role": "user", "content": "describe" if content is None else content}
    return refused(server, {"model": "demo", "messages": [said], **fields})


# -- case 79: empty things ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "model", "model is missing"),
        ({"model": "demo"}, "messages", "messages is missing"),
        ({"model": None, "messages": []}, "model", "model is missing"),
        ({"model": 5, "messages": []}, "model", "model is 5, expected a text"),
        ({"model": "demo", "messages": []}, "messages", "messages is empty, it needs at least one message"),
        ({"model": "demo", "messages": {}}, "messages", "messages is an object, expected a list"),
        ({"model": "demo", "messages": ["hi"]}, "messages[0]", "messages[0] is 'hi', expected an object"),
        ({"model": "demo", "messages": [{}]}, "messages[0].role", "messages[0].role is missing"),
        ({"model": "demo", "messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
    ],
)
def test_missing_things(server, body, param, message):
    error = refused(server, body)
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize("content", ["", " ", "\n\t", [], [{"type": "text", "text": ""}]])
def test_empty_user_messages(server, content):
    assert "message 0: a user message needs text or a medium" in error_of(server, content)["message"]


def test_an_image_alone_and_empty_system_text_are_legal(server, demo):
    parts = [{"type": "image_url", "image_url": {"url": uri("image/png", png())}}]
    expected = demo.generate([Turn("user", Image(png()))], sampling=Sampling(temperature=0)).text
    for system in ([], [{"role": "system", "content": ""}], [{"role": "developer", "content": []}]):
        answer = server.post(PATH, {"model": "demo", "messages": [*system, {"role": "user", "content": parts}]})
        assert answer.status == 200
        assert answer.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["assistant"], "message 0: the conversation ends with the assistant, nothing to answer"),
        (["user", "assistant"], "message 1: the conversation ends with the assistant, nothing to answer"),
        (["user", "system", "user"], "message 1: a system message must come before all others"),
    ],
)
def test_histories_that_cannot_be_answered(server, roles, message):
    error = error_of(server, messages=[{"role": role, "content": "a"} for role in roles])
    assert error["message"] == message


def test_system_messages_alone_are_answered(server):
    said = [{"role": "system", "content": "a"}, {"role": "system", "content": " "}]
    assert server.post(PATH, {"model": "demo", "messages": said, "max_tokens": 2}).status == 200


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True, [], {}])
def test_limits_that_are_none(server, name, value):
    error = error_of(server, **{name: value})
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is ")


@pytest.mark.parametrize("value", [10**9, 1e9, 10**30])
def test_a_limit_beyond_the_context(server, value):
    answer = server.post(PATH, HELLO | {"max_tokens": value})
    assert answer.status == 200
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


def test_two_limits(server):
    assert server.post(PATH, HELLO | {"max_tokens": 2, "max_completion_tokens": 2}).status == 200
    assert "give one of them" in error_of(server, max_tokens=2, max_completion_tokens=3)["message"]


@pytest.mark.parametrize("body", [b"", b"describe", b"{", b"[]", b"null", b'"a"', b"\xff", b'{"model": NaN}'])
def test_bodies_that_are_no_object(server, body):
    assert "the body" in refused(server, body)["message"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", ""])
def test_other_content_types(server, kind):
    assert "application/json" in refused(server, b"{}", 415, content_type=kind)["message"]


def test_unknown_model(server):
    error = refused(server, HELLO | {"model": "gpt-4o"}, 404)
    assert error == {
        "message": "there is no model 'gpt-4o'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [("/v1/nothing", 404, "not_found"), ("/v1/models/gpt-4o", 404, "model_not_found")],
)
def test_unknown_paths(server, path, status, code):
    answer = server.get(path)
    assert (answer.status, answer.json()["error"]["code"]) == (status, code)


def test_other_methods(server):
    answer = server.get(PATH)
    assert (answer.status, answer.json()["error"]["code"]) == (405, "method_not_allowed")


# -- refused by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"foo": None}, "foo"),
        ({"guided_json": {}}, "guided_json"),
        ({"functions": []}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"moderation": {}}, "moderation"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"prompt_cache_options": {}}, "prompt_cache_options"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"store": True}, "store"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"foo": True}}, "stream_options.foo"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": None}}, "logit_bias.1"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": "weather"}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{}]}}},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}},
            "tool_choice.allowed_tools.tools[0].type",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "foo": 1}}]}, "tools[0].function.foo"),
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}, "description": "y"},
                }
            },
            "response_format.json_schema.description",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fields_are_refused_by_name(server, fields, param):
    error = error_of(server, **fields)
    assert error["param"] == param
    assert param.split("[")[0].split(".")[-1] in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "name": "x", "content": "y"}, "role"),
        ({"role": "user", "content": "a", "name": "Bob"}, "name"),
        ({"role": "user", "content": "a", "foo": 1}, "foo"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": ["a"]}, "content[0]"),
        ({"role": "user", "content": [{"text": "a"}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}, "content[0].foo"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "content[0].type"),
        ({"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content[0].type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0].image_url.url"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "most"}}]},
            "content[0].image_url.detail",
        ),
        ({"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}, "content[0].file.file_id"),
        ({"role": "user", "content": [{"type": "file", "file": {"filename": "x"}}]}, "content[0].file.file_data"),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "flac"}}]},
            "content[0].input_audio.format",
        ),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "audio"),
        ({"role": "assistant", "function_call": {"name": "x", "arguments": ""}}, "function_call"),
        ({"role": "assistant", "content": "a", "annotations": [{}]}, "annotations"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [CALL, CALL]}, "tool_calls[1].id"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x", "arguments": "{"}}]},
            "tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x", "arguments": "[]"}}]},
            "tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "a b", "arguments": "{}"}}]},
            "tool_calls[0].function",
        ),
        ({"role": "tool", "content": "a"}, "tool_call_id"),
        ({"role": "tool", "tool_call_id": "a", "content": "b"}, "tool_call_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_parts_of_messages_are_refused_by_name(server, message, param):
    assert error_of(server, message=message)["param"] == f"messages[0].{param}"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([CALLING, CALLING], "messages[2].tool_calls"),
        ([CALLING, {"role": "tool", "tool_call_id": "b", "content": "x"}], "messages[2].tool_call_id"),
        ([CALLING, *[{"role": "tool", "tool_call_id": "a", "content": "x"}] * 2], "messages[3].tool_call_id"),
        ([CALLING, {"role": "tool", "tool_call_id": "a", "name": "other", "content": "x"}], "messages[2].name"),
        (
            [CALLING, {"role": "user", "content": "b"}, {"role": "tool", "tool_call_id": "a", "content": "x"}],
            "messages[3].tool_call_id",
        ),
    ],
)
def test_results_without_a_call(server, messages, param):
    error = refused(server, HELLO | {"messages": [*HELLO["messages"], *messages]})
    assert error["param"] == param


def test_thinking_and_tools_of_a_bundle_without_them(server):
    """Its model marks thoughts, its template does not know them."""
    assert "thinking" in error_of(server, reasoning_effort="low")["message"]
    tool = {"type": "function", "function": {"name": "x"}}
    assert "tools" in error_of(server, tools=[tool])["message"]
    assert server.post(PATH, HELLO | {"reasoning_effort": "none", "tools": [], "tool_choice": "auto"}).status == 200


def test_a_bias_beyond_the_vocabulary(server):
    assert "the token id 99999999" in error_of(server, logit_bias={"99999999": 1})["message"]


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}])
def test_schemas_that_cannot_be_used(server, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "JSON schema" in error_of(server, response_format=form)["message"]


# -- on the wire -------------------------------------------------------------------------------------------------------


def events_of(body: bytes) -> list[str]:
    """The data of events, each of one line."""
    blocks = body.decode("ascii").split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


@pytest.mark.parametrize("usage", [True, False, None])
def test_events(server, usage):
    """Case 38."""
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    answer = server.post(PATH, HELLO | {"stream": True, **options})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = events_of(answer.body)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert ["usage" in chunk for chunk in chunks] == [bool(usage)] * len(chunks)
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


def test_events_of_a_reply_without_text(server, demo):
    """Case 38: it stops before its first token."""
    text = demo.generate([Turn("user", Text("describe"))], sampling=Sampling(temperature=0)).text
    answer = server.post(PATH, HELLO | {"stream": True, "stop": text[0]})
    *events, done = events_of(answer.body)
    chunks = [json.loads(event)["choices"][0] for event in events]
    assert [(chunk["delta"], chunk["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({}, "stop"),
    ]
    assert done == "[DONE]"
    whole = server.post(PATH, HELLO | {"stop": text[0]}).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("", "stop")


def test_requests_do_not_disturb_each_other(server, demo):
    """Seeds are each request's own: the same answers in another order."""
    seeds = [1, 2, 1, 3, 2]
    bodies = [HELLO | {"temperature": 1.5, "seed": seed, "max_tokens": 12} for seed in seeds]
    texts = [server.post(PATH, body).json()["choices"][0]["message"]["content"] for body in bodies]
    for seed, text in zip(seeds, texts, strict=True):
        sampling = Sampling(temperature=1.5, seed=seed)
        assert text == demo.generate([Turn("user", Text("describe"))], sampling=sampling, max_tokens=12).text
