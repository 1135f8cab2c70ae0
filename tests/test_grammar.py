"""Structured replies: what a grammar allows, what it forces, what it costs, and how it fails.

Case numbers are public bug reports of other engines.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from siglance.engine import Engine, Grammar, Sampling, Text, cli
from siglance.engine.errors import GrammarError, InputError
from siglance.engine.grammar import MAX_GRAMMAR_BYTES, Constraint, Constraints
from siglance.engine.text import TextStream, special_ids, token_bytes
from siglance.export.demo.scenes import LABELS, scene

from .scripted import picture, scripted, with_manifest
from .toy_tokenizer import toy_tokenizer

GREEDY = Sampling(temperature=0)
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}

TOY = toy_tokenizer()
TOY.encode_special_tokens = True
STOP = TOY.token_to_id("<turn|>")
TOY_SIZE = TOY.get_vocab_size() + 3  # padded rows
TOY_CONSTRAINTS = Constraints(TOY, TOY_SIZE, [STOP], "box_2d")


@pytest.fixture(scope="module")
def demo():
    with Engine.open(threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def letters(engine):
    """`letters(text)`: one id per character."""
    return lambda text: [engine._tokenizer.encode(letter, add_special_tokens=False).ids[-1] for letter in text]


def allowed(constraint: Constraint, stop_ids: tuple[int, ...] = ()) -> set[int]:
    bits = np.unpackbits(constraint.mask(stop_ids), bitorder="little")
    return {int(id) for id in np.flatnonzero(bits)}


def text_of(ids: list[int]) -> str:
    stream = TextStream(TOY, (), special_ids(TOY))
    return "".join(map(stream.push, ids)) + stream.finish()


# -- tokens as bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "demo", "tiny"])
def test_tokens_are_read_as_llguidance_reads_tokenizers(name, demo, engine):
    """Byte fallback and "▁" included. Only special tokens differ, which for us are never part of a text."""
    tokenizer = {"toy": TOY, "demo": demo._tokenizer, "tiny": engine._tokenizer}[name]
    theirs, special = LLTokenizer(tokenizer.to_str()), special_ids(tokenizer)
    for id in range(tokenizer.get_vocab_size()):
        if id not in special:
            assert token_bytes(tokenizer, id) == theirs.decode_bytes([id]), tokenizer.id_to_token(id)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"ab <>é世🦝", " the", "hello", "<turn|>", "<bos>", "<0x41>", "\n\n"]), max_size=8))
def test_law_forced_text_is_the_tokenizers_own_tokens(pieces):
    """A literal is forced as it would be encoded; spellings of control tokens stay text."""
    text = "".join(pieces)
    constraint = TOY_CONSTRAINTS.compile(Grammar.lark(f"start: {json.dumps(text, ensure_ascii=False)}"))
    found: list[int] = []
    while not constraint.ended and (forced := constraint.forced()):
        for id in forced:
            constraint.accept(id)
        found += forced
    assert found == TOY.encode(text, add_special_tokens=False).ids
    assert not set(found) & special_ids(TOY)
    assert constraint.complete
    assert constraint.matches(text)


def test_a_grammar_cannot_make_text_into_a_control_token(demo):
    """Case 21 for replies: the spelling of a turn marker in a schema is spelled out."""
    marker = "<turn|>"
    schema = {
        "type": "object",
        "properties": {"a": {"const": marker}},
        "required": ["a"],
        "additionalProperties": False,
    }
    reply = demo.generate("x", format=Grammar.json_schema(schema), sampling=GREEDY)
    assert json.loads(reply.text) == {"a": marker}
    assert demo._tokenizer.token_to_id(marker) not in reply.token_ids
    assert reply.finish_reason == "stop_id"


def test_a_lark_grammar_can_ask_for_a_special_token(demo):
    reply = demo.generate("x", format=Grammar.lark('start: "a" <|think|> "b"'), sampling=GREEDY)
    assert reply.text == "ab"
    assert demo._tokenizer.token_to_id("<|think|>") in reply.token_ids


# -- whatever is allowed leads to a text that the grammar accepts ----------------------------------------------------

PATTERNS = [
    r"[a-c]{1,4}(, [a-c]{1,4})*",
    r"-?[0-9]+(\.[0-9]{2})?",
    r"(hello|the world|世界|🦝){1,3}",
    r"(red|green) (circle|square)\n\n?",
    r'"([^"\\\n]|\\["\\n])*"',
    r"é?(ab|a)*",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_law_any_allowed_path_is_a_match(pattern, seed, steps):
    constraint = TOY_CONSTRAINTS.compile(Grammar.regex(pattern))
    generator, ids = np.random.default_rng(seed), []
    while not constraint.ended and len(ids) < steps:
        forced, choices = constraint.forced(), allowed(constraint, (STOP,))
        assert (STOP in choices) == constraint.complete
        assert not choices & (special_ids(TOY) - {STOP})
        assert all(id < TOY.get_vocab_size() for id in choices)
        if forced:
            assert forced[0] in choices
            next_id = forced[0]
        elif choices <= {STOP}:
            break
        else:
            next_id = int(generator.choice(sorted(choices - {STOP})))
        constraint.accept(next_id)
        ids.append(next_id)
        copy = constraint.copy()
        assert (copy.complete, copy.ended, allowed(copy) if not copy.ended else None) == (
            *(constraint.complete, constraint.ended),
            allowed(constraint) if not constraint.ended else None,
        )
    if constraint.complete:
        assert re.fullmatch(pattern, text_of(ids))
        assert constraint.matches(text_of(ids))
    assert constraint.matches("never this") is False


def test_a_token_that_is_not_allowed_is_refused():
    constraint = TOY_CONSTRAINTS.compile(Grammar.regex("[0-9]+"))
    with pytest.raises(GrammarError, match="cannot go on after 0 tokens"):
        constraint.accept(TOY.encode("a", add_special_tokens=False).ids[0])


# -- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_replies_to_a_schema_are_valid_whatever_the_model_thinks(engine, temperature):
    """Random weights, high temperature: still JSON by the schema, in Python's own style."""
    for seed in range(8):
        reply = engine.generate(
            "x", format=Grammar.json_schema(COLOUR), sampling=Sampling(temperature=temperature, top_k=0, seed=seed)
        )
        value = json.loads(reply.text)
        assert list(value) == ["colour", "count"]
        assert value["colour"] in ("red", "green")
        assert 0 <= value["count"] <= 99
        assert reply.text == json.dumps(value)
        assert (reply.finish_reason, reply.truncated) == ("stop_id", False)
        assert 0 < reply.usage.forced_tokens < reply.usage.completion_tokens == len(reply.token_ids)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex("[0-9]{3}-[a-f]{2}"), "[0-9]{3}-[a-f]{2}"),
        (Grammar.lark('start: pair ("," pair)~2\npair: /[a-c]/ ":" /[0-9]/'), "[a-c]:[0-9](,[a-c]:[0-9]){2}"),
        (Grammar.json_schema('{"enum": ["yes", "no"]}'), '"(yes|no)"'),
    ],
    ids=["regex", "lark", "schema text"],
)
def test_replies_to_other_grammars(engine, grammar, pattern):
    reply = engine.generate("x", format=grammar, sampling=Sampling(temperature=2, top_k=0, seed=1))
    assert re.fullmatch(pattern, reply.text)
    assert (reply.finish_reason, reply.truncated) == ("stop_id", False)


