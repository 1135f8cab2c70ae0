"""Tools in requests: declared, called, answered in the same turn; and nothing in them becomes a control token."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from siglance.engine import Engine, MalformedCall, Sampling, Text, Thought, Tool, ToolCall, ToolResult, Turn, cli
from siglance.engine.errors import InputError, PromptError
from siglance.engine.messages import Message, merged_turns, template_messages
from siglance.engine.preprocessing import PromptOptions
from siglance.engine.reply import StageClock
from siglance.engine.template import ChatTemplate
from siglance.engine.text import special_ids
from siglance.engine.tool_format import CONTROL_TOKENS, QUOTE, render_call
from siglance.engine.tools import strings, swapped

from . import tool_trees
from .scripted import picture, scripted, with_manifest
from .tool_template import speller, thinking_bundle, tool_template

GREEDY = Sampling(temperature=0, seed=0)
WEATHER = Tool(
    "weather",
    "Weather of a city",
    {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]},
)
CALL = ToolCall("weather", {"city": "Paris"})
SPELLED = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>'
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather of a city<|"|>,parameters:{properties:{city:{description:<|"|>'
    'where<|"|>,type:<|"|>STRING<|"|>}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny model whose chat template knows tools and thinking."""
    with Engine.open(thinking_bundle(tmp_path_factory.mktemp("tools")), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def spell(engine):
    """spell(text): ids of a text with the markers in it."""
    return speller(engine)


def prompt_of(engine, conversation, *, system=None, **options):
    """The prompt of a conversation without media."""
    turns = engine._preprocessor.read(conversation, StageClock(), system)
    return engine._preprocessor.prompt(turns, PromptOptions(**options))[1]


def with_template(engine, template: str) -> Engine:
    """The same engine with another chat template."""
    double, _ = scripted(engine, [1])
    reader = type(double._preprocessor).__new__(type(double._preprocessor))
    reader.__dict__ |= double._preprocessor.__dict__
    prompts = type(reader._prompts)(
        double._tokenizer, double.manifest.prompt, ChatTemplate(template), None, double.manifest.reply
    )
    reader._prompts = prompts
    double._preprocessor = reader
    return double


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_tools_are_declared_in_the_system_turn(engine, spell):
    prompt = prompt_of(engine, "hi", tools=[WEATHER, {"name": "now"}], system="Be brief.")
    expected = (
        f'<bos><|turn>system\nBe brief.{DECLARED}<|tool>declaration:now{{description:<|"|><|"|>}}<tool|><turn|>\n'
        "<|turn>user\nhi<turn|>\n<|turn>model\n"
    )
    assert prompt.text == expected
    assert prompt.ids.tolist() == spell(expected)
    assert prompt_of(engine, "hi", tools=[WEATHER], thinking=True).text.startswith(
        f"<bos><|turn>system\n<|think|>\n{DECLARED}<turn|>\n"
    )


CONVERSATION = [
    Turn("user", "hi"),
    Turn(
        "assistant", [Thought("hmm"), Text("Let me see."), CALL, ToolCall("weather", {"city": "Rome", "n": [1, None]})]
    ),
    Turn("tool", [ToolResult("weather", {"celsius": 20.5, "sky": "blue"}), ToolResult("weather", "no idea")]),
]
OPEN = (
    "<bos><|turn>user\nhi<turn|>\n<|turn>model\nLet me see.<|channel>thought\nhmm\n<channel|>"
    f'{SPELLED}<|tool_call>call:weather{{city:<|"|>Rome<|"|>,n:[1,null]}}<tool_call|>'
    '<|tool_response>response:weather{celsius:20.5,sky:<|"|>blue<|"|>}<tool_response|>'
    '<|tool_response>response:weather{value:<|"|>no idea<|"|>}<tool_response|>'
)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_calls_and_results_stay_in_one_turn(engine, spell, attached, large):
    """The model goes on where it waited; thinking goes on too. Both ways in which templates read results."""
    double = with_template(engine, tool_template(attached=attached, large=large))
    prompt = prompt_of(double, CONVERSATION)
    assert prompt.text == OPEN
    assert prompt.ids.tolist() == spell(OPEN)
    thinking = prompt_of(double, CONVERSATION, thinking=True).text
    assert thinking == OPEN.replace("<bos>", "<bos><|turn>system\n<|think|>\n<turn|>\n") + "<|channel>thought\n"
    again = [*CONVERSATION, Turn("assistant", CALL), Turn("tool", ToolResult("weather", 3))]
    assert prompt_of(double, again).text == (
        f"{OPEN}{SPELLED}<|tool_response>response:weather{{value:3}}<tool_response|>"
    )
    over = [*CONVERSATION, Turn("assistant", "Warm."), Turn("user", "thanks")]
    assert prompt_of(double, over).text == OPEN.replace("<|channel>thought\nhmm\n<channel|>", "") + (
        "Warm.<turn|>\n<|turn>user\nthanks<turn|>\n<|turn>model\n" + ("<|channel>thought\n<channel|>" if large else "")
    )


@pytest.mark.parametrize("closes", ["turn", "text"])
@pytest.mark.parametrize("attached", [True, False])
def test_templates_that_close_the_turn_of_a_call(engine, spell, closes, attached):
    """Older ages write `<turn|>` between a text and its calls, or calls outside of any turn. The model never does, and
    would find another prompt than it has written: all ages give the same."""
    double = with_template(engine, tool_template(closes=closes, attached=attached))
    tool = Turn("tool", ToolResult("weather", 3))
    spoken = [Turn("user", "hi"), Turn("assistant", ["Let me see.", CALL]), tool]
    silent = [Turn("user", "hi"), Turn("assistant", [CALL]), tool]
    thought = [Turn("user", "hi"), Turn("assistant", [Thought("hmm"), Text("Let me see."), CALL]), tool]
    conversations = [CONVERSATION, spoken, silent, thought]
    if attached:  # results in messages are written with what went before, and the age that does so closes no turn
        conversations += [[*spoken, Turn("assistant", "Warm."), Turn("user", "thanks")]]
        conversations += [[*spoken, Turn("assistant", ["Warm. And ", CALL]), tool]]
        conversations += [[*silent, Turn("assistant", [CALL]), tool]]
    for conversation in conversations:
        expected = prompt_of(engine, conversation)
        prompt = prompt_of(double, conversation)
        assert prompt.text == expected.text
        assert prompt.ids.tolist() == spell(expected.text)


def test_a_text_that_spells_the_end_of_a_turn_stays_in_front_of_its_call(engine):
    double = with_template(engine, tool_template(closes="text"))
    said = Turn("assistant", ["x<turn|>\n", CALL])
    prompt = prompt_of(double, [Turn("user", "hi"), said, Turn("tool", ToolResult("weather", 3))])
    assert f"<|turn>model\nx<turn|>{SPELLED}" in prompt.text
    assert prompt.ids.tolist().count(engine._tokenizer.token_to_id("<turn|>")) == 1


def test_results_in_messages_name_their_calls(engine):
    """By id, as OpenAI's API has it: the results of calls of one function answer them in order."""
    first, second, other = ToolCall("f", {}), ToolCall("f", {"a": 1}), ToolCall("g", {})
    results = [ToolResult("g", 3), ToolResult("f", 1), ToolResult("f", {"b": 2})]
    parts = [Message("user", "hi"), Message("assistant", [first, second, other]), Message("tool", results)]
    messages = template_messages(merged_turns(parts, engine.manifest.prompt), str.upper)
    calls = messages[1]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_0", "call_1", "call_2"]
    assert [(one["tool_call_id"], one["name"], one["content"]) for one in messages[2:]] == [
        ("call_2", "g", {"VALUE": 3}),
        ("call_0", "f", {"VALUE": 1}),
        ("call_1", "f", {"B": 2}),
    ]


def test_templates_of_both_spellings_of_null(engine):
    double = with_template(engine, tool_template(null="None"))
    assert "n:[1,None]" in prompt_of(double, CONVERSATION).text


def test_pictures_and_tools_in_one_conversation(engine):
    double, runtime = scripted(engine, [1])
    turns = [Turn("user", [picture(), "what is this?"]), *CONVERSATION[1:]]
    double.generate([*turns, Turn("assistant", "A cat."), Turn("user", [picture(1), "and this?"])], tools=[WEATHER])
    assert [len(soft.values) for soft in runtime.soft] == [len(engine.encode(picture(index))) for index in range(2)]


@settings(max_examples=200, deadline=None)
@given(
    tool=tool_trees.tools,
    call=tool_trees.calls,
    result=tool_trees.trees,
    said=tool_trees.texts,
    thinking=st.booleans(),
)
def test_law_nothing_in_tools_becomes_a_control_token(engine, tool, call, result, said, thinking):
    """Without a character that begins them the control tokens are as many, and every string is there as it was."""

    def prompt(words):
        def value(it):
            return swapped(it, words)

        declared = Tool(tool.name, words(tool.description), tool.parameters and value(tool.parameters))
        asked = Turn("user", Text(f"hi{words(said)}"))
        called = Turn("assistant", [Thought(words(said)), ToolCall(call.name, value(call.arguments))])
        turns = [asked, called, Turn("tool", ToolResult(call.name, value(result)))]
        return prompt_of(engine, turns, tools=[declared], thinking=thinking)

    special = special_ids(engine._tokenizer)
    plain, told = prompt(lambda text: text.replace("<", "\u2039")), prompt(lambda text: text)
    counts = [Counter(id for id in one.ids.tolist() if id in special) for one in (plain, told)]
    assert counts[0] == counts[1]
    assert all(text in told.text for text in strings([call.arguments, result]))


@settings(max_examples=200, deadline=None)
@given(call=tool_trees.calls)
def test_law_a_call_that_is_sent_back_is_the_call_that_was_made(engine, spell, call):
    """The tokens that a model writes for a call are read as the call, and stand in the next prompt again."""
    ids = spell("<|tool_call>")
    for index, segment in enumerate(render_call(call)):
        ids += [*(spell(QUOTE) if index else []), *engine._tokenizer.encode(segment, add_special_tokens=False).ids]
    ids += spell("<tool_call|>")
    reply = scripted(engine, [*ids, *spell("<|tool_response>")])[0].generate("go", tools=[WEATHER], max_tokens=9999)
    assert reply.finish_reason == "stop_id"
    assert (reply.text, reply.malformed_calls) == ("", ())
    [read] = reply.tool_calls
    assert read.name == call.name
    assert tool_trees.same(read.arguments, call.arguments)
    turns = [Turn("user", "go"), Turn.of(reply), Turn("tool", ToolResult(call.name, None))]
    again = prompt_of(engine, turns, tools=[WEATHER]).ids.tolist()
    if all(
        key == key.strip() and key and not set(key) & set('{}[],:"\n\r<') for key in tool_trees.keys_of(call.arguments)
    ):
        # Templates write keys bare, whatever they are.
        assert again[: len(reply.prompt_token_ids) + len(ids)] == [*reply.prompt_token_ids, *ids]


# -- replies ---------------------------------------------------------------------------------------------------------


def test_calls_are_data(engine, spell):
    ids = spell(f"Let me see.{SPELLED}<|tool_call>call:now{{}}<tool_call|>")
    *chunks, last = scripted(engine, [*ids, *spell("<|tool_response>")])[0].stream(
        "hi", tools=[WEATHER], sampling=GREEDY
    )
    reply = last.reply
    assert (reply.text, reply.finish_reason, reply.truncated) == ("Let me see.", "stop_id", False)
    assert reply.tool_calls == (CALL, ToolCall("now", {}))
    assert tuple(itertools.chain.from_iterable(chunk.tool_calls for chunk in [*chunks, last])) == reply.tool_calls
    assert reply.token_ids == tuple(ids)
    assert Turn.of(reply) == Turn("assistant", [Text("Let me see."), CALL, ToolCall("now", {})])


def test_a_call_after_a_thought(engine, spell):
    ids = spell(f"<|channel>thought\nhello<channel|>{SPELLED}<|tool_response>")
    reply = scripted(engine, ids)[0].generate("hi", tools=[WEATHER], thinking=True, sampling=GREEDY)
    assert (reply.thought, reply.text, reply.tool_calls) == ("hello", "", (CALL,))
    assert Turn.of(reply) == Turn("assistant", [Thought("hello"), CALL])
    inside = spell(f"<|channel>thought\nhello{SPELLED}<|tool_response>")
    reply = scripted(engine, inside)[0].generate("hi", tools=[WEATHER], thinking=True, sampling=GREEDY)
    assert (reply.thought, reply.thought_finished, reply.tool_calls) == ("hello", True, (CALL,))
    assert reply.usage.thought_tokens == len(spell("<|channel>thought\nhello"))


def test_calls_are_read_without_declarations_too(engine, spell):
    assert scripted(engine, spell(f"{SPELLED}<|tool_response>"))[0].generate("hi", sampling=GREEDY).tool_calls == (
        CALL,
    )


MALFORMED = {
    "<|tool_call>call:weather{city:Paris}<tool_call|>": ("call:weather{city:Paris}", "'Paris' is not a value"),
    '<|tool_call>call:weather{city:<|"|>Paris}<tool_call|>': ('call:weather{city:"Paris}', "a string has no end"),
    "<|tool_call>call:weather<tool_call|>": ("call:weather", "expected '{' behind the name, found the end"),
    "<|tool_call><tool_call|>": ("", "expected 'call:', found the end"),
    "<|tool_call>call:f{<|image|>}<tool_call|>": ("call:f{}", "the token <|image|> stands inside of the call"),
    "<|tool_call>call:f{}<|channel><tool_call|>": ("call:f{}", "the token <|channel> stands inside of the call"),
    "<|tool_call>call:f{}": ("call:f{}", "the reply ends inside of the call"),
}


@pytest.mark.parametrize("spelled", MALFORMED)
def test_a_call_that_cannot_be_read_is_text_with_a_reason(engine, spell, spelled):
    text, reason = MALFORMED[spelled]
    double, _ = scripted(engine, spell(f"Well: {spelled}<turn|>"))
    *chunks, last = double.stream("hi", tools=[WEATHER], sampling=GREEDY)
    reply = last.reply
    assert (reply.text, reply.tool_calls) == (f"Well: {text}", ())
    assert "".join(chunk.text for chunk in [*chunks, last]) == reply.text
    [malformed] = reply.malformed_calls
    assert malformed.text == text
    assert malformed.reason.startswith(reason)
    assert "|>" not in reply.text


def test_a_bad_call_does_not_hide_a_good_one(engine, spell):
    ids = spell(f"<|tool_call>call:f{{a:<|tool_call>call:f{{b}}<tool_call|>{SPELLED} done<turn|>")
    reply = scripted(engine, ids)[0].generate("hi", tools=[WEATHER], sampling=GREEDY)
    assert reply.tool_calls == (CALL,)
    assert reply.malformed_calls == (
        MalformedCall("call:f{a:", "another call begins inside of the call"),
        MalformedCall("call:f{b}", "expected a key and ':', found 'b}'"),
    )
    assert reply.text == "call:f{a:call:f{b} done"


@pytest.mark.parametrize("cut", ["length", "context"])
def test_a_call_that_is_cut_says_so(engine, spell, cut):
    ids = spell(SPELLED)[:-1]
    double, _ = scripted(engine, ids)
    if cut == "context":
        size = double.count_tokens("hi", tools=[WEATHER])["total"] + len(ids)
        double = scripted(with_manifest(engine, context=size), ids)[0]
    limit = len(ids) if cut == "length" else 1000
    reply = double.generate("hi", tools=[WEATHER], max_tokens=limit, sampling=GREEDY)
    assert (reply.finish_reason, reply.truncated, reply.tool_calls) == (cut, True, ())
    assert [call.reason for call in reply.malformed_calls] == ["the reply ends inside of the call"]
    assert reply.text.startswith('call:weather{city:"Paris"')


def test_stops_do_not_end_calls(engine, spell):
    ids = spell(f"{SPELLED}It is Paris.<turn|>")
    [brace] = spell("{")
    for options in ({"stop": ["Paris", "{"]}, {"stop_ids": [brace]}):
        reply = scripted(engine, ids)[0].generate("hi", tools=[WEATHER], sampling=GREEDY, **options)
        assert reply.tool_calls == (CALL,)
        assert reply.text == ("It is " if "stop" in options else "It is Paris.")


def test_a_stop_string_finds_the_text_of_a_bad_call(engine, spell):
    """It is part of the answer then, also where the match began before it."""
    ids = spell("ab<|tool_call>call:f<tool_call|>xyz<turn|>")
    reply = scripted(engine, ids)[0].generate("hi", stop="bca", sampling=GREEDY)
    assert (reply.text, reply.finish_reason) == ("a", "stop_text")


# -- chats -----------------------------------------------------------------------------------------------------------


def test_a_chat_with_a_tool(engine, spell):
    called = spell(f"<|channel>thought\nhello<channel|>Let me see.{SPELLED}<|tool_response>")
    double, runtime = scripted(engine, called)
    chat = double.chat(tools=[WEATHER], thinking=True, sampling=GREEDY)
    [call] = chat.send("hi").tool_calls
    with pytest.raises(PromptError, match="message 1: the call of 'weather' needs a result"):
        chat.send("and?")
    with pytest.raises(PromptError, match="message 2: the result of 'now' answers no call"):
        chat.send([ToolResult("weather", 1), ToolResult("now", 1)])
    runtime.script = spell("thinking on<channel|>Warm.<turn|>")
    reply = chat.send([ToolResult(call.name, {"celsius": 20})])
    assert (reply.thought, reply.text) == ("thinking on", "Warm.")
    assert double._tokenizer.decode(runtime.ids, skip_special_tokens=False).endswith(
        f"<|turn>model\nLet me see.<|channel>thought\nhello\n<channel|>{SPELLED}"
        "<|tool_response>response:weather{celsius:20}<tool_response|><|channel>thought\n"
    )
    assert chat.history == (
        Turn("user", [Text("hi")]),
        Turn("assistant", [Text("Let me see."), Thought("hello"), CALL]),
        Turn("tool", [ToolResult("weather", {"celsius": 20})]),
        Turn("assistant", [Text("Warm.")]),
    )
    runtime.script = spell("yes<turn|>")
    chat.send("more?")
    text = double._tokenizer.decode(runtime.ids, skip_special_tokens=False)
    assert "hello" not in text
    assert "thinking on" not in text
    assert text.endswith("<tool_response|>Warm.<turn|>\n<|turn>user\nmore?<turn|>\n<|turn>model\n")


def test_the_state_of_a_call_goes_on(engine, spell):
    """With the real decoder: what the model wrote is in the next prompt as it was, so nothing of it runs again."""
    reply = engine.generate("hi", tools=[WEATHER], max_tokens=4, sampling=GREEDY)
    assert reply.usage.prompt_tokens == engine.count_tokens("hi", tools=[WEATHER])["total"]
    turns = [Turn("user", "hi"), Turn("assistant", CALL), Turn("tool", ToolResult("weather", 1))]
    again = engine.generate(turns, tools=[WEATHER], max_tokens=4, sampling=GREEDY)
    cold = engine.generate(turns, tools=[WEATHER], max_tokens=4, sampling=GREEDY, cache=False)
    assert again.token_ids == cold.token_ids
    rows = engine.prompt_logits(turns, tools=[WEATHER])
    assert len(rows) == again.usage.prompt_tokens


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn("user", "a"), Turn("assistant", CALL)], "message 1: the call of 'weather' needs a result"),
        (
            [Turn("user", "a"), Turn("assistant", CALL), Turn("user", "b")],
            "message 1: the call of 'weather' needs a result",
        ),
        (
            [Turn("user", "a"), Turn("assistant", [CALL, CALL]), Turn("tool", ToolResult("weather", 1))],
            "message 1: the call of 'weather' needs a result",
        ),
        (
            [Turn("user", "a"), Turn("assistant", CALL), Turn("tool", [ToolResult("weather", 1), ToolResult("f", 1)])],
            "message 2: the result of 'f' answers no call of the turn before it",
        ),
        ([Turn("user", "a"), Turn("tool", ToolResult("f", 1))], "message 1: the result of 'f' answers no call"),
        ([Turn("tool", ToolResult("f", 1))], "message 0: the result of 'f' answers no call"),
        ([Turn("user", [CALL])], "message 0, part 0: a message of role 'user' has no ToolCall"),
        ([Turn("user", ["a", ToolResult("f", 1)])], "message 0, part 1: a message of role 'user' has no ToolResult"),
        (
            [Turn("user", "a"), Turn("assistant", ToolResult("f", 1))],
            "message 1, part 0: a message of role 'assistant' has no",
        ),
        ([Turn("user", [Thought("a")])], "message 0, part 0: a message of role 'user' has no Thought"),
        (
            [Turn("system", [Thought("a")]), Turn("user", "a")],
            "message 0, part 0: a message of role 'system' has no Thought",
        ),
        (
            [Turn("user", "a"), Turn("assistant", [CALL, Text("b")])],
            "message 1, part 1: nothing but calls may follow a call",
        ),
        (
            [Turn("user", "a"), Turn("assistant", CALL), Turn("tool", ["x"])],
            "message 2, part 0: a message of role 'tool' has no Text",
        ),
        ([Turn("user", "a"), Turn("assistant", CALL), Turn("tool", [])], "message 2: a tool message needs a result"),
        (
            [Turn("user", "a"), Turn("assistant", Thought("\ud800")), Turn("user", "b")],
            "message 1, part 0: not valid Unicode",
        ),
    ],
)
def test_turns_that_cannot_be_are_named(engine, turns, message):
    with pytest.raises(PromptError) as error:
        engine.count_tokens(turns)
    assert message in str(error.value)


