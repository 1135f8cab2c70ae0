"""Functions and thoughts through Google's client, with a model that says what the test tells it to."""

from __future__ import annotations

import json
import logging

import pytest
from google.genai import errors, types

from .google_clients import COLUMNS, connected
from .running import serving
from .scripted_server import Actor

CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
WAITS = "<|tool_response>"
THOUGHT = "<|channel>thought\nhmm\n<channel|>"
WEATHER = types.FunctionDeclaration(
    name="weather",
    description="Weather of a city",
    parameters=types.Schema(
        type="OBJECT", properties={"city": types.Schema(type="STRING", description="where")}, required=["city"]
    ),
)
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather of a city<|"|>,parameters:{properties:{city:{description:<|"|>'
    'where<|"|>,type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
MANUAL = types.AutomaticFunctionCallingConfig(disable=True)


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    actor = Actor(tmp_path_factory.mktemp("tools"))
    yield actor
    actor.close()


@pytest.fixture(scope="module")
def running(actor):
    with serving({"scripted": actor.engine}) as running:
        yield running


@pytest.fixture(scope="module", params=COLUMNS)
def client(request, running):
    with connected(running.url, request.param) as client:
        yield client


def ask(client, contents, **config):
    return client.generate(contents, model="scripted", **config)


def test_function_calling_by_hand(client, actor):
    config = {"tools": [types.Tool(function_declarations=[WEATHER])], "automatic_function_calling": MANUAL}
    actor.says(f"Let me see.{CALL}{WAITS}", "It is warm.")
    response = ask(client, "Is it warm?", **config)
    [call] = response.function_calls
    assert (call.name, call.args) == ("weather", {"city": "Paris"})
    assert response.candidates[0].content.parts[0].text == "Let me see."
    assert response.candidates[0].finish_reason is types.FinishReason.STOP
    assert DECLARED in actor.heard[0]
    result = types.Part.from_function_response(name="weather", response={"celsius": 20})
    result.function_response.id = call.id
    contents = [types.UserContent("Is it warm?"), response.candidates[0].content, types.UserContent([result])]
    assert ask(client, contents, **config).text == "It is warm."
    answered = "<|tool_response>response:weather{celsius:20}<tool_response|>"
    assert actor.heard[1].endswith(f"<|turn>model\nLet me see.{CALL}{answered}")


def test_function_calling_streamed(client, actor):
    actor.says(f"Let me see.{CALL}{WAITS}")
    tools = [types.Tool(function_declarations=[WEATHER])]
    chunks = client.stream("Is it warm?", "scripted", tools=tools, automatic_function_calling=MANUAL)
    calls = [call for chunk in chunks for call in chunk.function_calls or ()]
    assert [(call.name, call.args) for call in calls] == [("weather", {"city": "Paris"})]
    assert "".join(chunk.text or "" for chunk in chunks if not chunk.function_calls) == "Let me see."


def test_automatic_function_calling(client, actor):
    asked = []

    def weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "warm"

    actor.says(f"{CALL}{WAITS}", "It is warm.")
    logging.getLogger("google_genai.models").setLevel(logging.ERROR)
    response = ask(client, "Is it warm?", tools=[weather])
    assert response.text == "It is warm."
    assert asked == ["Paris"]
    first, second = actor.heard
    assert 'Returns a value of the JSON schema {"type": "string"}.' in first
    assert f'{CALL}<|tool_response>response:weather{{result:<|"|>warm<|"|>}}<tool_response|>' in second


def test_chat_with_automatic_function_calling(client, actor):
    def weather(city: str) -> dict[str, int]:
        """Weather of a city."""
        return {"celsius": 20}

    actor.says(f"{CALL}{WAITS}", "It is warm.", "You are welcome.")
    texts, history = client.chat("Is it warm?", "Thanks.", model="scripted", tools=[weather])
    assert texts == ["It is warm.", "You are welcome."]
    assert len(history) == 6
    assert "response:weather{result:{celsius:20}}" in actor.heard[2]