def test_stream_and_candidates_with_a_grammar(engine):
    """Each candidate begins the grammar anew."""
    options = {"format": Grammar.json_schema(COLOUR), "sampling": Sampling(temperature=2, top_k=0, seed=1)}
    chunks = list(engine.stream("x", candidates=3, **options))
    reply = chunks[-1].reply
    for index, one in enumerate(reply.candidates):
        assert set(json.loads(one.text)) == {"colour", "count"}
        own = [chunk for chunk in chunks if chunk.candidate == index]
        assert "".join(chunk.text for chunk in own) == one.text
        assert tuple(id for chunk in own for id in chunk.token_ids) == one.token_ids
    assert reply.usage.forced_tokens == sum(one.forced_tokens for one in reply.candidates)
    assert reply.candidates[0].text == engine.generate("x", **options).text


def test_forced_tokens_join_the_run_of_the_token_before_them(engine, letters):
    """A choice, then seven forced tokens, a choice, one forced token: runs of 1 + 7 and 1 + 1, the last not run."""
    double, runtime = scripted(engine, [*letters("a-......"), *letters("2!")])
    reply = double.generate("go", format=Grammar.regex(r"[ab]-\.{6}[1-3]!"), sampling=GREEDY)
    assert reply.text == "a-......2!"
    assert [len(tokens) for tokens in runtime.extended] == [8]
    assert reply.usage.forced_tokens == 8
    assert (reply.usage.completion_tokens, reply.finish_reason) == (10, "stop_id")


