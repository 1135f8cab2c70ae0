"""Calls that must come, and calls that are held to the schemas of their tools."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import Engine, Grammar, Sampling, Tool, ToolCall, ToolResult
from siglance.engine.call_grammar import MAX_SCHEMA_BYTES, call_grammar
from siglance.engine.calls import CallRules
from siglance.engine.errors import GrammarError, InputError, PromptError
from siglance.engine.guide import Guide
from siglance.engine.thinking import Markers, ReplyParts

from . import tool_trees
from .held_schemas import declarations, is_valid, rambling
from .scripted import scripted
from .test_fuzz import INPUTS
from .test_grammar import TOY, TOY_CONSTRAINTS
from .tool_template import speller, thinking_bundle

GREEDY = Sampling(temperature=0, seed=0)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER, NOW = Tool("weather", "Weather", CITY), Tool("now")
STRICT = Tool("weather", "Weather", CITY, strict=True)
SPELLED = '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
ROME = ToolCall("weather", {"city": "Rome"})
FORM = Grammar.regex("(red|blue) cat")
QUOTE, END = TOY.token_to_id('<|"|>'), TOY.token_to_id("<tool_call|>")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.open(thinking_bundle(tmp_path_factory.mktemp("held")), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def spell(engine):
    return speller(engine)


def ask(engine, script, **options):
    return scripted(engine, script)[0].generate("hi", **{"sampling": GREEDY, **options})


# -- laws ------------------------------------------------------------------------------------------------------------


def check_forced(engine, tools, seed, choice):
    options = {"tools": tools, "tool_choice": choice, "max_tokens": 1500, "sampling": Sampling(seed=seed)}
    reply = rambling(engine, seed).generate("go", **options)
    assert reply.text == "" or reply.truncated
    assert all(is_valid(call, tools) for call in reply.tool_calls), reply.tool_calls
    if not reply.truncated:
        assert reply.tool_calls
        assert not reply.malformed_calls
        assert reply.finish_reason in ("stop_id", "length")
    assert {call.reason for call in reply.malformed_calls} <= {"the reply ends inside of the call"}
    if choice != "required":
        assert {call.name for call in reply.tool_calls} <= {choice}
        assert len(reply.tool_calls) == (not reply.truncated)
    return reply


@settings(max_examples=150, deadline=None)
@given(declarations(), st.integers(0, 2**32), st.booleans())
def test_law_a_reply_that_must_call_calls_as_declared(engine, tools, seed, named):
    choice = tools[0].name if named else "required"
    reply = check_forced(engine, tools, seed, choice)
    if seed % 8 == 0:
        assert check_forced(engine, tools, seed, choice).token_ids == reply.token_ids


@pytest.mark.fuzz
@settings(max_examples=3 * INPUTS // 10, deadline=None)
@given(declarations(), st.integers(0, 2**32))
def test_law_a_reply_that_must_call_calls_as_declared_at_length(engine, tools, seed):
    check_forced(engine, tools, seed, "required")


def check_strict(engine, tools, seed):
    options = {"tools": tools, "max_tokens": 400, "sampling": Sampling(seed=seed)}
    reply = rambling(engine, seed, "<|tool_call>", "<|tool_call>", "<turn|>").generate("go", **options)
    strict = [tool for tool in tools if tool.strict]
    assert all(any(call.name == tool.name for tool in tools) for call in reply.tool_calls)
    assert all(is_valid(call, strict) for call in reply.tool_calls if any(call.name == tool.name for tool in strict))
    assert {call.reason for call in reply.malformed_calls} <= {"the reply ends inside of the call"}
    return reply


@settings(max_examples=40, deadline=None)
@given(declarations().filter(lambda tools: any(tool.strict for tool in tools)), st.integers(0, 2**32))
def test_law_calls_of_strict_tools_are_valid(engine, tools, seed):
    """Text may stand before them; calls of the other tools are well-formed, and nothing else is called."""
    check_strict(engine, tools, seed)


@pytest.mark.fuzz
@settings(max_examples=3 * INPUTS // 10, deadline=None)
@given(declarations().filter(lambda tools: any(tool.strict for tool in tools)), st.integers(0, 2**32))
def test_law_calls_of_strict_tools_are_valid_at_length(engine, tools, seed):
    check_strict(engine, tools, seed)


@settings(max_examples=100, deadline=None)
@given(tool_trees.tools, st.integers(0, 2**32))
def test_law_any_schema_is_held_to_or_refused(engine, tool, seed):
    """Whatever is in it: nothing but a GrammarError that names the tool."""
    options = {"tools": [tool], "tool_choice": "required", "max_tokens": 300, "sampling": Sampling(seed=seed)}
    reply, reason = None, ""
    try:
        reply = rambling(engine, seed).generate("go", **options)
    except GrammarError as error:
        reason = str(error)
    if reply is None:
        assert reason.startswith(f"tool {tool.name}: parameters") or "declared tools cannot be used" in reason
        return
    assert all(call.name == tool.name for call in reply.tool_calls)
    assert reply.truncated or reply.tool_calls


# -- calls that must come --------------------------------------------------------------------------------------------


def test_a_call_must_come(engine, spell):
    reply = ask(engine, spell("It is warm.<turn|>"), tools=[WEATHER], tool_choice="required", max_tokens=40)
    assert (reply.text, reply.truncated) == ("", False)
    assert reply.tool_calls
    assert all(is_valid(call, [WEATHER]) for call in reply.tool_calls)


def test_what_can_only_be_so_is_not_drawn(engine, spell):
    reply = ask(engine, spell(f"{SPELLED}<turn|>"), tools=[WEATHER], tool_choice="weather")
    assert reply.tool_calls == (ROME,)
    assert reply.usage.forced_tokens >= len(spell("<|tool_call>call:weather{city:"))
    assert reply.token_ids == tuple(spell(SPELLED))


def test_one_or_several(engine, spell):
    twice = spell(f"{SPELLED}{SPELLED}<turn|>")
    assert len(ask(engine, twice, tools=[WEATHER], tool_choice="required").tool_calls) == 2
    assert len(ask(engine, twice, tools=[WEATHER], tool_choice=["weather"]).tool_calls) == 2
    once = [
        {"tool_choice": "weather"},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"parallel_tool_calls": False},
        {"parallel_tool_calls": False, "tools": [STRICT]},
    ]
    for options in once:
        reply = ask(engine, twice, **{"tools": [WEATHER], **options})
        assert (reply.tool_calls, reply.finish_reason, reply.truncated) == ((ROME,), "stop_id", False)


def test_the_function_that_is_named(engine, spell):
    ids = spell(f"{SPELLED}<turn|>")
    assert ask(engine, ids, tools=[WEATHER, NOW], tool_choice="now").tool_calls == (ToolCall("now", {}),)
    calls = ask(engine, ids, tools=[WEATHER, NOW, Tool("f")], tool_choice=["f", "now"], max_tokens=60).tool_calls
    assert {call.name for call in calls} <= {"f", "now"}


def test_text_behind_a_call_that_must_come_is_not_written(engine, spell):
    reply = ask(engine, spell(f"{SPELLED}It is warm.<turn|>"), tools=[WEATHER], tool_choice="required", max_tokens=40)
    assert reply.text == ""
    assert reply.tool_calls[0] == ROME


def test_a_function_may_be_called_like_a_choice(engine, spell):
    assert ask(
        engine, spell("x"), tools=[Tool("auto"), NOW], tool_choice=["auto"], parallel_tool_calls=False
    ).tool_calls == (ToolCall("auto", {}),)


def test_a_thought_before_a_call_that_must_come(engine, spell):
    options = {"tools": [WEATHER], "tool_choice": "required", "thinking": True}
    reply = ask(engine, spell(f"<|channel>thought\nhmm<channel|>{SPELLED}<turn|>"), **options)
    assert (reply.thought, reply.text, reply.tool_calls, reply.truncated) == ("hmm", "", (ROME,), False)
    inside = ask(engine, spell(f"<|channel>thought\nhmm{SPELLED}<turn|>"), **options)
    assert (inside.thought, inside.tool_calls) == ("hmm", (ROME,))
    none = ask(engine, spell(f"{SPELLED}<turn|>"), **options)
    assert (none.thought, none.tool_calls) == ("", (ROME,))


def test_a_thought_does_not_end_the_reply_before_the_call(engine, spell):
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    row[spell("<turn|>")] = 100.0
    row[spell("<channel|>")] = 50.0
    ids = spell("<|channel>thought\nhmm")
    double, _ = scripted(engine, [*ids, *spell(f"<channel|>{SPELLED}<turn|>")], rows={len(ids): row})
    reply = double.generate("hi", tools=[WEATHER], tool_choice="required", thinking=True, sampling=GREEDY)
    assert (reply.thought, reply.tool_calls) == ("hmm", (ROME,))


def test_without_thinking_no_thought_comes_first(engine, spell):
    ids = spell(f"<|channel>thought\nhmm<channel|>{SPELLED}<turn|>")
    reply = ask(engine, ids, tools=[WEATHER], tool_choice="weather", max_tokens=40)
    assert reply.thought == ""
    assert reply.tool_calls


@pytest.mark.parametrize("length", range(1, 12))
def test_a_call_that_must_come_and_is_cut(engine, spell, length):
    ids = spell(f"{SPELLED}{SPELLED}<turn|>")
    assert length < len(spell(SPELLED))
    reply = ask(engine, ids, tools=[WEATHER], tool_choice="required", max_tokens=length)
    assert (reply.finish_reason, reply.truncated, reply.tool_calls) == ("length", True, ())
    whole = ask(engine, ids, tools=[WEATHER], tool_choice="required", max_tokens=len(spell(SPELLED)))
    assert (whole.finish_reason, whole.truncated, whole.tool_calls) == ("length", False, (ROME,))
    more = ask(engine, ids, tools=[WEATHER], tool_choice="required", max_tokens=len(spell(SPELLED)) + length)
    assert (more.truncated, more.tool_calls) == (True, (ROME,))


def test_a_thought_that_never_reaches_its_call_is_truncated(engine, spell):
    ids = spell("<|channel>thought\nhmm hmm hmm")
    reply = ask(engine, ids, tools=[WEATHER], tool_choice="required", thinking=True, max_tokens=8)
    assert (reply.truncated, reply.thought_finished, reply.tool_calls) == (True, False, ())


def test_behind_a_call_no_thought_begins():
    """A reply of calls may think before the first of them; behind it another call follows, or the end."""
    markers, stop = Markers(thought=10, thought_end=11, call=12, call_end=13, quote=14), 1
    parts = SimpleNamespace(in_answer=True, in_thought=False, in_call=False, thoughts=0, calls=[])
    guide = Guide(None, CallRules(required=True), markers, cast(ReplyParts, parts), thinking=True)

    def allowed() -> list[int]:
        mask = guide.mask(32, {stop})
        assert mask is not None
        return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()

    assert (allowed(), guide.forced()) == ([markers.thought, markers.call], [])
    guide.follow(markers.call)
    parts.calls.append("a call")
    assert (allowed(), guide.forced()) == ([stop, markers.call], [])


def test_candidates_and_log_probabilities(engine):
    options = {"tools": [WEATHER, NOW], "tool_choice": "required", "candidates": 3, "logprobs": 1, "max_tokens": 300}
    reply = rambling(engine, 5).generate("hi", sampling=Sampling(seed=5), **options)
    for candidate in reply.candidates:
        assert candidate.truncated or candidate.tool_calls
        assert all(is_valid(call, [WEATHER, NOW]) for call in candidate.tool_calls)
        assert candidate.logprobs is not None
        assert len(candidate.logprobs) == len(candidate.token_ids)


def test_the_real_decoder_calls(engine):
    reply = engine.generate("hi", tools=[WEATHER, NOW], tool_choice="required", max_tokens=200, sampling=GREEDY)
    assert reply.tool_calls
    assert all(is_valid(call, [WEATHER, NOW]) for call in reply.tool_calls)


# -- no calls --------------------------------------------------------------------------------------------------------


def test_none_is_no_call_and_no_tool(engine, spell):
    double, runtime = scripted(engine, spell(f"{SPELLED}<turn|>"))
    reply = double.generate("hi", tools=[WEATHER], tool_choice="none", sampling=GREEDY, max_tokens=30)
    assert (reply.tool_calls, reply.malformed_calls) == ((), ())
    assert runtime.ids == double.generate("hi", sampling=GREEDY, max_tokens=1).prompt_token_ids or runtime.ids
    assert "<|tool>" not in double._tokenizer.decode(runtime.ids, skip_special_tokens=False)
    assert ask(engine, spell("red"), tools=[WEATHER], tool_choice="none", format=FORM).text == "red cat"


# -- strict ----------------------------------------------------------------------------------------------------------


def test_text_before_a_strict_call(engine, spell):
    reply = ask(engine, spell(f"Let me see.{SPELLED}<turn|>"), tools=[STRICT])
    assert (reply.text, reply.tool_calls, reply.finish_reason) == ("Let me see.", (ROME,), "stop_id")
    assert ask(engine, spell("Warm.<turn|>"), tools=[STRICT]).text == "Warm."


@pytest.mark.parametrize(
    "written",
    [
        'call:weather{town:<|"|>Rome<|"|>}',
        'call:weather{city:<|"|>Oslo<|"|>}',
        "call:weather{city:Rome}",
        'call:weather{city:<|"|>Rome<|"|>,days:12}',
        'call:weather{city:<|"|>Rome<|"|>,x:1}',
        "call:climate{}",
        "weather in Rome",
    ],
)
def test_a_strict_call_cannot_be_wrong(engine, spell, written):
    reply = ask(engine, spell(f"Well: <|tool_call>{written}<tool_call|><turn|>"), tools=[STRICT, NOW], max_tokens=60)
    assert reply.text.startswith("Well: ")
    assert not [call for call in reply.malformed_calls if call.reason != "the reply ends inside of the call"]
    assert all(is_valid(call, [STRICT, NOW]) for call in reply.tool_calls)


def test_tools_that_are_not_strict_are_not_held(engine, spell):
    ids = spell('<|tool_call>call:now{zone:<|"|>UTC<|"|>}<tool_call|><turn|>')
    assert ask(engine, ids, tools=[STRICT, NOW]).tool_calls == (ToolCall("now", {"zone": "UTC"}),)
    odd = spell("<|tool_call>call:later{a:x}<tool_call|><turn|>")
    assert ask(engine, odd, tools=[WEATHER]).malformed_calls


def test_a_strict_call_inside_of_a_thought(engine, spell):
    ids = spell(f"<|channel>thought\nhmm{SPELLED}<turn|>")
    reply = ask(engine, ids, tools=[STRICT], thinking=True)
    assert (reply.thought, reply.tool_calls) == ("hmm", (ROME,))


# -- with a form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [WEATHER, STRICT])
@pytest.mark.parametrize("thought", ["", "<|channel>thought\nhmm<channel|>"])
def test_a_reply_is_in_its_form_or_calls(engine, spell, tool, thought):
    options = {"tools": [tool], "format": FORM, "thinking": bool(thought)}
    said = ask(engine, spell(f"{thought}blue cat<turn|>"), **options)
    assert (said.text, said.tool_calls, said.truncated) == ("blue cat", (), False)
    called = ask(engine, spell(f"{thought}{SPELLED}and more<turn|>"), **options, max_tokens=60)
    assert (called.text, called.tool_calls[0], called.truncated) == ("", ROME, False)
    late = ask(engine, spell(f"{thought}blue{SPELLED}<turn|>"), **options, max_tokens=60)
    assert (late.text, late.tool_calls) == ("blue cat", ())


# -- chats -----------------------------------------------------------------------------------------------------------


def test_a_chat_may_call_in_one_turn_and_must_in_another(engine, spell):
    double, runtime = scripted(engine, spell(f"{SPELLED}<turn|>"))
    chat = double.chat(tools=[WEATHER, NOW], tool_choice="weather", sampling=GREEDY)
    assert chat.send("hi").tool_calls == (ROME,)
    runtime.script = spell(f"Warm.{SPELLED}<turn|>")
    reply = chat.send([ToolResult("weather", 20)], tool_choice="none", max_tokens=5)
    assert reply.tool_calls == ()
    assert reply.text.startswith("Warm.")


# -- what is written -------------------------------------------------------------------------------------------------


def accepts(parameters, *arguments: str) -> list[bool]:
    """Which arguments, as a model spells them, the grammar of a declaration takes."""
    tool = Tool("f", "", parameters, strict=True)
    begun = TOY_CONSTRAINTS.compile_calls(call_grammar([tool], quote=QUOTE, end=END, all_held=False))
    found: list[bool] = []
    for text in arguments:
        constraint = begun.copy()
        ids: list[int] = []
        for index, piece in enumerate(f"call:f{text}".split('<|"|>')):
            ids += [*([QUOTE] if index else []), *TOY.encode(piece, add_special_tokens=False).ids]
        try:
            for id in (*ids, END):
                constraint.accept(id)
        except GrammarError:
            found.append(False)
        else:
            found.append(constraint.ended)
    return found


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (None, ["{}"], ["{a:1}", "", "{ }"]),
        ({"type": "object"}, ["{}"], ["{a:1}"]),
        (
            {"properties": {"b": {"type": "integer"}, "A": {"type": "null"}}},
            ["{A:null,b:1}", "{b:-0}", "{}"],
            ["{b:1,A:null}", "{b:1,}", "{,b:1}"],
        ),
        (
            {"properties": {"a": {"type": "string"}}, "required": ["a"]},
            ['{a:<|"|>x"}<|"|>}', '{a:<|"|><|"|>}'],
            ["{}", "{a:x}", '{a:"x"}'],
        ),
        ({"properties": {"a b": {}, "c:": {}}}, ["{a b:1}", '{<|"|>c:<|"|>:[{x:1},true]}'], ["{c::1}"]),
        ({"properties": {}, "required": ["z"]}, ["{z:1}", "{z:{}}"], ["{}"]),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
            ["{a:null,b:1,c:2}", "{q:3}", "{}"],
            ["{b:null}", "{b:1,a:2}"],
        ),
        (
            {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}}},
            ["{a:[1]}", "{a:[1,2]}"],
            ["{a:[]}", "{a:[1,2,3]}", "{a:[1,]}"],
        ),
        (
            {"properties": {"a": {"prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False}}},
            ["{a:[]}", "{a:[null]}", "{a:[null,true]}"],
            ["{a:[true]}", "{a:[null,true,1]}"],
        ),
        (
            {"properties": {"a": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}},
            ["{a:1}", "{a:0.5}"],
            ["{a:0}", "{a:1.1}", "{a:-0.5}"],
        ),
        (
            {"properties": {"a": {"type": "INTEGER", "format": "int32"}}},
            ["{a:2147483647}"],
            ["{a:2147483648}", "{a:1.5}"],
        ),
        (
            {"properties": {"a": {"type": "string", "pattern": "^[a-c]+$"}}},
            ['{a:"abc"}'],
            ['{a:"d"}', '{a:<|"|>abc<|"|>}'],
        ),
        (
            {"properties": {"a": {"enum": ["x", 1, None, ["y", {"k": True}]]}}},
            ['{a:<|"|>x<|"|>}', "{a:1}", "{a:null}", '{a:[<|"|>y<|"|>,{k:true}]}'],
            ["{a:2}", "{a:x}"],
        ),
        ({"properties": {"a": {"type": "string", "enum": ["x", 1]}}}, ['{a:<|"|>x<|"|>}'], ["{a:1}"]),
        (
            {"properties": {"a": {"type": "string", "nullable": True, "maxLength": 1}}},
            ["{a:null}", '{a:<|"|>x<|"|>}'],
            ['{a:<|"|>xy<|"|>}'],
        ),
        (
            {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "properties": {"a": {"$ref": "#"}}}}},
            ["{}", "{a:{a:{}}}"],
            ["{b:1}"],
        ),
        ({"properties": {"a": False, "b": True}}, ["{}", "{b:1}"], ["{a:1}"]),
        ({"properties": {"a": {"allOf": [{"type": "integer"}, {"minimum": 3}]}}}, ["{a:3}"], ["{a:2}"]),
        (
            {"anyOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}}]},
            ["{a:null}", "{b:null}", "{}"],
            ["{a:null,b:null}"],
        ),
    ],
)
def test_arguments_by_their_schema(schema, right, wrong):
    assert accepts(schema, *right, *wrong) == [True] * len(right) + [False] * len(wrong)


def test_a_key_that_comes_twice_among_any_keys(engine, spell):
    """No grammar knows which keys there have been; the call is not lost, the last value counts, as in JSON."""
    tool = Tool("f", "", {"type": "object", "additionalProperties": {"type": "integer"}})
    ids = spell("<|tool_call>call:f{a:1,a:2}<tool_call|><turn|>")
    assert ask(engine, ids, tools=[tool], tool_choice="f").tool_calls == (ToolCall("f", {"a": 2}),)
    assert ask(engine, ids, tools=[tool]).malformed_calls


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tool_choice": "required"}, PromptError, "tool_choice is 'required', and no tools are declared"),
        ({"tool_choice": "weather"}, PromptError, "tool_choice is 'weather', and no tools are declared"),
        ({"tools": [NOW], "tool_choice": "later"}, PromptError, r"no tool has the name 'later' \(declared: now\)"),
        ({"tools": [NOW], "tool_choice": ["now", "x"]}, PromptError, "no tool has the name 'x'"),
        ({"tools": [NOW], "tool_choice": []}, PromptError, "a list without names"),
        ({"tools": [NOW], "tool_choice": 3}, PromptError, "tool_choice is 3, expected 'auto', 'none', 'required'"),
        ({"tools": [NOW], "tool_choice": [3]}, PromptError, r"tool_choice is \[3\]"),
        ({"tools": [NOW], "tool_choice": None}, PromptError, "tool_choice is None"),
        ({"tools": [NOW], "parallel_tool_calls": 0}, PromptError, "parallel_tool_calls is 0, expected True or False"),
        ({"tools": [NOW], "tool_choice": "now", "format": FORM}, InputError, "format and tool_choice 'now' exclude"),
    ],
)
def test_choices_that_cannot_be(engine, options, error, message):
    double, runtime = scripted(engine, [1])
    with pytest.raises(error, match=message):
        double.generate("hi", **options)
    assert runtime.prefills == 0


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "tool f: parameters.x: 'not' cannot be held to in a call"),
        ({"type": "object", "patternProperties": {"a": {}}}, "'patternProperties' cannot be held to"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' cannot be held to"),
        ({"type": "thing"}, "'type' is 'thing', expected string, integer"),
        ({"$ref": "#/$defs/none"}, "the reference '#/$defs/none' leads to nothing"),
        ({"$ref": "https://example.com/x"}, "leads out of the schema"),
        ({"$ref": "#/properties/x"}, "'#/properties/x' refers to itself"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a value could be valid by two of them"),
        ({"enum": ["a"], "type": "string", "minLength": 2}, "'minLength' beside a list of values cannot be held to"),
        ({"type": "string", "minLength": -1}, "'minLength' is '-1', expected an integer of 0 or more"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing of up to 32 levels is valid"),
        ({"type": "integer", "minimum": "3"}, "'minimum' is '3', expected a number"),
        ({"type": "object", "required": "a"}, "'required' is 'a', expected a list"),
        ({"type": "object", "properties": []}, "'properties' is '[]', expected an object"),
        ({"items": 3}, "tool f: parameters.x.items: expected a schema, found '3'"),
        ({"anyOf": {}}, "'anyOf' is '{}', expected a list"),
        ({"type": "string", "format": "secret"}, "Unknown format: secret"),
        ({"type": "string", "pattern": "("}, "cannot be used"),
        ({"type": "integer", "multipleOf": 999983, "minimum": 0}, "'multipleOf'"),
        ({"$ref": "#/$defs/node"}, "nothing of up to 32 levels is valid"),
        ({"allOf": [{"type": "integer", "minimum": 1}, {"minimum": 2}]}, "'minimum' is there twice"),
    ],
)
def test_schemas_that_cannot_be_held_to(engine, schema, message):
    """Nothing runs; the same tool may be used where nothing is held to it."""
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": {"node": node}}
    double, runtime = scripted(engine, [1])
    for options in (
        {"tools": [Tool("f", "", parameters)], "tool_choice": "required"},
        {"tools": [Tool("f", "", parameters, strict=True)]},
    ):
        with pytest.raises(GrammarError) as error:
            double.generate("hi", **options)
        assert message in str(error.value)
    assert runtime.prefills == 0


def test_schemas_that_would_cost_too_much():
    doubled = {f"d{index}": {"allOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2} for index in range(40)}
    deep = {"$ref": "#/$defs/d0", "$defs": {**doubled, "d40": {"type": "integer"}}}
    union = {"oneOf": [{"const": index} for index in range(2000)]}
    wide = {"enum": ["x" * 1000] * (MAX_SCHEMA_BYTES // 1000)}
    begin = time.perf_counter()
    for schema in (deep, union, wide):
        defs = schema.pop("$defs", {})
        with pytest.raises(GrammarError, match=r"more than 50000 steps|bytes, the limit is"):
            accepts({"type": "object", "properties": {"x": schema}, "$defs": defs}, "{}")
    assert time.perf_counter() - begin < 10


def test_many_large_declarations():
    """As agents send them: 128 tools with a dozen arguments each."""
    properties = {
        f"argument{index}": [{"type": "string", "description": "x" * 40}, {"type": "integer", "minimum": index}][
            index % 2
        ]
        for index in range(12)
    }
    tools = [Tool(f"tool{index}", "", {"type": "object", "properties": properties}) for index in range(128)]
    constraint = TOY_CONSTRAINTS.compile_calls(call_grammar(tools, quote=QUOTE, end=END, all_held=True))
    for id in TOY.encode("call:tool77{argument0:", add_special_tokens=False).ids:
        constraint.accept(id)
    assert json.dumps(constraint.forced())


def test_bundles_without_tools(tiny_model):
    with Engine.open(tiny_model("gemma3").bundle.folder, threads=1) as other:
        for options in ({"tool_choice": "required"}, {"tools": [STRICT]}):
            with pytest.raises(PromptError, match="no form for calls"):
                other.generate("hi", **{"tools": [WEATHER], **options})
