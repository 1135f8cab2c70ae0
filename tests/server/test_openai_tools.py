"""Functions and thoughts through OpenAI's client, with a model that says what the test tells it to."""

from __future__ import annotations

import enum
import json

import openai
import pydantic
import pytest

from siglance.engine.server import openai as protocol

from .openai_clients import COLUMNS, connected, joined
from .running import serving
from .scripted_server import Actor

CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
ROME = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nhmm\n<channel|>"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS},
}
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather of a city<|"|>,parameters:{properties:{city:{description:<|"|>'
    'where<|"|>,type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
ASKED = {"role": "user", "content": "Is it warm in Paris?"}


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    actor = Actor(tmp_path_factory.mktemp("tools"))
    yield actor
    actor.close()


@pytest.fixture(scope="module")
def stage(actor):
    with serving({"actor": actor.engine}, makers=[protocol.protocol]) as running:
        yield running


@pytest.fixture(scope="module", params=COLUMNS)
def client(request, stage):
    with connected(stage.url, request.param) as client:
        yield client


def ask(client, *messages, **options):
    return client.complete(list(messages) or [ASKED], model="actor", **options)


def test_tools(client, actor):
    actor.says(CALL)
    [choice] = ask(client, tools=[WEATHER]).choices
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Paris"},
    )
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert DECLARED in actor.heard[0]


def test_tools_that_are_not_needed(client, actor):
    actor.says("It is.")
    [choice] = ask(client, tools=[WEATHER], tool_choice="auto").choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is.", None, "stop")


def test_tools_in_a_stream(client, actor):
    actor.says(f"Let me see.{CALL}{ROME}")
    chunks = client.stream([ASKED], model="actor", tools=[WEATHER])
    assert joined(chunks) == "Let me see."
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    actor.says(f"Let me see.{CALL}{ROME}")
    [choice] = client.put_together([ASKED], model="actor", tools=[WEATHER]).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]


def test_tools_round_trip(client, actor):
    """What the client has received goes back as it is; results find their calls by id, whatever their order."""
    actor.says(f"Let me see.{CALL}{ROME}")
    said = ask(client, tools=[WEATHER]).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"in": json.loads(call.function.arguments)})}
        for call in reversed(said.tool_calls)
    ]
    actor.says("Warm in both.")
    answer = ask(client, ASKED, said, *results, tools=[WEATHER]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Warm in both.", "stop")
    [prompt] = actor.heard
    assert prompt.index(CALL) < prompt.index(ROME) < prompt.index('<|"|>Paris<|"|>}}<tool_response|>')
    assert prompt.index('{in:{city:<|"|>Paris<|"|>}}') < prompt.index('{in:{city:<|"|>Rome<|"|>}}')


def test_results_that_are_no_objects_are_text(client, actor):
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    before = {"role": "assistant", "content": None, "tool_calls": [call]}
    for content, written in {
        "no idea": '<|"|>no idea<|"|>',
        "20": '<|"|>20<|"|>',
        '["a"]': '<|"|>["a"]<|"|>',
        '{"a": NaN}': '<|"|>{"a": NaN}<|"|>',
        '{"c": 20}': "{c:20}",
    }.items():
        actor.says("Warm.")
        ask(client, ASKED, before, {"role": "tool", "tool_call_id": "a", "content": content}, tools=[WEATHER])
        written = written if written.startswith("{") else f"{{value:{written}}}"
        assert f"<|tool_response>response:weather{written}<tool_response|>" in actor.heard[0]


def test_tool_choice_none(client, actor):
    """The model is not shown the tools, and may then have a format too."""
    actor.says("It is.", '{"a": 1}')
    assert ask(client, tools=[WEATHER], tool_choice="none").choices[0].message.content == "It is."
    assert "<|tool>" not in actor.heard[0]
    form = {"type": "json_object"}
    assert ask(client, tools=[WEATHER], tool_choice="none", response_format=form).choices[0].finish_reason == "stop"


NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("choice", ["required", NAMED, allowed("required", "weather")])
def test_calls_that_must_come(client, actor, choice):
    actor.says(CALL, CALL)
    [one] = ask(client, tools=[WEATHER, NOW], tool_choice=choice).choices
    [call] = one.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert (one.message.content, one.finish_reason) == (None, "tool_calls")
    assert "declaration:now" in actor.heard[0]
    chunks = client.stream([ASKED], model="actor", tools=[WEATHER, NOW], tool_choice=choice)
    assert [call.function.name for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()] == ["weather"]
    assert joined(chunks) == ""


def test_a_call_comes_whatever_the_model_would_say(client, actor):
    actor.says("It is.", f"{THOUGHT}It is.")
    named = {"type": "function", "function": {"name": "now"}}
    [one] = ask(client, tools=[WEATHER, NOW], tool_choice=named).choices
    assert [(call.function.name, call.function.arguments) for call in one.message.tool_calls] == [("now", "{}")]
    [one] = ask(client, tools=[WEATHER, NOW], tool_choice=named, reasoning_effort="low").choices
    assert one.message.reasoning_content == "hmm"
    assert [call.function.name for call in one.message.tool_calls] == ["now"]


def test_tools_that_are_allowed(client, actor):
    actor.says("It is.")
    assert ask(client, tools=[WEATHER, NOW], tool_choice=allowed("auto", "now")).choices[0].message.content == "It is."
    assert "declaration:weather" not in actor.heard[0]


def test_a_call_that_must_come_and_is_cut(client, actor):
    actor.says(CALL)
    [choice] = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=5).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)