def test_a_reply_may_be_forced_from_its_beginning_to_its_end(engine, letters):
    double, runtime = scripted(engine, letters("x"))
    reply = double.generate("go", format=Grammar.regex("abcxyz"))
    assert (reply.text, reply.usage.forced_tokens, runtime.extended) == ("abcxyz", 6, [])
    assert reply.timings.first_token > 0


def test_long_forced_texts_run_in_chunks_of_the_prefill(engine, letters):
    double, runtime = scripted(engine, letters("x"))
    reply = double.generate("go", format=Grammar.regex("(abc){5}[01]"), prefill_chunk=4, max_tokens=16)
    assert [len(tokens) for tokens in runtime.extended] == [4, 4, 4, 3]
    assert reply.text[:15] == "abc" * 5


def test_what_runs_in_one_pass_gives_what_runs_one_by_one(demo):
    """With log-probabilities each forced token has a run of its own; the reply is the same."""
    schema = {"type": "array", "items": {"const": "a fixed and rather long text"}, "minItems": 3, "maxItems": 3}
    for format in (Grammar.json_schema(schema), Grammar.detections(), Grammar.json_schema(COLOUR)):
        options = {"format": format, "max_tokens": 60, "sampling": Sampling(temperature=0.9, seed=4)}
        plain = demo.generate([scene(5).image, Text("detect all")], **options)
        other = demo.generate([scene(5).image, Text("detect all")], logprobs=2, **options)
        assert (other.text, other.token_ids) == (plain.text, plain.token_ids)
        assert other.usage.forced_tokens == plain.usage.forced_tokens


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_extending_a_session_by_several_tokens_equals_step_by_step(tiny_model, family):
    """Also beyond the window, where the operator evicts, and right behind a prompt."""
    runtime = tiny_model(family).runtime
    tokens = np.random.default_rng(0).integers(100, 300, 70).tolist()
    one, many = runtime.session(), runtime.session()
    for session in (one, many):
        session.prefill(np.array(tokens[:20]))
    for chunk in (tokens[20:21], tokens[21:30], tokens[30:33], tokens[33:70]):
        for token in chunk:
            expected = one.step(token)
        np.testing.assert_allclose(many.extend(chunk), expected, atol=1e-3)
        assert one.length == many.length


def test_log_probabilities_of_forced_tokens_are_the_models(demo):
    options = {"format": Grammar.regex("A red [cs][a-z]{5} and more"), "sampling": GREEDY}
    reply = demo.generate("describe", logprobs=0, **options)
    assert reply.usage.forced_tokens > 3
    logits = demo.prompt_logits([], prompt_ids=[*reply.prompt_token_ids, *reply.token_ids]).astype(np.float64)
    for place, entry in enumerate(reply.logprobs, start=len(reply.prompt_token_ids) - 1):
        row = logits[place]
        expected = row[entry.id] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert entry.logprob == pytest.approx(expected, abs=1e-3)


def test_penalties_count_forced_tokens(engine, letters):
    a, b = letters("ab")
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    row[[a, b]] = 5.0, 4.9
    double, _ = scripted(engine, [a], rows=dict.fromkeys(range(9), row))
    format = Grammar.regex("aaa-[ab]")
    assert double.generate("go", format=format, sampling=GREEDY).text == "aaa-a"
    assert double.generate("go", format=format, sampling=Sampling(temperature=0, frequency_penalty=0.1)).text == "aaa-b"