def test_bundles_without_tools_say_so(tiny_model, engine):
    no_form = "tools: the chat template of this bundle does not write tools, or not in the form"
    asked = {"demo": no_form, "gemma4": no_form, "gemma3": "tools: the model of this bundle has no form for calls"}
    asked["paligemma"] = "tools: this bundle has no chat template"
    turns = [Turn("user", "a"), Turn("assistant", CALL), Turn("tool", ToolResult("weather", 1))]
    for family, message in asked.items():
        bundle = "demo" if family == "demo" else tiny_model(family).bundle.folder
        with Engine.open(bundle, threads=1) as other:
            with pytest.raises(PromptError, match=message):
                other.generate("hi", tools=[WEATHER])
            if family != "paligemma":
                with pytest.raises(PromptError, match=message):
                    other.generate(turns)
    for options in ({"raw": True}, {"prompt_ids": [2, 5]}):
        with pytest.raises(PromptError, match="tools: the prompt is not written by a chat template"):
            engine.generate([] if "prompt_ids" in options else "hi", tools=[WEATHER], **options)
    with pytest.raises(PromptError, match="part 0: without a chat template there is no ToolCall"):
        engine.generate([Turn("user", [CALL])], raw=True)
    with pytest.raises(InputError, match="encode takes a picture or a sound, not text"):
        engine.encode(CALL)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("<|tool_call>call:", "<|tool_call>"),
        ("<|tool>declaration:", "<|tool>"),
        ("response:", "result:"),
        ("quoted(it)", "it"),
    ],
)
def test_a_template_with_another_form_is_refused(engine, wrong, right):
    """Its calls would be written in a way that is not read."""
    template = tool_template()
    assert wrong in template
    with pytest.raises(PromptError, match="does not write tools, or not in the form in which replies are read"):
        prompt_of(with_template(engine, template.replace(wrong, right)), "hi", tools=[WEATHER])


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def said(engine, monkeypatch):
    """said(script): from now on `siglance` runs a model that says this."""

    def say(script: list[int]):
        double, runtime = scripted(engine, script)
        double.close = lambda: None
        monkeypatch.setattr(cli.Engine, "open", lambda *arguments, **options: double)
        return runtime

    return say


