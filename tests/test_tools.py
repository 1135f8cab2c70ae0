"""Function calling: the format, and what may be in it."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.errors import PromptError
from siglance.engine.tool_format import (
    QUOTE,
    CallError,
    parse,
    parse_call,
    render_call,
    render_declaration,
    render_response,
)
from siglance.engine.tools import MAX_DEPTH, Tool, ToolCall, ToolResult, read_tools

from . import tool_trees
from .tool_trees import same


def segments(text: str) -> list[str]:
    return text.split(QUOTE)


def text(pieces: list[str]) -> str:
    return QUOTE.join(pieces)


# -- the law ---------------------------------------------------------------------------------------------------------


@settings(max_examples=2000, deadline=None)
@given(tool=tool_trees.tools, call=tool_trees.calls, result=tool_trees.results)
def test_what_is_written_is_read(tool, call, result):
    """2,000 declarations, calls and results: nested values, awkward keys, quote tokens in strings, all of Unicode."""
    read = parse_call(render_call(call))
    assert read.name == call.name
    assert same(read.arguments, call.arguments)
    name, fields = parse(render_response(result), "response")
    assert name == result.name
    assert same(fields, result.fields)
    declared = tool_trees.tool_of(*parse(render_declaration(tool), "declaration"))
    assert (declared.name, declared.description) == (tool.name, tool.description)
    assert same(declared.parameters, tool.parameters)


@settings(max_examples=300, deadline=None)
@given(call=tool_trees.calls, data=st.data())
def test_a_call_that_is_cut_is_refused_with_a_reason(call, data):
    pieces = render_call(call)
    index = data.draw(st.integers(0, len(pieces) - 1))
    at = data.draw(st.integers(0, len(pieces[index])))
    cut = [*pieces[:index], pieces[index][:at]]
    if cut != pieces:
        with pytest.raises(CallError) as error:
            parse_call(cut)
        assert str(error.value)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text(st.sampled_from('{}[],:"\\ \n1e-.atruenl'), max_size=30), max_size=7))
def test_whatever_is_written_is_read_or_refused(pieces):
    with contextlib.suppress(CallError):
        assert parse_call([f"call:f{{{pieces[0] if pieces else ''}", *pieces[1:]]).name == "f"


# -- the form --------------------------------------------------------------------------------------------------------


def test_the_form_is_that_of_the_published_models():
    parameters = {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["K", "°C"], "description": "scale"},
            "city": {"type": "string", "description": "where"},
        },
        "required": ["city"],
    }
    assert text(render_declaration(Tool("weather.now", "Weather of a city", parameters))) == (
        'declaration:weather.now{description:<|"|>Weather of a city<|"|>,parameters:{properties:{'
        'city:{description:<|"|>where<|"|>,type:<|"|>STRING<|"|>},'
        'unit:{description:<|"|>scale<|"|>,enum:[<|"|>K<|"|>,<|"|>°C<|"|>],type:<|"|>STRING<|"|>}},'
        'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}'
    )
    assert text(render_declaration(Tool("now"))) == 'declaration:now{description:<|"|><|"|>}'
    call = ToolCall("f", {"key": "text", "n": 3, "flag": True, "obj": {"k": 1}, "arr": [1, 2], "B": None})
    assert text(render_call(call)) == 'call:f{arr:[1,2],B:null,flag:true,key:<|"|>text<|"|>,n:3,obj:{k:1}}'
    assert text(render_response(ToolResult("f", {"celsius": -1.5}))) == "response:f{celsius:-1.5}"
    assert text(render_response(ToolResult("f", [1, "a"]))) == 'response:f{value:[1,<|"|>a<|"|>]}'


@pytest.mark.parametrize("keys", [["a b", "c", "1"], ["", "a:b", " c", "d\n", '"', "{", "x,y", "]"]])
def test_keys_that_could_be_taken_for_something_else_are_quoted(keys):
    call = ToolCall("f", dict.fromkeys(keys, 1))
    written = text(render_call(call))
    assert (QUOTE in written) == (keys[0] == "")
    assert parse_call(segments(written)) == call


ACCEPTED = {
    "call:f{}": {},
    " call: f { } ": {},
    "call:f{a:null,b:None}": {"a": None, "b": None},
    "call:f{a:true,b:True,c:false,d:False}": {"a": True, "b": True, "c": False, "d": False},
    "call:f{a:-1,b:1.5e-3,c:1E+2,d:-0.0}": {"a": -1, "b": 0.0015, "c": 100.0, "d": -0.0},
    'call:f{a: <|"|>x<|"|> ,\n b : [ 1 , [ ] , { } ] }': {"a": "x", "b": [1, [], {}]},
    'call:f{"a":"x \\"y\\" \\u00e9 }",<|"|>b:c<|"|>:1}': {"a": 'x "y" é }', "b:c": 1},
    'call:f{a:<|"|>say "hi", {b:1}<|"|>}': {"a": 'say "hi", {b:1}'},
    'call:f{a:<|"|><|"|>}': {"a": ""},
    "call:f{größe:1,a b:2}": {"größe": 1, "a b": 2},
}


@pytest.mark.parametrize("written", ACCEPTED)
def test_what_models_write_is_read(written):
    call = parse_call(segments(written))
    assert call.name == "f"
    assert same(call.arguments, ACCEPTED[written])


REFUSED = {
    "": "expected 'call:', found the end",
    "f{a:1}": "expected 'call:', found 'f{a:1}'",
    "call:f": "expected '{' behind the name, found the end",
    "call:{}": "'' is not the name of a function",
    "call:a b{}": "'a b' is not the name",
    'call:<|"|>f<|"|>{}': "expected '{' behind the name, found a string",
    "call:f{": "expected a key and ':', found the end",
    "call:f{a}": "expected a key and ':', found 'a}'",
    "call:f{a:}": "expected a value, found '}'",
    "call:f{a:1": "expected ',' or '}', found the end",
    "call:f{a:1,}": "expected a key and ':', found '}'",
    "call:f{a:[1,]}": "expected a value, found ']}'",
    "call:f{a:[1}": "expected ',' or ']', found '}'",
    "call:f{a:1}}": "expected the end, found '}'",
    "call:f{a:1} ok": "expected the end, found 'ok'",
    'call:f{a:1}<|"|>x<|"|>': "expected the end, found a string",
    "call:f{a:Paris}": "'Paris' is not a value (text stands between quote tokens)",
    "call:f{a:01}": "'01' is not a value",
    "call:f{a:+1}": "'+1' is not a value",
    "call:f{a:.5}": "'.5' is not a value",
    "call:f{a:NaN}": "'NaN' is not a value",
    "call:f{a:1e999}": "the number '1e999' is out of range",
    f"call:f{{a:{'9' * 5000}}}": "is too long",
    "call:f{a:1,a:2}": "the key 'a' occurs twice",
    "call:f{[a]:1}": "'[a]' is not a key",
    'call:f{a:<|"|>x}': "a string has no end",
    'call:f{a:<|"|>x<|"|>b:1}': "expected ',' or '}', found 'b:1}'",
    'call:f{a:"x}': "a string in double quotes cannot be read",
    'call:f{a:"\\ud800"}': "a string in double quotes cannot be read",
    "call:f(a=1)": "expected '{' behind the name",
    "response:f{}": "expected 'call:'",
}


@pytest.mark.parametrize("written", REFUSED)
def test_what_is_wrong_is_said(written):
    with pytest.raises(CallError) as error:
        parse_call(segments(written))
    assert REFUSED[written] in str(error.value)


@pytest.mark.parametrize(("open", "close"), [("[", "]"), ("{a:", "}")])
def test_depth_is_limited_both_ways(open, close):
    def nested(depth: int) -> str:
        return f"call:f{{a:{open * depth}1{close * depth}}}"

    call = parse_call([nested(MAX_DEPTH - 1)])
    assert parse_call(render_call(call)) == call
    with pytest.raises(CallError, match="more than 64"):
        parse_call([nested(MAX_DEPTH)])
    with pytest.raises(CallError, match="more than 64"):
        parse_call([nested(1_000_000)])
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    with pytest.raises(PromptError, match="more than 64"):
        ToolCall("f", {"a": value})


@pytest.mark.parametrize(
    "piece", ["{a:", "[", "1,", '"', '\\"', "a", "  ", "\n", "a:1,", "9", "-", "1e", ":", "e5", QUOTE, f"{QUOTE},"]
)
def test_reading_takes_time_linear_in_the_text(piece):
    """Half a megabyte of whatever could be tried again and again."""
    pieces = segments(f"call:f{{a:[{piece * (500_000 // len(piece))}")
    begin = time.perf_counter()
    with pytest.raises(CallError):
        parse_call(pieces)
    assert time.perf_counter() - begin < 5


# -- what may be said ------------------------------------------------------------------------------------------------


def test_tools_are_read_in_three_forms():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    function = {"name": "f", "description": "does", "parameters": schema}
    tool = Tool("f", "does", schema)
    for form in (tool, function, {"type": "function", "function": function}, {"function": function}):
        assert read_tools([form]) == (tool,)
    assert tool.declaration() == {"type": "function", "function": function}
    assert read_tools([{"name": "f", "description": None}]) == (Tool("f"),)
    assert Tool("f").declaration() == {"type": "function", "function": {"name": "f", "description": ""}}
    assert Tool("f", parameters={"properties": {}}).parameters == {"type": "object", "properties": {}}
    assert read_tools(()) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"name": "f"}, "tools is dict, expected a list"),
        ("f", "tools is str"),
        (["f"], "tool 0: expected a declaration, not str"),
        ([{"name": "a"}, {}], "tool 1: it has no name"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "tool 0: it is of type 'retrieval'"),
        ([{"function": "f"}], "tool 0: its function is str"),
        ([{"name": "f", "strict": "yes"}], "tool f: strict is 'yes', expected True or False"),
        ([{"name": "f", "type": "function"}], "tool 0: the key 'type' is not supported"),
        ([{"name": "a b"}], "the name is 'a b'"),
        ([{"name": "a{"}], "the name is 'a{'"),
        ([{"name": ""}], "the name is ''"),
        ([{"name": 3}], "the name is 3"),
        ([{"name": "f"}, {"name": "f"}], "two tools have the name 'f'"),
        ([{"name": "f", "description": 1}], "tool f: the description is int"),
        ([{"name": "f", "description": "\ud800"}], "tool f: description: not valid Unicode at character 0"),
        ([{"name": "f", "parameters": []}], "tool f: parameters: expected a JSON schema, not list"),
        ([{"name": "f", "parameters": {"type": "string"}}], "the schema is of type 'string'"),
        ([{"name": "f", "parameters": {"default": float("nan")}}], "tool f: parameters.default: nan is no JSON number"),
    ],
)
def test_tools_that_cannot_be_used_are_named(tools, message):
    with pytest.raises(PromptError) as error:
        read_tools(tools)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "the key 1 is int"),
        ({"a": [1, {2}]}, ".a[1]: a value of type set is no JSON"),
        ({"a": b"x"}, ".a: a value of type bytes is no JSON"),
        (float("inf"), "inf is no JSON number"),
        ("\udfff", "not valid Unicode"),
        ({"\udfff": 1}, "not valid Unicode"),
        pytest.param(10**5000, "is too long", id="long"),
    ],
)
def test_results_are_json(value, message):
    with pytest.raises(PromptError) as error:
        ToolResult("f", value)
    assert message in str(error.value)
    assert "result of f" in str(error.value)


def test_arguments_are_an_object_and_a_copy():
    with pytest.raises(PromptError, match="the arguments are list"):
        ToolCall("f", [])  # pyright: ignore[reportArgumentType]
    given_list = [1]
    call = ToolCall("f", {"a": (given_list, 2)})
    given_list.append(3)
    assert call.arguments == {"a": [[1], 2]}
