"""Thoughts and answers: told apart by ids, streamed apart, and never mistaken for one another."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siglance.engine import Engine, Grammar, Sampling, Text, Thought, Tool, Turn
from siglance.engine.errors import BundleError, InputError, PromptError
from siglance.engine.manifest import ReplyFacts
from siglance.engine.preprocessing import PromptOptions
from siglance.engine.reply import StageClock
from siglance.engine.text import TextStream, load_tokenizer, special_ids
from siglance.engine.thinking import Markers, ReplyParts, control_tokens
from siglance.engine.tool_format import QUOTE, CallError, parse_call

from .scripted import scripted, with_manifest
from .test_text import BYTES, ids_of
from .test_text import TOKENIZER as TOY
from .tool_template import speller, thinking_bundle

GREEDY = Sampling(temperature=0, seed=0)
FACTS = ReplyFacts(boxes="none", thought=("<|channel>", "<channel|>"), tool_call=("<|tool_call>", "<tool_call|>"))
MARKERS = Markers.read(TOY, FACTS)
HIDDEN = special_ids(TOY)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny model whose chat template knows tools and thinking."""
    with Engine.open(thinking_bundle(tmp_path_factory.mktemp("thinking")), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def spell(engine):
    """spell(text): ids of a text with the markers in it."""
    return speller(engine)


# -- the law ---------------------------------------------------------------------------------------------------------


def definition(ids: list[int], stop: tuple[str, ...], begun: list[int] | None) -> tuple[str, str, list, int, str]:
    """Text, thought, calls, number of malformed calls and where the reply ends: in one go over all ids."""
    stream, thoughts, calls, malformed, where = TextStream(TOY, stop, HIDDEN), [], [], 0, "answer"
    text, current = "", list(begun or [])
    where = "answer" if begun is None else "thought"

    def thought(ended: bool) -> None:
        whole = TextStream(TOY, (), HIDDEN)
        spelled = "".join(map(whole.push, current)) + whole.finish()
        if begun is not None and not thoughts:
            before = TextStream(TOY, (), HIDDEN)
            given = "".join(map(before.push, begun))
            spelled = spelled[len(given) :] if given.startswith("thought\n") else spelled
        label = spelled.startswith("thought\n") or (spelled == "thought" if ended else "thought\n".startswith(spelled))
        thoughts.append(
            (spelled.removeprefix("thought\n") if label and "\n" in spelled else "" if label else spelled).strip()
        )

    def call(reason: str | None) -> str:
        nonlocal malformed
        segments: list[list[int]] = [[]]
        for id in current:
            segments = [*segments, []] if id == MARKERS.quote else [*segments[:-1], [*segments[-1], id]]
        spoiled = any(id in HIDDEN for segment in segments for id in segment)
        texts = [
            TOY.decode([id for id in segment if id not in HIDDEN], skip_special_tokens=False) for segment in segments
        ]
        try:
            if reason or spoiled:
                raise CallError
            calls.append(parse_call(texts))
        except CallError:
            malformed += 1
            return stream.insert('"'.join(texts))
        return ""

    for id in ids:
        if where == "call":
            if id in (MARKERS.call, MARKERS.call_end):
                text += call("cut" if id == MARKERS.call else None)
                where, current = ("call" if id == MARKERS.call else "answer"), []
            else:
                current.append(id)
        elif id in (MARKERS.call, MARKERS.thought) or (id == MARKERS.thought_end and where == "thought"):
            if where == "thought":
                thought(ended=True)
            where, current = {MARKERS.call: "call", MARKERS.thought: "thought"}.get(id, "answer"), []
        elif where == "thought":
            current.append(id)
        else:
            text += stream.push(id)
        if stream.stopped:
            return text, join(thoughts), calls, malformed, "answer"
    if where == "thought":
        thought(ended=False)
    if where == "call":
        text += call("cut")
    return text + stream.finish(), join(thoughts), calls, malformed, where


def join(thoughts: list[str]) -> str:
    return "\n\n".join(filter(None, thoughts))


PIECES = st.one_of(
    st.sampled_from(["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", QUOTE, "<mask>"]),
    st.sampled_from(
        ["thought", "thought\n", "th", "\n", " ", "hello", "a", "b", "call:f{}", "call:f{a:", "}", "1", " world"]
    ),
    BYTES,
)
STOPS = st.lists(st.sampled_from(["ab", "b", "o w", "f{", "\n\n", "hello"]), max_size=2).map(tuple)


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=16), STOPS)
@example(["<|channel>", "thought", "<channel|>", "a"], ())
@example(["<|channel>", "th", "<channel|>", "a"], ())
@example(["<|channel>", "a", "<|tool_call>", "call:f{}", "<tool_call|>", "b"], ())
@example(["a", "<|tool_call>", "call:f{}", "<tool_call|>", "b"], ("ab",))
@example(["<|tool_call>", "call:f{a:", QUOTE, "}", QUOTE, "}", "<tool_call|>"], ("}",))
@example(["<|tool_call>", "hello", "<|tool_call>"], ("hello",))
def test_law_the_parts_are_those_of_the_definition(pieces, stop):
    """Whatever is pushed, in whatever pieces it comes out."""
    ids = ids_of(*pieces)
    parts = ReplyParts(TOY, MARKERS, stop, HIDDEN)
    found = []
    for id in ids:
        found.append(parts.push(id))
        if parts.stopped:
            break
    where = "thought" if parts.in_thought else "call" if parts.in_call else "answer"
    found.append(parts.finish())
    text, thought, calls = (
        "".join(piece.text for piece in found),
        "".join(piece.thought for piece in found),
        parts.calls,
    )
    assert (text, thought, calls, len(parts.malformed), where) == definition(ids, stop, None)
    assert list(itertools.chain.from_iterable(piece.calls for piece in found)) == calls


