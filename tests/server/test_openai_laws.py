"""Laws of OpenAI's protocol and NVIDIA's: any body is read or refused, the pieces of a reply make the whole."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from siglance.engine import ToolCall
from siglance.engine.errors import InputError
from siglance.engine.reply import Candidate, Chunk, Reply, StageClock, Usage
from siglance.engine.sampling import Effective
from siglance.engine.server.access import Access
from siglance.engine.server.failures import Failure
from siglance.engine.server.nim.asked import read_chat as read_nim
from siglance.engine.server.openai.config import Asked, read_chat
from siglance.engine.server.openai.replies import Answer
from siglance.engine.server.request import Request
from siglance.engine.server.service import Model
from siglance.engine.server.settings import Settings

ACCESS = Access(Settings())
PICTURE = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}, "strict": False}
BODY: dict[str, Any] = {
    "model": "demo",
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "b"},
                {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
                {
                    "type": "file",
                    "file": {"file_data": base64.b64encode(b"%PDF-1.4").decode(), "filename": "c"},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "d"}],
            "reasoning_content": "e",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"id": "2", "type": "function", "function": {"name": "f", "arguments": ""}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": "{}"},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": [{"type": "text", "text": "g"}]},
    ],
    "max_tokens": 7,
    "max_completion_tokens": 7,
    "temperature": 1.0,
    "top_p": 0.5,
    "top_k": -1,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": -100},
    "seed": -3,
    "stop": ["a", "b"],
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
    "reasoning_effort": "high",
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "user": "h",
    "metadata": {"i": "j"},
    "store": False,
    "modalities": ["text"],
    "service_tier": "auto",
}
NIM_BODY: dict[str, Any] = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f'a <img src="{PICTURE}" />'},
                {"type": "image_url", "image_url": {"url": PICTURE}},
            ],
        }
    ],
    "temperature": 0.5,
    "top_p": 0.5,
    "max_tokens": 5,
    "stream": True,
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(*path, key), *places(value[key], (*path, key))]]


@st.composite
def mutated(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """A body in which some values are others, or gone, or moved, or more."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(places(body) or [("messages",)]))
        parent = body
        for step in path:
            parent = parent[step]
        kind = draw(st.sampled_from(["change", "remove", "move", "add"]))
        if kind == "remove":
            if not isinstance(parent, dict) or key in parent:
                del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8) | st.sampled_from(list(BODY)))] = draw(VALUES)
        elif kind == "move":
            other: Any = body
            for step in draw(st.sampled_from(places(body) or [()])):
                other = other[step]
            parent[key] = copy.deepcopy(other)
        else:
            parent[key] = draw(VALUES)
    return body


class Names:
    """A service with one model, of which nothing is asked but its facts."""

    def __init__(self, demo):
        self._model = Model("demo", demo, 0)

    def model(self, name: str) -> Model:
        if name != "demo":
            raise Failure(404, "no such model", kind="not_found")
        return self._model


def outcome(read: Coroutine[Any, Any, Any]) -> Any:
    """What was asked, or why it was not."""
    try:
        return asyncio.run(read)
    except (Failure, InputError) as error:
        return error


def check(read: Coroutine[Any, Any, Any]) -> None:
    """A body is read, or refused with a status that says it is the caller's fault."""
    result = outcome(read)
    if isinstance(result, Failure):
        assert 400 <= result.status < 500
        assert result.message
    elif not isinstance(result, InputError):
        assert isinstance(result.request, Request)


def test_the_bodies_are_read(demo):
    asked = asyncio.run(read_chat(BODY, Names(demo), ACCESS))
    assert asked.stream
    assert not asked.request.parallel_tool_calls
    assert [turn.role for turn in asked.request.conversation] == ["system", "user", "assistant", "tool", "tool"]
    assert [type(part).__name__ for part in asked.request.conversation[1].parts] == ["Text", "Image", "Audio", "Pdf"]
    assert [turn.parts[0].result for turn in asked.request.conversation[3:]] == ["g", {}]  # in the order of the calls
    assert asked.request.sampling.seed == 2**64 - 3
    nim = asyncio.run(read_nim(NIM_BODY, ACCESS))
    assert [type(part).__name__ for part in nim.request.conversation[0].parts] == ["Text", "Image", "Image"]