# -- how replies end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "limit", "text", "finish", "truncated"),
    [
        ("12", 1, "1", "length", True),
        ("12]", 5, "12]", "stop_id", False),  # the grammar lets nothing follow, at the limit or before it
        ("12]", 3, "12]", "stop_id", False),
        ("12]", 2, "12", "length", True),
    ],
)
def test_case_70_output_cut_by_the_limit_is_returned_and_marked(
    engine, letters, script, limit, text, finish, truncated
):
    double, _ = scripted(engine, letters(script))
    reply = double.generate("go", format=Grammar.regex(r"[0-9]{1,3}\]"), max_tokens=limit, sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == (text, finish, truncated)


def test_the_limit_may_fall_among_forced_tokens(engine, letters):
    double, runtime = scripted(engine, letters("a"))
    reply = double.generate("go", format=Grammar.regex("[ab]-------"), max_tokens=4, sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == ("a---", "length", True)
    assert (reply.usage.completion_tokens, reply.usage.forced_tokens, runtime.steps) == (4, 3, 0)


def test_the_context_may_end_among_forced_tokens(engine, letters):
    with with_manifest(engine, context=16) as narrow:
        double, _ = scripted(narrow, letters("a"))
        reply = double.generate(
            [], prompt_ids=[2, *[100] * 11], format=Grammar.regex("[ab]----------"), sampling=GREEDY
        )
        assert (reply.finish_reason, reply.truncated) == ("context", True)
        assert reply.text == "a----"  # 12 + 4 rows, and the token drawn behind the last
        real = narrow.generate([], prompt_ids=[2, *[100] * 11], format=Grammar.regex("[ab]----------"))
        assert (real.finish_reason, len(real.text)) == ("context", 5)


def test_the_model_ends_only_where_the_grammar_may(engine, letters):
    """A stop token drawn too early is not on offer; behind a complete number it is."""
    own = engine.manifest.stop_ids[0]
    double, _ = scripted(engine, [own, own, own])
    reply = double.generate("go", format=Grammar.regex("[0-9]{2,}"), sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == ("00", "stop_id", False)


def test_stop_ids_of_the_request_with_a_grammar(engine, letters):
    [x, comma] = letters("x,")
    double, _ = scripted(engine, [*letters("12"), x])
    reply = double.generate("go", format=Grammar.regex("[0-9]{1,5}"), stop_ids=[x], sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == ("12", "stop_id", False)
    double, _ = scripted(engine, letters("1,2"))
    reply = double.generate("go", format=Grammar.regex("[0-9],[0-9]"), stop_ids=[comma], sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == ("1", "stop_id", True)


@pytest.mark.parametrize(("pattern", "truncated"), [("[a-z]*!?", False), ("[a-z]+!", True)])
def test_stop_strings_with_a_grammar(engine, letters, pattern, truncated):
    """What the stop string leaves is judged, not what the model wrote."""
    double, _ = scripted(engine, letters("abstop!"))
    reply = double.generate("go", format=Grammar.regex(pattern), stop=["stop"], sampling=GREEDY)
    assert (reply.text, reply.finish_reason, reply.truncated) == ("ab", "stop_text", truncated)


def test_case_29_the_limit_inside_a_character_of_a_grammar(engine):
    ids = engine._tokenizer.encode("🦝", add_special_tokens=False).ids
    double, _ = scripted(engine, ids)
    reply = double.generate("go", format=Grammar.regex("(🦝|🦊)+"), max_tokens=len(ids) - 1, sampling=GREEDY)
    assert (reply.text, reply.truncated) == ("", True)
    reply = double.generate("go", format=Grammar.regex("(🦝|🦊)+"), max_tokens=len(ids), sampling=GREEDY)
    assert (reply.text, reply.truncated) == ("🦝", False)


def test_case_70_no_white_space_to_repeat_and_quotes_are_escaped(engine, letters):
    """A model that wants nothing but blanks gets JSON done all the same; a quote in a value does not end it."""
    [space] = letters(" ")
    double, _ = scripted(engine, [space])
    reply = double.generate("go", format=Grammar.json_schema(COLOUR), max_tokens=40, sampling=GREEDY)
    assert set(json.loads(reply.text)) == {"colour", "count"}
    assert "  " not in reply.text
    double, _ = scripted(engine, letters('"say \\"hi\\" now"'))
    reply = double.generate("go", format=Grammar.json_schema({"type": "string"}), max_tokens=40, sampling=GREEDY)
    assert json.loads(reply.text) == 'say "hi" now'
    assert reply.finish_reason == "stop_id"


# -- detections ------------------------------------------------------------------------------------------------------


def test_detections_of_the_demo(demo):
    for index in range(3):
        reply = demo.generate([scene(index).image, Text("detect all")], format=Grammar.detections())
        found = json.loads(reply.text)
        assert len(found) == len(reply.boxes) > 0
        assert {box.label for box in reply.boxes} <= set(LABELS)
        assert reply.usage.forced_tokens > 0
        assert not reply.truncated


def test_detections_whatever_the_model_thinks(engine):
    """Random weights write lists of boxes too, cut by the limit or not."""
    options = {"format": Grammar.detections(), "image_tokens": 70, "max_tokens": 150}
    for seed in range(4):
        reply = engine.generate([picture(), "x"], sampling=Sampling(temperature=1.5, seed=seed), **options)
        assert reply.truncated == (reply.finish_reason == "length")
        assert re.match(r'\[(\]|\{"box_2d": \[)', reply.text)


def locations(ids: str = "all") -> Tokenizer:
    """The toy tokenizer with the location tokens of PaliGemma, as text."""
    tokenizer = toy_tokenizer()
    names = [f"<loc{index:04}>" for index in range(1024)]
    tokenizer = Tokenizer.from_str(tokenizer.to_str().replace("<loc", "<old"))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in (names if ids == "all" else names[:-1])])
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_detections_with_location_tokens():
    """Only whole location tokens will do; their spelling in letters is not on offer."""
    tokenizer = locations()
    first = tokenizer.token_to_id("<loc0000>")
    constraint = Constraints(tokenizer, tokenizer.get_vocab_size(), [STOP], "loc").compile(Grammar.detections())
    places = set(range(first, first + 1024))
    assert allowed(constraint) == places | {STOP}  # or nothing found at all
    for text in ("<loc0001><loc0002><loc1023><loc0004> the world ; <loc0000><loc0000><loc0001><loc0001> fox", ""):
        copy = constraint.copy()
        for id in tokenizer.encode(text, add_special_tokens=False).ids:
            assert id in allowed(copy)
            copy.accept(id)
        assert copy.complete
        assert constraint.matches(text)
    constraint.accept(first)
    assert allowed(constraint) == places
    for wrong in ("<loc0001>", "<loc0001><loc0002><loc0003><loc0004>", "the world", "<loc0001><loc0002>a"):
        assert not constraint.matches(wrong)


def test_detections_that_a_bundle_cannot_write(engine):
    with with_manifest(
        engine, reply=engine.manifest.reply.__class__(boxes="none", thought=None, tool_call=None)
    ) as blind:
        double, runtime = scripted(blind, [5])
        with pytest.raises(GrammarError, match="answers without boxes"):
            double.generate([picture(), "x"], format=Grammar.detections())
        assert (runtime.encodes, runtime.prefills) == (0, 0)
    incomplete = locations("some")
    with pytest.raises(GrammarError, match="does not have <loc0000> to <loc1023>"):
        Constraints(incomplete, incomplete.get_vocab_size(), [STOP], "loc").compile(Grammar.detections())


# -- grammars that are none ------------------------------------------------------------------------------------------

# What matches the second pattern is declared elsewhere.
PATTERNS = {"type": "object", "patternProperties": {"^b": {"type": "integer"}, "^a$": {"type": "string"}}}
MANY = {
    "properties": dict.fromkeys(map(str, range(400)), True),
    "patternProperties": {f"^{letter}": True for letter in "abcdefghijklmnopqrstuvwxyz"},
}
NESTED = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "bar"}}}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema({"type": "foo"}), "JSON schema cannot be used.*foo"),
        (lambda: Grammar.json_schema(NESTED), "bar"),
        (lambda: Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys.*"not"'),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "/nowhere"),
        (lambda: Grammar.json_schema({"$ref": "http://example.com/a"}), r"example\.com"),
        (lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), r"5\) is greater than .*3"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "("}), "unclosed group"),
        (lambda: Grammar.json_schema("true"), "is an object, not 'true'"),
        (lambda: Grammar.json_schema("[1]"), "is an object"),
        (lambda: Grammar.json_schema('{"type": '), "is no JSON: .* column"),
        (lambda: Grammar.json_schema(3), "object or its text, not int"),
        (lambda: Grammar.json_schema({"a": {1, 2}}), "schema is no JSON"),
        (lambda: Grammar.json_schema({"maximum": float("nan")}), "schema is no JSON"),
        (lambda: Grammar.json_schema({"$ref": "#"}), "JSON schema cannot be used: it allows no text"),
        (lambda: Grammar.json_schema(PATTERNS | {"properties": {"a": {}}}), r"'\^a\$', which matches no name"),
        (
            lambda: Grammar.json_schema({"items": PATTERNS | {"properties": {"a": {}}}}),
            r"'\^a\$', which matches no name",
        ),
        (lambda: Grammar.json_schema(MANY), "too many 'patternProperties'"),
        (lambda: Grammar.regex(r"[^\s\S]"), "regular expression cannot be used: it allows no text"),
        (lambda: Grammar.regex("("), "regular expression cannot be used.*unclosed group"),
        (lambda: Grammar.regex("a(?=b)"), "look-around"),
        (lambda: Grammar.regex(3), "a regular expression is text, not int"),
        (lambda: Grammar.regex("\ud800"), "not valid Unicode at character 0"),
        (lambda: Grammar.lark("start: a"), r"1\(8\): unknown name"),
        (lambda: Grammar.lark('start: "a" ('), r"1\(13\)"),
        (lambda: Grammar.lark(""), "Empty grammar"),
        (lambda: Grammar.lark("start: %json {nope}"), "%json at character 7"),
        (lambda: Grammar.lark("start: <nope>"), "unknown special token"),
        (lambda: Grammar("xml", "<a/>"), "unknown kind of grammar 'xml'"),
        (lambda: "[0-9]+", "format is '.*', expected a Grammar"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(engine, make, message):
    """Case 84 too: a schema is not found out to be impossible in the middle of a reply."""
    double, runtime = scripted(engine, [5])
    with pytest.raises(GrammarError, match=re.compile(message, re.DOTALL)):
        double.generate([picture(), "x"], format=make())
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_case_84_patterns_of_names_beside_declared_names(demo):
    """Every other combination of the two can be followed to its end."""
    schema = {**PATTERNS, "properties": {"b": {"minimum": 3}}, "required": ["b"], "additionalProperties": False}
    constraint = demo._constraints.compile(Grammar.json_schema(schema))
    assert constraint.matches('{"b": 3, "a": "x"}')
    assert constraint.matches('{"b": 3, "b2": 1}')
    assert not constraint.matches('{"b": 2}')
    assert not constraint.matches('{"b": 3, "c": 1}')


def test_without_the_package_the_extra_is_named(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    double, runtime = scripted(engine, [5])
    with pytest.raises(InputError, match=r"pip install 'siglance\[json\]'"):
        double.generate("x", format=Grammar.regex("a"))
    assert runtime.prefills == 0
    assert engine.generate("x", max_tokens=1).usage.forced_tokens == 0  # everything else works


def test_errors_leave_the_engine_usable(engine):
    with pytest.raises(GrammarError):
        engine.generate("x", format=Grammar.regex("("))
    assert engine.generate("x", format=Grammar.regex("ab")).text == "ab"


# -- grammars that cost too much: none hangs, none ends the process -------------------------------------------------


def chain(length: int, rule: str, last: str) -> str:
    return "\n".join(["start: a0", *(rule.format(index, index + 1) for index in range(length)), last.format(length)])


def schema_chain(length: int) -> str:
    defs = {f"d{index}": {"items": {"$ref": f"#/$defs/d{index + 1}"}} for index in range(length)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": defs | {f"d{length}": {}}}, separators=(",", ":"))


EXPENSIVE = {
    "rules in a chain": lambda: Grammar.lark(chain(5500, "a{}:a{}", 'a{}:"a"')),
    "terminals in a chain": lambda: Grammar.lark(chain(3500, 'A{}:A{} "b"', 'A{}:"a"').replace("a0", "A0", 1)),
    "references in a chain": lambda: Grammar.json_schema(schema_chain(1400)),
    "deep schema": lambda: Grammar.json_schema('{"items":' * 5000 + "{}" + "}" * 5000),
    "deep groups": lambda: Grammar.regex("(" * 20_000 + "a" + ")" * 20_000),
    "deep rule": lambda: Grammar.lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "remembering the past": lambda: Grammar.regex("(.*a.{30}|.*b.{31}|.*c.{29})*"),
    "nested repetition": lambda: Grammar.regex("((([a-z]{1,100}){1,100}){1,100})b"),
    "ambiguous": lambda: Grammar.lark("start: start start | start start start | /[a-z ]/ |"),
    "many properties": lambda: Grammar.json_schema({"properties": {f"p{index}": {} for index in range(2500)}}),
    "product of choices": lambda: Grammar.json_schema(
        {"allOf": [{"anyOf": [{"pattern": f".*{i}{j}.*"} for j in range(8)]} for i in range(8)]}
    ),
    "a large multiple": lambda: Grammar.json_schema({"type": "integer", "multipleOf": 4999999}),
    "multiples that meet": lambda: Grammar.json_schema(
        {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}
    ),
    "a multiple in a Lark grammar": lambda: Grammar.lark(
        'start: "a" %json {"type": "integer", "multiple\\u004ff": 4999999}'
    ),
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_expensive_grammars_end_soon_in_a_reply_or_a_typed_error(name):
    """Compiled, then 30 tokens along a random path: each step bounded, in a thread with a usual stack."""
    outcome: list[object] = []

    def walk() -> None:
        try:
            constraint = TOY_CONSTRAINTS.compile(EXPENSIVE[name]())
            generator = np.random.default_rng(1)
            for _ in range(30):
                choices = allowed(constraint) - {STOP} if not constraint.ended else set()
                if not choices:
                    break
                constraint.accept(int(generator.choice(sorted(choices))))
                constraint.forced()
            outcome.append(constraint.copy().complete)
        except GrammarError as error:
            outcome.append(error)

    begin = time.monotonic()
    thread = threading.Thread(target=walk)
    thread.start()
    thread.join(timeout=20)
    assert outcome, "still busy"
    assert time.monotonic() - begin < 20
    assert isinstance(outcome[0], bool | GrammarError)


@pytest.mark.parametrize(
    ("schema", "usable"),
    [
        ({"type": "integer", "multipleOf": 4999999}, False),
        ({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, False),
        ({"type": "number", "multipleOf": 1e300 + 1e290}, False),
        ({"type": "number", "multipleOf": 0.01}, True),
        ({"type": "integer", "multipleOf": 1_000_000}, True),
        ({"anyOf": [{"type": "integer", "multipleOf": 60}, {"type": "integer", "multipleOf": 7}]}, True),
        ({"properties": {"multipleOf": {"type": "string"}}}, True),
    ],
)
def test_multiples(schema, usable):
    if usable:
        assert not TOY_CONSTRAINTS.compile(Grammar.json_schema(schema)).ended
    else:
        with pytest.raises(GrammarError, match="multipleOf"):
            TOY_CONSTRAINTS.compile(Grammar.json_schema(schema))


@pytest.mark.parametrize(
    "bounds",
    [
        {"minimum": 10**30, "maximum": 10**30 + 5},
        {"exclusiveMinimum": 2**63, "maximum": 2**70},
        {"minimum": -(2**70), "maximum": -(2**63) - 1},
        {"minimum": -(10**30), "exclusiveMaximum": -(10**29)},
    ],
)
def test_a_bound_beyond_64_bits_is_refused_and_not_moved(demo, bounds):
    """Moved, it would let 9223372036854775807 pass for a number of at least 10**30."""
    for schema in ({"type": "integer", **bounds}, {"properties": {"n": {"type": "integer", **bounds}}}):
        with pytest.raises(GrammarError, match="64 bits"):
            demo._constraints.compile(Grammar.json_schema(schema))
    with pytest.raises(GrammarError, match="64 bits"):
        demo._constraints.compile(Grammar.lark("start: %json " + json.dumps({"type": "integer", **bounds})))


def test_a_grammar_that_becomes_too_expensive_on_the_way_is_a_typed_error(engine, letters):
    double, _ = scripted(engine, letters("{"))
    with pytest.raises(GrammarError, match=r"cannot go on after [01] tokens: .*items; max is 2000"):
        double.generate("go", format=EXPENSIVE["many properties"]())


@pytest.mark.parametrize("make", [Grammar.regex, Grammar.lark, Grammar.json_schema])
def test_grammars_over_the_size_limit(make):
    with pytest.raises(GrammarError, match=rf"has {MAX_GRAMMAR_BYTES + 1} bytes, the limit is {MAX_GRAMMAR_BYTES}"):
        make("é" * (MAX_GRAMMAR_BYTES // 2) + "a")


def test_the_stack_of_other_threads_is_as_it_was():
    before = threading.stack_size()
    TOY_CONSTRAINTS.compile(Grammar.regex("a"))
    assert threading.stack_size() == before


def test_engines_are_used_by_several_threads_at_once(engine):
    """The first grammars of an engine race to read its vocabulary; later ones share it."""
    constraints = Constraints(engine._tokenizer, engine.runtime.vocabulary, engine.manifest.stop_ids, "none")
    found: list[str] = []

    def run(index: int) -> None:
        constraint = constraints.compile(Grammar.regex(f"answer {index}"))
        found.append(engine._tokenizer.decode(constraint.forced()))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"answer {index}" for index in range(8)]


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def siglance(monkeypatch, capsys):
    """`siglance(*arguments)` -> (exit code, stdout, stderr), in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["siglance", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_the_options_of_the_command_line(siglance, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(COLOUR))
    (tmp_path / "digits.lark").write_text("start: /[0-9]{4}/")
    code, out, _ = siglance("run", "-p", "x", "--schema", tmp_path / "schema.json")
    assert (code, set(json.loads(out))) == (0, {"colour", "count"})
    code, out, _ = siglance("run", "-p", "x", "--grammar", tmp_path / "digits.lark")
    assert (code, len(out.strip()), out.strip().isdecimal()) == (0, 4, True)
    code, out, _ = siglance("run", "-p", "x", "--regex", "(yes|no)!", "--json")
    assert json.loads(out)["text"] in ("yes!", "no!")
    assert json.loads(out)["usage"]["forced_tokens"] > 0
    code, out, _ = siglance("run", "-p", "detect all", "--detections")
    assert isinstance(json.loads(out), list)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regex", "a", "--detections"], "--regex and --detections exclude each other"),
        (["--schema", "nowhere.json"], "--schema nowhere.json: "),
        (["--grammar", "bytes"], "--grammar bytes: .*utf-8"),
        (["--schema", "large"], "limit is 65536"),
        (["--regex", "("], "unclosed group"),
        (["--logit-bias", "5"], "expected a token id"),
        (["--logit-bias", "5=nan"], "logit_bias of token 5 is nan"),
        (["--candidates", "0"], "candidates is 0, expected an integer between 1 and 128"),
        (["--logprobs", "21"], "logprobs is 21, expected an integer between 0 and 20"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0, expected a number between 0.01 and 100"),
    ],
)
def test_options_that_cannot_be_used(siglance, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_text("x" * 100_000)
    code, out, err = siglance("run", "-p", "x", *arguments)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


def test_candidates_and_log_probabilities_on_the_command_line(siglance):
    options = ("-p", "describe", "--candidates", 2, "--seed", 5, "--max-tokens", 3, "--logprobs", 1)
    code, out, err = siglance("run", *options)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("---")] == ["--- 1", "--- 2"]
    assert sum(line.startswith(("1: ", "2: ")) for line in err.splitlines()) == 6
    code, out, err = siglance("run", *options, "--json", "--presence-penalty", 1, "--logit-bias", "5=-1.5")
    facts = json.loads(out)
    assert len(facts["candidates"]) == 2
    assert len(facts["logprobs"]) == len(facts["token_ids"]) == 3
    assert (facts["sampling"]["presence_penalty"], facts["sampling"]["logit_bias"]) == (1.0, {"5": -1.5})


def test_llguidance_is_quiet(capfd):
    """Its warnings would be lines on stderr that nobody asked for."""
    with pytest.raises(GrammarError):
        TOY_CONSTRAINTS.compile(Grammar.regex("[0-9]+")).accept(5)
    assert capfd.readouterr().err == ""
    assert LLMatcher.grammar_from_regex("a")