@pytest.mark.parametrize("begun", ["", "th", "thought", "thought\n", "thought\nI was"])
@pytest.mark.parametrize(
    "pieces", [["thought\n", "hello"], ["\n", "hello", "\n", "<channel|>", "a"], ["<channel|>", "a"]]
)
def test_a_thought_that_the_prompt_has_begun(begun, pieces):
    """What the prompt holds of it is not part of the reply."""
    parts = ReplyParts(TOY, MARKERS, (), HIDDEN, ids_of(begun) if begun else [])
    found = [*map(parts.push, ids_of(*pieces)), parts.finish()]
    thought = "".join(piece.thought for piece in found)
    if begun.startswith("thought\n"):
        assert thought == {"thought\n": "thought\nhello", "\n": "hello", "<channel|>": ""}[pieces[0]]
    assert "".join(piece.text for piece in found) == ("a" if "a" in pieces else "")
    assert parts.thought_tokens == len(ids_of(*pieces)) - ("a" in pieces)


def test_an_open_thought_is_found_in_the_prompt():
    turn_end = TOY.token_to_id("<turn|>")

    def found(*pieces: str) -> list[int] | None:
        return MARKERS.open_thought(np.array(ids_of(*pieces), np.int64), {turn_end})

    assert found("hello") is None
    assert found() is None
    assert found("<|channel>", "thought\n") == ids_of("thought\n")
    assert found("<|channel>", "thought\n", "<channel|>") is None
    assert found("<|channel>", "a", "<turn|>", "b") is None
    assert found("<|channel>", "a", "<channel|>", "<|channel>") == []
    assert Markers().open_thought(np.array([0, 1]), {1}) is None


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_markers_are_control_tokens_whatever_the_file_says(tmp_path):
    """Converters call some of them user-defined, so that text shows them."""
    facts = json.loads(TOY.to_str())
    for token in facts["added_tokens"]:
        if token["content"] in ("<|channel>", QUOTE):
            token |= {"special": False, "normalized": True}
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] != "<tool_call|>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    plain, loaded = load_tokenizer(path), load_tokenizer(path, (), control_tokens(FACTS))
    names = {"<|channel>", QUOTE, "<tool_call|>"}
    assert not {TOY.token_to_id(name) for name in names} & special_ids(plain)
    assert special_ids(loaded) == HIDDEN
    loaded.encode_special_tokens = True
    assert not special_ids(loaded) & set(loaded.encode("<|channel> <tool_call|>" + QUOTE, add_special_tokens=False).ids)


def test_a_marker_that_the_tokenizer_lacks_is_an_error(engine):
    with pytest.raises(BundleError, match="'<thinking>', which the tokenizer does not have"):
        with_manifest(engine, reply=ReplyFacts(boxes="none", thought=("<thinking>", "<channel|>"), tool_call=None))


def test_export_carries_what_is_needed(engine):
    manifest = engine.manifest
    assert (manifest.reply.thought, manifest.reply.tool_call) == (FACTS.thought, FACTS.tool_call)
    assert engine._tokenizer.token_to_id("<|tool_response>") in manifest.stop_ids
    assert {engine._tokenizer.token_to_id(name) for name in control_tokens(FACTS)} <= special_ids(engine._tokenizer)


