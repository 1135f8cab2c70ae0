"""Functions and thoughts through Google's client, with a model that says what the test tells it to."""

from __future__ import annotations

import json
import logging

import pytest
from google.genai import errors, types

from siglance.engine import Engine

from ..scripted import ScriptedRuntime, scripted
from ..tool_template import speller, thinking_bundle
from .google_clients import COLUMNS, connected
from .running import serving

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


class Model(ScriptedRuntime):
    """Answers each request with the next of its scripts, and keeps the prompts."""

    def __init__(self, engine: Engine):
        super().__init__(engine.runtime, [])
        self._spell = speller(engine)
        self._decode = engine._tokenizer.decode
        self._scripts: list[list[int]] = []
        self._prompts: list[list[int]] = []

    def says(self, *texts: str) -> None:
        self._scripts, self._prompts = [self._spell(text) for text in texts], []

    def session(self):
        self.script = self._scripts.pop(0)
        return super().session()

    def logits(self, run: int):
        if run == 0:
            self._prompts.append(self.ids)
        return super().logits(run)

    @property
    def prompts(self) -> list[str]:
        return [self._decode(ids, skip_special_tokens=False) for ids in self._prompts]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.open(thinking_bundle(tmp_path_factory.mktemp("tools")), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(engine):
    return Model(engine)


@pytest.fixture(scope="module")
def running(engine, model):
    double, _ = scripted(engine, [])
    double._runtime = model  # pyright: ignore[reportAttributeAccessIssue]
    with serving({"scripted": double}) as running:
        yield running


@pytest.fixture(scope="module", params=COLUMNS)
def client(request, running):
    with connected(running.url, request.param) as client:
        yield client


def ask(client, contents, **config):
    return client.generate(contents, model="scripted", **config)


def test_function_calling_by_hand(client, model):
    config = {"tools": [types.Tool(function_declarations=[WEATHER])], "automatic_function_calling": MANUAL}
    model.says(f"Let me see.{CALL}{WAITS}", "It is warm.<turn|>")
    response = ask(client, "Is it warm?", **config)
    [call] = response.function_calls
    assert (call.name, call.args) == ("weather", {"city": "Paris"})
    assert response.candidates[0].content.parts[0].text == "Let me see."
    assert response.candidates[0].finish_reason is types.FinishReason.STOP
    assert DECLARED in model.prompts[0]
    result = types.Part.from_function_response(name="weather", response={"celsius": 20})
    result.function_response.id = call.id
    contents = [types.UserContent("Is it warm?"), response.candidates[0].content, types.UserContent([result])]
    assert ask(client, contents, **config).text == "It is warm."
    answered = "<|tool_response>response:weather{celsius:20}<tool_response|>"
    assert model.prompts[1].endswith(f"<|turn>model\nLet me see.{CALL}{answered}")


def test_function_calling_streamed(client, model):
    model.says(f"Let me see.{CALL}{WAITS}")
    tools = [types.Tool(function_declarations=[WEATHER])]
    chunks = client.stream("Is it warm?", "scripted", tools=tools, automatic_function_calling=MANUAL)
    calls = [call for chunk in chunks for call in chunk.function_calls or ()]
    assert [(call.name, call.args) for call in calls] == [("weather", {"city": "Paris"})]
    assert "".join(chunk.text or "" for chunk in chunks if not chunk.function_calls) == "Let me see."


def test_automatic_function_calling(client, model):
    asked = []

    def weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "warm"

    model.says(f"{CALL}{WAITS}", "It is warm.<turn|>")
    logging.getLogger("google_genai.models").setLevel(logging.ERROR)
    response = ask(client, "Is it warm?", tools=[weather])
    assert response.text == "It is warm."
    assert asked == ["Paris"]
    first, second = model.prompts
    assert 'Returns a value of the JSON schema {"type": "string"}.' in first
    assert f'{CALL}<|tool_response>response:weather{{result:<|"|>warm<|"|>}}<tool_response|>' in second


def test_chat_with_automatic_function_calling(client, model):
    def weather(city: str) -> dict[str, int]:
        """Weather of a city."""
        return {"celsius": 20}

    model.says(f"{CALL}{WAITS}", "It is warm.<turn|>", "You are welcome.<turn|>")
    texts, history = client.chat("Is it warm?", "Thanks.", model="scripted", tools=[weather])
    assert texts == ["It is warm.", "You are welcome."]
    assert len(history) == 6
    assert "response:weather{result:{celsius:20}}" in model.prompts[2]


def test_several_calls_of_one_function(client, model):
    """Results that carry ids may come in any order."""
    model.says(f"{CALL}{CALL.replace('Paris', 'Rome')}{WAITS}", "Warm.<turn|>")
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
    prompt = model.prompts[1]
    assert prompt.index('{in:<|"|>Paris') < prompt.index('{in:<|"|>Rome')


def test_tool_config(client, model):
    def config(mode, *names):
        calling = types.FunctionCallingConfig(mode=mode, allowed_function_names=list(names) or None)
        tools = [types.Tool(function_declarations=[WEATHER, types.FunctionDeclaration(name="now")])]
        return {"tools": tools, "tool_config": types.ToolConfig(function_calling_config=calling)}

    model.says("Yes.<turn|>", "Yes.<turn|>", "Yes.<turn|>")
    for mode, names in (("AUTO", []), ("AUTO", ["now"]), ("NONE", [])):
        ask(client, "Is it warm?", automatic_function_calling=MANUAL, **config(mode, *names))
    declared = [[f"declaration:{name}" in prompt for name in ("weather", "now")] for prompt in model.prompts]
    assert declared == [[True, True], [False, True], [False, False]]
    with pytest.raises(errors.ClientError, match=r"functionCallingConfig.mode is 'ANY': a call cannot be forced"):
        ask(client, "Is it warm?", automatic_function_calling=MANUAL, **config("ANY"))
    with pytest.raises(errors.ClientError, match="'later', which is not declared"):
        ask(client, "Is it warm?", automatic_function_calling=MANUAL, **config("AUTO", "later"))


def test_malformed_call(client, model):
    """What the model wrote is not lost."""
    model.says("<|tool_call>weather in Paris<tool_call|><turn|>")
    response = ask(client, "hi", tools=[types.Tool(function_declarations=[WEATHER])], automatic_function_calling=MANUAL)
    [candidate] = response.candidates
    assert candidate.finish_reason is types.FinishReason.MALFORMED_FUNCTION_CALL
    assert candidate.content.parts[0].text == "weather in Paris"
    if client.vertex:  # elsewhere the client drops it
        assert "a call cannot be read" in candidate.finish_message


def test_undeclared_call(client, model):
    model.says(f"{CALL}{WAITS}")
    response = ask(client, "hi")
    assert response.candidates[0].finish_reason is types.FinishReason.UNEXPECTED_TOOL_CALL
    assert response.function_calls[0].name == "weather"


def test_thoughts(client, model):
    config = types.ThinkingConfig(include_thoughts=True)
    model.says(f"{THOUGHT}Warm.<turn|>")
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
    assert "<|think|>" in model.prompts[0]


def test_thoughts_streamed(client, model):
    model.says(f"{THOUGHT}Warm.<turn|>")
    chunks = client.stream("hi", "scripted", thinking_config=types.ThinkingConfig(include_thoughts=True))
    parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]
    assert "".join(part.text for part in parts if part.thought) == "hmm"
    assert "".join(part.text for part in parts if not part.thought) == "Warm."