# No place is reported as missing, because all are there: `read_chat` looks at every field.
@pytest.mark.parametrize("name", list(BODY))
def test_every_field_is_looked_at(demo, name):
    with pytest.raises(Failure) as caught:
        asyncio.run(read_chat(BODY | {name: {"x": {"y": 5}}}, Names(demo), ACCESS))
    assert (caught.value.field or "").startswith(name)


INPUTS = int(os.environ.get("SIGLANCE_FUZZ_INPUTS", "5000"))
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=150, **FUZZ)
@given(mutated(BODY))
@example({})
@example({"model": "demo", "messages": [{"role": "user", "content": [{"type": ["text"]}]}]})
def test_any_body_is_read_or_refused(demo, body):
    check(read_chat(body, Names(demo), ACCESS))


@settings(max_examples=100, **FUZZ)
@given(mutated(NIM_BODY))
def test_any_body_of_nvidias_is_read_or_refused(body):
    check(read_nim(body, ACCESS))


@pytest.mark.fuzz
@settings(max_examples=INPUTS, **FUZZ)
@given(mutated(BODY))
def test_any_body_is_read_or_refused_at_length(demo, body):
    check(read_chat(body, Names(demo), ACCESS))


@pytest.mark.fuzz
@settings(max_examples=INPUTS, **FUZZ)
@given(mutated(NIM_BODY))
def test_any_body_of_nvidias_is_read_or_refused_at_length(body):
    check(read_nim(body, ACCESS))


# -- pieces make the whole ---------------------------------------------------------------------------------------------

CALLS = st.builds(
    ToolCall, st.sampled_from(["f", "g"]), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
PIECES = st.lists(
    st.tuples(st.text(max_size=4), st.text(max_size=4), st.lists(CALLS, max_size=2).map(tuple)), max_size=5
)


def reply_of(candidates: list[list[tuple[str, str, tuple[ToolCall, ...]]]], reason: str) -> Reply:
    made = tuple(
        Candidate(
            text="".join(text for text, _, _ in pieces),
            thought="".join(thought for _, thought, _ in pieces),
            tool_calls=tuple(call for _, _, calls in pieces for call in calls),
            token_ids=(),
            finish_reason=reason,
            boxes=(),
            truncated=False,
            logprobs=None,
            forced_tokens=0,
            seed=0,
        )
        for pieces in candidates
    )
    return Reply(
        candidates=made,
        prompt_token_ids=(),
        usage=Usage(prompt_tokens=3, completion_tokens=4, by_modality={"text": 3}),
        timings=StageClock().timings(),
        sampling=Effective(temperature=0, top_k=0, top_p=1, min_p=0, seed=0),
        device="cpu",
        providers={},
    )


@settings(max_examples=100, **FUZZ)
@given(
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["stop_id", "stop_text", "length", "context"]),
)
def test_pieces_make_the_whole(demo, candidates, reason):
    request = Request(conversation=())
    asked = Asked(model=Model("demo", demo, 0), request=request, stream=True, include_usage=True, tier=False)
    reply = reply_of(candidates, reason)
    whole = Answer(asked).completion(reply)
    chunks = [
        Chunk(text, candidate=index, thought=thought, tool_calls=calls)
        for index, pieces in enumerate(candidates)
        for text, thought, calls in [*pieces, ("", "", ())]
    ]
    chunks.append(Chunk("", reply=reply, candidate=len(candidates) - 1))
    answer = Answer(asked)
    *events, last = [event for chunk in chunks for event in answer.events(chunk)]
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        said = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        deltas = [one["delta"] for one in said]
        assert [one["finish_reason"] for one in said] == [None] * (len(said) - 1) + [choice["finish_reason"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        message = choice["message"]
        assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message.get("reasoning_content", "")
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in calls] == list(range(len(calls)))
        expected = [call["function"] for call in message.get("tool_calls", ())]
        assert [call["function"] for call in calls] == expected
        assert all(isinstance(json.loads(function["arguments"]), dict) for function in expected)
        assert (choice["finish_reason"] == "length") == (reason in ("length", "context"))
        assert choice["finish_reason"] != "tool_calls" or calls