# -- replies ---------------------------------------------------------------------------------------------------------


def test_thought_and_answer_are_apart(engine, spell):
    ids = spell("<|channel>thought\nhello world,\n\nI see.\n<channel|>The cat.")
    double, _ = scripted(engine, [*ids, *spell("<turn|>")])
    *chunks, last = double.stream("what is this?", thinking=True, sampling=GREEDY)
    reply = last.reply
    assert (reply.thought, reply.text, reply.finish_reason) == ("hello world,\n\nI see.", "The cat.", "stop_id")
    assert (reply.thought_finished, reply.truncated, reply.tool_calls) == (True, False, ())
    assert "".join(chunk.thought for chunk in [*chunks, last]) == reply.thought
    assert "".join(chunk.text for chunk in [*chunks, last]) == reply.text
    assert all(not (chunk.text and chunk.thought) for chunk in chunks)
    assert tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in [*chunks, last])) == tuple(ids)
    assert reply.usage.thought_tokens == len(spell("<|channel>thought\nhello world,\n\nI see.\n<channel|>"))
    assert reply.usage.completion_tokens == len(ids)


@pytest.mark.parametrize(
    ("spelled", "thought", "text"),
    [
        ("<|channel>thought\n<channel|>yes", "", "yes"),
        ("<|channel>thought<channel|>yes", "", "yes"),
        ("<|channel><channel|>yes", "", "yes"),
        ("<|channel>no label<channel|>yes", "no label", "yes"),
        ("<|channel>thoughtful<channel|>yes", "thoughtful", "yes"),
        ("<|channel>thought\n  a\n\n b \n\n<channel|>\n yes", "a\n\n b", "\n yes"),
        ("<|channel>thought\na<channel|>y<|channel>thought\nb<channel|>es", "a\n\nb", "yes"),
        ("<|channel>thought\na<|channel>thought\nb<channel|>yes", "a\n\nb", "yes"),
        ("y<channel|>es<tool_call|>", "", "yes"),
        ("it is spelled < |channel> and <channel |>", "", "it is spelled < |channel> and <channel |>"),
    ],
)
def test_shapes_of_thoughts(engine, spell, spelled, thought, text):
    reply = scripted(engine, spell(f"{spelled}<turn|>"))[0].generate("go", thinking=True, sampling=GREEDY)
    assert (reply.thought, reply.text) == (thought, text)
    assert "<" not in reply.thought
    assert reply.thought_finished


def test_tags_spelled_in_letters_are_text(engine):
    """A model that writes about its markers does not use them."""
    spelled = "<|channel>thought\nno<channel|> <|tool_call>call:f{}<tool_call|>"
    ids = engine._tokenizer.encode(spelled, add_special_tokens=False).ids  # an engine's tokenizer spells everything out
    reply = scripted(engine, [*ids, engine.manifest.stop_ids[0]])[0].generate("go", sampling=GREEDY)
    assert (reply.text, reply.thought, reply.tool_calls) == (spelled, "", ())


@pytest.mark.parametrize("ending", ["length", "context", "stop_id"])
def test_an_unfinished_thought_is_no_empty_success(engine, spell, ending):
    """Cut by the token limit, the context, or a model that ends its turn too early: the reply says so."""
    ids = spell("<|channel>thought\nhello world")
    double, _ = scripted(engine, [*ids, *(spell("<turn|>") if ending == "stop_id" else spell(" a") * 2000)])
    prompt = double.count_tokens("go", thinking=True)["total"]
    if ending == "context":
        double = scripted(with_manifest(engine, context=prompt + len(ids)), double.runtime.script)[0]
    limit = len(ids) if ending == "length" else 1000
    reply = double.generate("go", thinking=True, max_tokens=limit, sampling=GREEDY)
    assert (reply.text, reply.finish_reason) == ("", ending)
    assert (reply.thought_finished, reply.truncated) == (False, True)
    assert reply.thought.startswith("hello world")
    assert reply.usage.thought_tokens == reply.usage.completion_tokens


@pytest.mark.parametrize("cut", range(1, 5))
def test_an_unfinished_label_is_no_thought(engine, spell, cut):
    ids = [*spell("<|channel>"), *(spell(letter)[-1] for letter in "thou")][: 1 + cut]
    reply = scripted(engine, ids)[0].generate("go", thinking=True, max_tokens=len(ids), sampling=GREEDY)
    assert (reply.thought, reply.text, reply.thought_finished) == ("", "", False)