@pytest.mark.parametrize(("budget", "thinks"), [(0, False), (-1, True), (None, False)])
def test_thinking_budget(client, model, budget, thinks):
    """Thoughts that were not asked for are counted and not shown."""
    model.says(f"{THOUGHT}Warm.<turn|>")
    config = types.ThinkingConfig(thinking_budget=budget)
    response = ask(client, "hi", thinking_config=config)
    assert [part.text for part in response.candidates[0].content.parts] == ["Warm."]
    assert response.usage_metadata.thoughts_token_count > 0
    assert ("<|think|>" in model.prompts[0]) is thinks


def test_thinking_budget_that_cannot_be_kept(client):
    with pytest.raises(errors.ClientError, match="thinking_budget is 100, but thoughts cannot be held to a number"):
        ask(client, "hi", thinking_config=types.ThinkingConfig(thinking_budget=100))
    with pytest.raises(errors.ClientError, match="include_thoughts is true, but thinkingBudget 0"):
        ask(client, "hi", thinking_config=types.ThinkingConfig(thinking_budget=0, include_thoughts=True))


def test_thoughts_in_a_conversation(client, model):
    """A thought goes back to the model with the call that it led to."""
    model.says("Warm.<turn|>")
    said = types.ModelContent(
        [types.Part(text="hmm", thought=True), types.Part.from_function_call(name="weather", args={"city": "Paris"})]
    )
    result = types.Part.from_function_response(name="weather", response={"celsius": 20})
    ask(client, [types.UserContent("Is it warm?"), said, types.UserContent([result])])
    assert f"<|channel>thought\nhmm\n<channel|>{CALL}<|tool_response>response:weather" in model.prompts[0]


def test_a_failure_within_a_stream(client, model):
    """It arrives as an error: an answer that has begun is not passed off as a whole one."""
    model.says("It is warm.<turn|>")
    model.errors = {3: RuntimeError("a secret of the server")}
    try:
        with pytest.raises(errors.ServerError, match="the server failed") as caught:
            client.stream("hi", "scripted")
    finally:
        model.errors = {}
    assert (caught.value.code, caught.value.status) == (500, "INTERNAL")
    assert "secret" not in json.dumps(caught.value.details)