def test_parallel_tool_calls(client, actor):
    """Without them the reply ends with the first call."""
    actor.says(CALL + ROME, CALL + ROME, CALL + ROME)
    whole = ask(client, tools=[WEATHER], parallel_tool_calls=False).choices[0].message
    assert [json.loads(call.function.arguments)["city"] for call in whole.tool_calls] == ["Paris"]
    chunks = client.stream([ASKED], model="actor", tools=[WEATHER], parallel_tool_calls=False)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris"]
    assert len(ask(client, tools=[WEATHER], parallel_tool_calls=True).choices[0].message.tool_calls) == 2


def test_a_call_that_is_cut(client, actor):
    actor.says(CALL)
    [choice] = ask(client, tools=[WEATHER], max_tokens=5).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None


def test_tools_and_a_format(client, actor):
    """A reply is in its form, or calls."""
    form = {"type": "json_object"}
    actor.says('{"warm": true}', CALL)
    said = ask(client, tools=[WEATHER], response_format=form).choices[0]
    assert (json.loads(said.message.content), said.finish_reason) == ({"warm": True}, "stop")
    called = ask(client, tools=[WEATHER], response_format=form).choices[0]
    assert (called.message.content, called.finish_reason) == (None, "tool_calls")
    with pytest.raises(openai.BadRequestError, match="response_format excludes a tool_choice by which calls must come"):
        ask(client, tools=[WEATHER], response_format=form, tool_choice="required")


class Unit(enum.Enum):
    celsius = "celsius"
    kelvin = "kelvin"


class Forecast(pydantic.BaseModel):
    """As the client's own helpers declare a function: strict, each argument required, defaults as null."""

    city: str
    days: int | None = None
    unit: Unit = Unit.celsius
    tags: list[str] = []


def test_strict_tools(client, actor):
    tool = openai.pydantic_function_tool(Forecast, name="weather")
    assert tool["function"]["strict"]
    written = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:null,tags:[],unit:<|"|>kelvin<|"|>}<tool_call|>'
    actor.says(f"Let me see.{written}", "It is.", f"Let me see.{CALL}")
    [choice] = ask(client, tools=[tool]).choices
    assert choice.message.content == "Let me see."
    [call] = choice.message.tool_calls
    assert Forecast.model_validate_json(call.function.arguments) == Forecast(city="Paris", unit=Unit.kelvin)
    assert ask(client, tools=[tool]).choices[0].message.content == "It is."
    [choice] = ask(client, tools=[tool], max_tokens=300).choices
    for call in choice.message.tool_calls or ():
        Forecast.model_validate_json(call.function.arguments)
    assert choice.message.tool_calls or choice.finish_reason == "length"


def test_a_strict_tool_that_cannot_be_held_to_its_schema(client):
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=r"tool f: parameters.a: 'not' cannot be held to in a call"):
        ask(client, tools=[tool])


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
def test_reasoning(client, actor, effort):
    actor.says(f"{THOUGHT}Warm.", f"{THOUGHT}Warm.")
    completion = ask(client, reasoning_effort=effort)
    message = completion.choices[0].message
    assert (message.content, message.reasoning_content) == ("Warm.", "hmm")
    assert completion.usage.completion_tokens_details.reasoning_tokens > 3
    assert "<|think|>" in actor.heard[0]
    chunks = client.stream([ASKED], model="actor", reasoning_effort=effort)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hmm"
    assert joined(chunks) == "Warm."


def test_reasoning_none(client, actor):
    actor.says("Warm.", "Warm.")
    assert ask(client, reasoning_effort="none").choices[0].message.content == "Warm."
    ask(client)
    assert actor.heard[0] == actor.heard[1]
    assert "<|think|>" not in actor.heard[0]


def test_reasoning_with_tools_goes_back(client, actor):
    """The thought that led to a call is there when the model goes on."""
    actor.says(THOUGHT + CALL)
    said = ask(client, tools=[WEATHER], reasoning_effort="low").choices[0].message
    assert said.reasoning_content == "hmm"
    actor.says("Warm.")
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "20 degrees"}
    ask(client, ASKED, said, result, tools=[WEATHER], reasoning_effort="low")
    assert THOUGHT + CALL in actor.heard[0]


def test_white_space_and_quotes_in_json(client, actor):
    """Case 70: the grammar leaves no room for endless white space, fences or prose; quotes in values are escaped."""
    form = {"type": "json_object"}
    for line in ("```json\n{}\n```", "Here it is: {}", "{" + "\n" * 200):
        actor.says(line)
        text = ask(client, response_format=form, max_tokens=50).choices[0].message.content
        assert text.startswith("{")
        assert "\n" not in text
    actor.says('{"a": "say \\"b\\""}')
    completion = ask(client, response_format=form)
    assert json.loads(completion.choices[0].message.content) == {"a": 'say "b"'}
    assert completion.choices[0].finish_reason == "stop"


def test_an_error_in_the_middle_of_a_stream(client, actor, stage):
    """The client has what came before, then the error; the server goes on."""
    actor.says("It is warm.")
    with actor.failing(3, RuntimeError("/secret/path")), pytest.raises(openai.APIError) as caught:
        client.stream([ASKED], model="actor")
    assert "secret" not in str(caught.value)
    assert caught.value.type == "server_error"
    actor.says("It is.")
    assert ask(client).choices[0].message.content == "It is."