@pytest.mark.parametrize("stop", ["o w", "\n", "t", "w"])
def test_stops_are_for_the_answer(engine, spell, stop):
    ids = spell("<|channel>thought\nhello world\n<channel|>")
    answer = spell("a hello world\n then")
    reply = scripted(engine, [*ids, *answer])[0].generate("go", thinking=True, stop=stop, sampling=GREEDY)
    assert reply.thought == "hello world"
    assert reply.text == "a hello world\n then".split(stop)[0]
    assert reply.finish_reason == "stop_text"


def test_stop_ids_of_a_request_are_for_the_answer(engine, spell):
    ids = spell("<|channel>thought\nhello\n<channel|>a hello b<turn|>")
    [hello] = spell("hello")
    reply = scripted(engine, ids)[0].generate("go", thinking=True, stop_ids=[hello], sampling=GREEDY)
    assert (reply.thought, reply.text, reply.finish_reason) == ("hello", "a ", "stop_id")


def test_each_candidate_thinks_for_itself(engine, spell):
    ids = spell("<|channel>thought\nhello<channel|>a<turn|>")
    chunks = list(scripted(engine, ids)[0].stream("go", thinking=True, candidates=2, sampling=GREEDY))
    for index, candidate in enumerate(chunks[-1].reply.candidates):
        assert (candidate.thought, candidate.text) == ("hello", "a")
        assert "".join(chunk.thought for chunk in chunks if chunk.candidate == index) == "hello"
    assert chunks[-1].reply.usage.thought_tokens == 2 * len(spell("<|channel>thought\nhello<channel|>"))


# -- grammars --------------------------------------------------------------------------------------------------------

FORM = Grammar.regex("(red|blue) cat")


def bits_for(engine, allowed: dict[int, float]) -> np.ndarray:
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    for id, value in allowed.items():
        row[id] = value
    return row


def test_a_grammar_is_for_the_answer(engine, spell):
    thought = spell("<|channel>thought\nhello world, no form here\n<channel|>")
    double, _ = scripted(engine, [*thought, *spell("blue cat"), *spell("<turn|>")])
    reply = double.generate("go", thinking=True, format=FORM, sampling=GREEDY)
    assert (reply.thought, reply.text, reply.truncated) == ("hello world, no form here", "blue cat", False)
    assert reply.token_ids[: len(thought)] == tuple(thought)
    assert reply.usage.forced_tokens > 0
    assert reply.finish_reason == "stop_id"


def test_a_model_that_does_not_think_answers_in_form(engine, spell):
    reply = scripted(engine, spell("red and what not"))[0].generate("go", thinking=True, format=FORM, sampling=GREEDY)
    assert (reply.thought, reply.text) == ("", "red cat")


def test_without_thinking_a_grammar_lets_no_thought_begin(engine, spell):
    """Nor a second one after the answer has begun."""
    both = bits_for(engine, {spell("<|channel>")[0]: 100.0, spell("red")[-1]: 50.0, spell("r")[-1]: 50.0})
    double, _ = scripted(engine, spell("red cat<turn|>"), rows={0: both})
    assert double.generate("go", format=FORM, sampling=GREEDY).text == "red cat"
    ids = spell("<|channel>thought\nx<channel|><|channel>")
    reply = scripted(engine, ids)[0].generate("go", thinking=True, format=FORM, sampling=GREEDY, max_tokens=30)
    assert reply.thought == "x"
    assert re.fullmatch(FORM.source, reply.text)


def test_a_form_that_is_never_reached_is_truncated(engine, spell):
    ids = spell("<|channel>thought\nx<turn|>")
    reply = scripted(engine, ids)[0].generate("go", thinking=True, format=FORM, sampling=GREEDY)
    assert (reply.text, reply.truncated, reply.thought_finished, reply.finish_reason) == ("", True, False, "stop_id")


def test_a_thought_before_a_form_calls_no_tool(engine, spell):
    ids = spell("<|channel>thought\nx")
    wish = bits_for(engine, {spell("<|tool_call>")[0]: 100.0, spell("<channel|>")[0]: 50.0})
    double, _ = scripted(engine, [*ids, *spell("<channel|>red cat<turn|>")], rows={len(ids): wish})
    reply = double.generate("go", thinking=True, format=FORM, sampling=GREEDY)
    assert (reply.text, reply.tool_calls, reply.malformed_calls) == ("red cat", (), ())


def test_a_form_and_calls_that_must_come_exclude_each_other(engine):
    with pytest.raises(InputError, match="format and tool_choice 'required' exclude each other"):
        engine.generate("go", tools=[Tool("f")], tool_choice="required", format=FORM)