@pytest.fixture
def siglance(monkeypatch, capsys):
    """siglance(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["siglance", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def tools_file(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER.declaration()]), encoding="utf-8")
    return path


def test_run_with_tools_and_thinking(said, siglance, spell, tools_file):
    runtime = said(spell(f"<|channel>thought\nhello\n<channel|>Let me see.{SPELLED}<|tool_response>"))
    code, out, err = siglance("run", "-p", "hi", "--tools", tools_file, "--thinking", "--temperature", 0)
    assert (code, out) == (0, 'Let me see.\nweather {"city": "Paris"}\n')
    assert err.startswith("hello\n")
    assert (
        f" in the reply ({len(spell('<|channel>thought_hello_<channel|>'.replace('_', chr(10))))} of thoughts)" in err
    )
    assert spell("<|think|>")[0] in runtime.ids
    assert spell("<|tool>")[0] in runtime.ids
    code, out, err = siglance("run", "-p", "hi", "--tools", tools_file, "--thinking", "--json")
    reply = json.loads(out)
    assert (code, err) == (0, "")
    assert reply["tool_calls"] == [{"name": "weather", "arguments": {"city": "Paris"}}]
    assert (reply["text"], reply["thought"], reply["thought_finished"]) == ("Let me see.", "hello", True)
    assert reply["malformed_calls"] == []
    assert reply["usage"]["thought_tokens"] == len(spell("<|channel>thought\nhello\n<channel|>"))
    counts = [
        json.loads(siglance("count-tokens", "-p", "hi", "--json", *more)[1])["total"]
        for more in ((), ("--thinking",), ("--tools", tools_file))
    ]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("choice", "said_first", "shown"),
    [
        ("auto", "hello", True),
        ("none", "hello", False),
        ("required", 'weather {"', True),
        ("weather", 'weather {"', True),
    ],
)
def test_run_with_a_choice_of_tools(said, siglance, spell, tools_file, choice, said_first, shown):
    """Whatever the model would say, the choice decides whether it is a call."""
    runtime = said(spell("hello<turn|>"))
    asked = ("run", "-p", "hi", "--tools", tools_file, "--temperature", 0, "--max-tokens", 200)
    code, out, _ = siglance(*asked, "--tool-choice", choice)
    assert code == 0
    assert out.startswith(said_first)
    assert (spell("<|tool>")[0] in runtime.ids) is shown


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_choice_of_tools_that_cannot_be(said, siglance, tools_file, monkeypatch, command):
    said([])
    asked = (command, "-p", "hi") if command == "run" else (command,)
    for more, message in (
        (("--tools", tools_file, "--tool-choice", "no_such"), "no tool has the name 'no_such' (declared: weather)"),
        (("--tool-choice", "required"), "tool_choice is 'required', and no tools are declared"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        code, out, err = siglance(*asked, *more)
        assert (code, out) == (1 if command == "run" else 0, "")
        assert message in err


def test_run_without_an_answer_is_a_failure(said, siglance, spell):
    said(spell("<|channel>thought\nhello world"))
    for more in ((), ("--json",)):
        code, out, err = siglance("run", "-p", "hi", "--thinking", "--max-tokens", 5, "--temperature", 0, *more)
        assert code == 1
        assert "there is no answer: the reply ends inside of a thought (length, 5 tokens of thoughts)" in err
        assert (json.loads(out)["truncated"] if more else out == "\n") is True


def test_run_says_what_is_wrong_with_a_call(said, siglance, spell):
    said(spell("<|tool_call>call:f{a:x}<tool_call|><turn|>"))
    code, out, err = siglance("run", "-p", "hi", "--temperature", 0)
    assert (code, out) == (0, "call:f{a:x}\n")
    assert "a call that cannot be read: 'x' is not a value" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "Expecting value"),
        ('{"name": "f"}', "tools is dict, expected a list"),
        ('[{"name": "f", "strict": 1}]', "strict is 1, expected True or False"),
        ("[" * 100_000, "recursion"),
        (b"\xff", "utf-8"),
        (" " * (2**20 + 1), "more than 1048576 characters"),
        (None, "No such file"),
    ],
)
def test_a_tools_file_that_cannot_be_used(siglance, tmp_path, content, message):
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = siglance("run", "-p", "hi", "--tools", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"siglance: --tools {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_demo_refuses_both(siglance, tools_file):
    for more in (("--thinking",), ("--tools", tools_file)):
        for command in ("run", "count-tokens"):
            code, out, err = siglance(command, "-p", "describe", *more)
            assert (code, out) == (1, "")
            assert "the chat template of this bundle does not" in err


def test_chat_asks_for_results(said, spell, tools_file, tmp_path):
    runtime = said(
        spell(f"<|channel>thought\nhello<channel|>{SPELLED}<|tool_call>call:now{{}}<tool_call|><|tool_response>")
    )
    answers = iter([spell("warm<channel|>Yes.<turn|>")])
    real = runtime.session

    def session():
        if runtime.prefills:
            runtime.script = next(answers)
        return real()

    runtime.session = session
    saved = tmp_path / "saved.json"
    lines = ["/result 1", "hi", "and?", '/result {"celsius": 20}', "/result", "/result half past", f"/save {saved}"]
    done = CliRunner().invoke(
        cli.app, ["chat", "--tools", str(tools_file), "--thinking", "--temperature", "0"], input="\n".join(lines)
    )
    assert done.exit_code == 0
    assert done.stdout == 'weather {"city": "Paris"}\nnow {}\nYes.\n'
    notes = done.stderr
    for note in (
        "/result: the model waits for no result",
        "hello",
        "the model waits for what weather returns: /result VALUE; /reset forgets the conversation",
        "the model waits for what now returns: /result VALUE",
        "/result needs a value, JSON or text",
        "warm",
    ):
        assert note in notes
    turns = json.loads(saved.read_text())["turns"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1]["tool_calls"] == [
        {"name": "weather", "arguments": {"city": "Paris"}},
        {"name": "now", "arguments": {}},
    ]
    assert turns[2]["results"] == [
        {"name": "weather", "result": {"celsius": 20}},
        {"name": "now", "result": "half past"},
    ]
    assert turns[3]["content"] == [{"type": "text", "text": "Yes."}]


def test_control_tokens_are_those_of_the_tiny_tokenizer(engine):
    assert all(engine._tokenizer.token_to_id(token) is not None for token in CONTROL_TOKENS)