def test_several_calls_of_one_function(client, actor):
    """Results that carry ids may come in any order."""
    actor.says(f"{CALL}{CALL.replace('Paris', 'Rome')}{WAITS}", "Warm.")
    config = {"tools": [types.Tool(function_declarations=[WEATHER])], "automatic_function_calling": MANUAL}
    response = ask(client, "Is it warm?", **config)
    calls = response.function_calls
    assert [call.args["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2
    results = [
        types.Part(
            function_response=types.FunctionResponse(id=call.id, name=call.name, response={"in": call.args["city"]})
        )
        for call in reversed(calls)
    ]
    contents = [types.UserContent("Is it warm?"), response.candidates[0].content, types.UserContent(results)]
    ask(client, contents, **config)
    prompt = actor.heard[1]
    assert prompt.index('{in:<|"|>Paris') < prompt.index('{in:<|"|>Rome')


NOW = types.FunctionDeclaration(name="now")


def calling(mode, *names, functions=(WEATHER, NOW)):
    chosen = types.FunctionCallingConfig(mode=mode, allowed_function_names=list(names) or None)
    tools = [types.Tool(function_declarations=list(functions))]
    config = types.ToolConfig(function_calling_config=chosen)
    return {"tools": tools, "tool_config": config, "automatic_function_calling": MANUAL}


def test_tool_config(client, actor):
    actor.says("Yes.", "Yes.", "Yes.", "Yes.")
    for mode, names in (("AUTO", []), ("AUTO", ["now"]), ("VALIDATED", ["now"]), ("NONE", [])):
        assert ask(client, "Is it warm?", **calling(mode, *names)).text == "Yes."
    declared = [[f"declaration:{name}" in prompt for name in ("weather", "now")] for prompt in actor.heard]
    assert declared == [[True, True], [False, True], [False, True], [False, False]]
    for mode in ("AUTO", "ANY", "VALIDATED", "NONE"):
        with pytest.raises(errors.ClientError, match="'later', which is not declared"):
            ask(client, "Is it warm?", **calling(mode, "later"))


def test_calls_that_must_come(client, actor):
    """ANY; the model is shown all functions, and calls those that are allowed."""
    actor.says("It is warm.", CALL + WAITS)
    only = ask(client, "Is it warm?", **calling("ANY", functions=[NOW]), max_output_tokens=50)
    assert {call.name for call in only.function_calls} == {"now"}
    allowed = ask(client, "Is it warm?", **calling("ANY", "weather"))
    assert [(call.name, call.args) for call in allowed.function_calls] == [("weather", {"city": "Paris"})]
    assert "declaration:now" in actor.heard[1]
    assert not any(part.text for part in allowed.candidates[0].content.parts)
    actor.says("It is warm.")
    chunks = client.stream("Is it warm?", "scripted", **calling("ANY", functions=[NOW]), max_output_tokens=50)
    assert {call.name for chunk in chunks for call in chunk.function_calls or ()} == {"now"}


def test_validated_calls(client, actor):
    """Text may be written; a call is as it is declared."""
    wrong = CALL.replace("weather", "now")
    actor.says("It is warm.", f"Let me see.{wrong}", f"Let me see.{wrong}")
    assert ask(client, "Is it warm?", **calling("VALIDATED")).text == "It is warm."
    loose = ask(client, "Is it warm?", **calling("AUTO"))
    assert loose.function_calls[0].args == {"city": "Paris"}
    held = ask(client, "Is it warm?", **calling("VALIDATED"))
    assert held.candidates[0].content.parts[0].text.startswith("Let me see.")
    assert [(call.name, call.args) for call in held.function_calls] == [("now", {})]


def test_calls_that_cannot_be_held_to_their_schema(client):
    odd = types.FunctionDeclaration(name="f", parameters_json_schema={"type": "object", "patternProperties": {"a": {}}})
    with pytest.raises(errors.ClientError, match="tool f: parameters: 'patternProperties' cannot be held to in a call"):
        ask(client, "hi", **calling("ANY", functions=[odd]))


def test_null_in_calls(client, actor):
    """Google's `nullable`."""
    city = types.Schema(type="STRING", nullable=True)
    parameters = types.Schema(type="OBJECT", properties={"city": city}, required=["city"])
    weather = types.FunctionDeclaration(name="weather", parameters=parameters)
    actor.says(f"<|tool_call>call:weather{{city:null}}<tool_call|>{WAITS}")
    [call] = ask(client, "Is it warm?", **calling("ANY", functions=[weather])).function_calls
    assert call.args == {"city": None}


def test_malformed_call(client, actor):
    """What the model wrote is not lost."""
    actor.says("<|tool_call>weather in Paris<tool_call|>")
    response = ask(client, "hi", tools=[types.Tool(function_declarations=[WEATHER])], automatic_function_calling=MANUAL)
    [candidate] = response.candidates
    assert candidate.finish_reason is types.FinishReason.MALFORMED_FUNCTION_CALL
    assert candidate.content.parts[0].text == "weather in Paris"
    if client.vertex:  # elsewhere the client drops it
        assert "a call cannot be read" in candidate.finish_message


def test_undeclared_call(client, actor):
    actor.says(f"{CALL}{WAITS}")
    response = ask(client, "hi")
    assert response.candidates[0].finish_reason is types.FinishReason.UNEXPECTED_TOOL_CALL
    assert response.function_calls[0].name == "weather"


def test_thoughts(client, actor):
    config = types.ThinkingConfig(include_thoughts=True)
    actor.says(f"{THOUGHT}Warm.")
    response = ask(client, "Is it warm?", thinking_config=config)
    thought, answer = response.candidates[0].content.parts
    assert (thought.thought, thought.text) == (True, "hmm")
    assert (answer.thought, answer.text) == (None, "Warm.")
    assert response.text == "Warm."
    usage = response.usage_metadata
    assert usage.thoughts_token_count > 0
    assert usage.total_token_count == (
        usage.prompt_token_count + usage.candidates_token_count + usage.thoughts_token_count
    )
    assert "<|think|>" in actor.heard[0]


def test_thoughts_streamed(client, actor):
    actor.says(f"{THOUGHT}Warm.")
    chunks = client.stream("hi", "scripted", thinking_config=types.ThinkingConfig(include_thoughts=True))
    parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]
    assert "".join(part.text for part in parts if part.thought) == "hmm"
    assert "".join(part.text for part in parts if not part.thought) == "Warm."


@pytest.mark.parametrize(("budget", "thinks"), [(0, False), (-1, True), (None, False)])
def test_thinking_budget(client, actor, budget, thinks):
    """Thoughts that were not asked for are counted and not shown."""
    actor.says(f"{THOUGHT}Warm.")
    config = types.ThinkingConfig(thinking_budget=budget)
    response = ask(client, "hi", thinking_config=config)
    assert [part.text for part in response.candidates[0].content.parts] == ["Warm."]
    assert response.usage_metadata.thoughts_token_count > 0
    assert ("<|think|>" in actor.heard[0]) is thinks


def test_thinking_budget_that_cannot_be_kept(client):
    with pytest.raises(errors.ClientError, match="thinking_budget is 100, but thoughts cannot be held to a number"):
        ask(client, "hi", thinking_config=types.ThinkingConfig(thinking_budget=100))
    with pytest.raises(errors.ClientError, match="include_thoughts is true, but thinkingBudget 0"):
        ask(client, "hi", thinking_config=types.ThinkingConfig(thinking_budget=0, include_thoughts=True))


def test_thoughts_in_a_conversation(client, actor):
    """A thought goes back to the model with the call that it led to."""
    actor.says("Warm.")
    said = types.ModelContent(
        [types.Part(text="hmm", thought=True), types.Part.from_function_call(name="weather", args={"city": "Paris"})]
    )
    result = types.Part.from_function_response(name="weather", response={"celsius": 20})
    ask(client, [types.UserContent("Is it warm?"), said, types.UserContent([result])])
    assert f"<|channel>thought\nhmm\n<channel|>{CALL}<|tool_response>response:weather" in actor.heard[0]


def test_a_failure_within_a_stream(client, actor):
    """It arrives as an error: an answer that has begun is not passed off as a whole one."""
    actor.says("It is warm.")
    secret = RuntimeError("a secret of the server")
    with actor.failing(3, secret), pytest.raises(errors.ServerError, match="the server failed") as caught:
        client.stream("hi", "scripted")
    assert (caught.value.code, caught.value.status) == (500, "INTERNAL")
    assert "secret" not in json.dumps(caught.value.details)