# -- prompts ---------------------------------------------------------------------------------------------------------


def prompt_of(engine, conversation, *, system=None, **options) -> str:
    """The prompt of a conversation without media."""
    turns = engine._preprocessor.read(conversation, StageClock(), system)
    return engine._preprocessor.prompt(turns, PromptOptions(**options))[1].text


def test_thinking_is_switched_by_the_template(engine):
    assert prompt_of(engine, "hi") == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
    assert prompt_of(engine, "hi", thinking=True) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
    )
    assert prompt_of(engine, "hi", thinking=True, system="Be brief.") == (
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
    )
    counts = [engine.count_tokens("hi", thinking=thinking)["total"] for thinking in (False, True)]
    assert counts[0] < counts[1]


def test_large_models_get_an_empty_thought_when_thinking_is_off(engine, spell):
    """It is over before the reply begins."""
    double, _ = scripted(engine, spell("yes<turn|>"))
    large = "<|turn>model\n<|channel>thought\n<channel|>"
    reply = double.generate([], prompt_ids=spell(f"<bos><|turn>user\nhi<turn|>\n{large}"), sampling=GREEDY)
    assert (reply.thought, reply.text, reply.usage.thought_tokens) == ("", "yes", 0)


def test_a_prompt_may_end_inside_of_a_thought(engine, spell):
    double, _ = scripted(engine, spell("hello\n<channel|>yes<turn|>"))
    reply = double.generate([], prompt_ids=spell("<bos>x<|channel>thought\n"), sampling=GREEDY, stop="hello")
    assert (reply.thought, reply.text) == ("hello", "yes")
    reply = double.generate([], prompt_ids=spell("<bos>x<|channel>thought\n"), sampling=GREEDY, max_tokens=1)
    assert (reply.thought, reply.text, reply.thought_finished) == ("hello", "", False)
    form = double.generate(
        [], prompt_ids=spell("<bos>x<|channel>thought\n"), format=FORM, sampling=GREEDY, max_tokens=30
    )
    assert form.thought == "hello"
    assert re.fullmatch(FORM.source, form.text)


def test_history_keeps_no_thoughts(engine, spell):
    """Neither the chat's own, nor one that a caller puts into a turn that is over, nor one spelled in a text."""
    double, runtime = scripted(engine, spell("<|channel>thought\nhello<channel|>a<turn|>"))
    chat = double.chat(thinking=True, sampling=GREEDY)
    assert chat.send("one").thought == "hello"
    assert chat.history == (Turn("user", [Text("one")]), Turn("assistant", [Text("a")]))
    chat.send("two")
    text = double._tokenizer.decode(runtime.ids, skip_special_tokens=False)
    assert "hello" not in text
    assert text.count("<|channel>") == 0
    assert text.endswith("<|turn>user\none<turn|>\n<|turn>model\na<turn|>\n<|turn>user\ntwo<turn|>\n<|turn>model\n")
    turns = [Turn("user", "one"), Turn("assistant", [Thought("hello"), Text("a")]), Turn("user", "two")]
    assert "hello" not in prompt_of(engine, turns, thinking=True)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_bundles_without_thinking_say_so(tiny_model, engine):
    with Engine.open("demo") as demo:
        with pytest.raises(PromptError, match="thinking: the chat template of this bundle does not know it"):
            demo.generate("describe", thinking=True)
        with pytest.raises(PromptError, match="thinking: the chat template"):
            demo.chat(thinking=True).send("describe")
        with pytest.raises(PromptError, match="thinking: the chat template"):
            demo.count_tokens("describe", thinking=True)
    for family, message in (
        ("gemma3", "thinking: the model of this bundle does not mark its thoughts"),
        ("paligemma", "thinking: this bundle has no chat template"),
    ):
        with Engine(tiny_model(family).bundle, threads=1) as other, pytest.raises(PromptError, match=message):
            other.generate("hi", thinking=True)
    files = {name: fact for name, fact in engine.manifest.files.items() if name != "chat_template"}
    with (
        with_manifest(engine, files=files) as base,
        pytest.raises(PromptError, match="thinking: the prompt is not written"),
    ):
        base.generate("hi", thinking=True)
    for options in ({"raw": True}, {"prompt_ids": [2, 5]}):
        with pytest.raises(PromptError, match="thinking: the prompt is not written by a chat template"):
            engine.generate([] if "prompt_ids" in options else "hi", thinking=True, **options)
