"""A request from the first token to the last: text, stops, limits, failures, determinism.

What goes into a request is in test_engine_inputs.py. Case numbers are public bug reports of other engines.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage
from tokenizers import Tokenizer

from siglance.engine import Engine, Sampling, SiglanceError, Text, ToolCall, ToolResult, Turn
from siglance.engine.errors import ContextFull, InputError, PromptError, SamplingError
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from .scripted import picture, scripted, with_manifest
from .test_text import unfinished

GREEDY = Sampling(temperature=0, seed=0)
SMALL = {"image_tokens": 70, "max_tokens": 6}


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text and pictures."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reader(tiny_model):
    """A tiny model with text only."""
    with Engine(tiny_model("gemma3").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(engine):
    """The tokenizer of `engine`, which parses control tokens."""
    return Tokenizer.from_file(str(engine.bundle.path("tokenizer")))


@pytest.fixture(scope="module")
def words(tokenizer):
    """`words(text)`: the ids of a text, and of control tokens spelled whole."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def letters(words):
    """`letters(text)`: one id per character, whatever merges the tokenizer has."""
    return lambda text: [words(character)[-1] for character in text]


# --- stream and reply


def one_shot(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The definition of a reply's text, and whether a stop string cut it.

    Decode once what is text, without an unfinished last character, and cut before the earliest stop string.
    """
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    visible = [id for id in ids if id not in special]
    first_byte, run = tokenizer.token_to_id("<0x00>"), b""
    for id in visible:
        run = run + bytes([id - first_byte]) if first_byte <= id < first_byte + 256 else b""
    text = tokenizer.decode(visible[: len(visible) - unfinished(run)], skip_special_tokens=False)
    cut = min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))
    return text[:cut], cut < len(text)


PIECES = st.one_of(
    st.sampled_from([*"aabbc", "hello", "o the", "\n\n", " red", "é", "🦝"]),
    st.sampled_from([b"\xe4\xbd", b"\xf0\x9f", b"\xff", b"\x80"]),
    st.sampled_from(["<|think|>", "<mask>", "<unused3>"]),
)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4) | st.sampled_from(["🦝", "lo th", "\ufffd", "\n"]), max_size=3)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=14), STOPS, st.integers(1, 20))
@example(["a", "b", "c"], ["abcx", "bc"], 3)  # the end decides between two stop strings
@example(["a", "b", "c"], ["abcx", "bc"], 9)
def test_law_reply_is_the_joined_stream_and_the_one_shot_definition(engine, tokenizer, words, pieces, stop, max_tokens):
    """Cases 28, 29 and 31: characters arrive whole, and nothing of a stop string gets out."""
    ids = []
    for piece in pieces:
        ids += words(piece) if isinstance(piece, str) else [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece]
    double, _ = scripted(engine, [*ids, engine.manifest.stop_ids[0]])
    *chunks, last = double.stream("go", stop=stop, max_tokens=max_tokens, sampling=GREEDY)
    reply = last.reply
    text, cut = one_shot(tokenizer, ids[:max_tokens], stop)
    assert "".join(chunk.text for chunk in [*chunks, last]) == reply.text == text
    assert all(chunk.text and chunk.reply is None for chunk in chunks)
    assert tuple(id for chunk in [*chunks, last] for id in chunk.token_ids) == reply.token_ids
    assert reply.token_ids == tuple(ids[: len(reply.token_ids) if cut else max_tokens])
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert reply.finish_reason == ("stop_text" if cut else "length" if len(ids) >= max_tokens else "stop_id")
    assert double.generate("go", stop=stop, max_tokens=max_tokens, sampling=GREEDY).text == text


@pytest.mark.parametrize("stop", [[], ["e"]])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_k=40, seed=11)])
def test_generate_is_the_joined_stream(engine, sampling, stop):
    request = {"image_tokens": 70, "max_tokens": 24, "sampling": sampling, "stop": stop, "cache": False}
    chunks = list(engine.stream([picture(), "what is this?"], **request))
    reply = engine.generate([picture(), "what is this?"], **request)
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [chunk.reply is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    streamed = chunks[-1].reply
    for name in ("text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "boxes", "sampling"):
        assert getattr(streamed, name) == getattr(reply, name), name
    assert tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks)) == reply.token_ids


def test_nothing_runs_before_the_first_next(engine, words, tmp_path):
    double, runtime = scripted(engine, words("hello"))
    file = tmp_path / "late.png"
    stream = double.stream([file, "hi"], image_tokens=70, max_tokens=1)
    PillowImage.fromarray(picture()).save(file)  # not even the file has been looked for
    assert (runtime.encodes, runtime.prefills) == (0, 0)
    next(stream)
    assert (runtime.encodes, runtime.prefills, runtime.steps) == (1, 1, 0)


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_closing_the_stream_stops_the_work(engine, letters, taken):
    double, runtime = scripted(engine, letters("abcdefgh"))
    stream = double.stream("go", max_tokens=100)
    assert [next(stream).text for _ in range(taken)] == list("abcdefgh")[:taken]
    stream.close()
    assert runtime.steps == taken - 1
    assert double.generate("go", max_tokens=3).text == "abc"


# --- how replies end


@pytest.mark.parametrize("index", range(3))
def test_stop_ids_end_a_reply_and_are_no_part_of_it(engine, letters, index):
    """Case 26: end of sequence, end of turn, and the start of a tool's answer."""
    stop_id = engine.manifest.stop_ids[index]
    double, runtime = scripted(engine, [*letters("Hi"), stop_id, *letters("X")])
    reply = double.generate("go")
    assert (reply.text, reply.finish_reason) == ("Hi", "stop_id")
    assert reply.token_ids == tuple(letters("Hi"))
    assert reply.usage.completion_tokens == 2
    assert runtime.steps == 2


def test_a_reply_may_be_empty(engine):
    double, _ = scripted(engine, [engine.manifest.stop_ids[0]])
    reply = double.generate("go")
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", (), "stop_id")
    assert reply.timings.per_token == 0


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "finish"),
    [
        (["\nUs", "er:", "x"], ["User:"], "\n", "stop_text"),
        (["bro", "wn fo", "x y"], ["own fox"], "br", "stop_text"),
        (["abc"], ["abcdefgh"], "abc", "stop_id"),
        (["stop!"], ["stop"], "", "stop_text"),
        (["a stop!", "b"], ["stop"], "a ", "stop_text"),
        (["abcd", "ef"], ["bcde", "bc"], "a", "stop_text"),
        (["abcd", "xf"], ["bcde", "cd"], "ab", "stop_text"),
        (["aab"], ["ab"], "a", "stop_text"),
        (["same"], [], "same", "stop_id"),
    ],
)
def test_stop_strings(engine, letters, pieces, stop, text, finish):
    """Case 31: the text ends just before the earliest match, however it falls into tokens."""
    script = [*letters("".join(pieces)), engine.manifest.stop_ids[0]]
    double, _ = scripted(engine, script)
    chunks = list(double.stream("go", stop=stop))
    reply = chunks[-1].reply
    assert (reply.text, reply.finish_reason) == (text, finish)
    assert "".join(chunk.text for chunk in chunks) == text
    for string in stop:
        assert string not in text
    assert double.generate("go", stop=stop).text == text


def test_a_stop_string_may_be_the_name_of_a_token_that_is_not_text(engine, letters):
    """People stop Gemma with "<|turn>", which no text of a reply ever has: what follows it would be another turn."""
    start = engine._tokenizer.token_to_id("<|turn>")
    assert start not in engine.manifest.stop_ids
    double, _ = scripted(engine, [*letters("ab"), start, *letters("user"), engine.manifest.stop_ids[0]])
    assert double.generate("go").text == "abuser"
    for stop in ("<|turn>", ["no", "<|turn>"]):
        reply = double.generate("go", stop=stop)
        assert (reply.text, reply.finish_reason) == ("ab", "stop_id")


@pytest.mark.parametrize(("ending", "finish"), [("stop", "stop_id"), ("limit", "length")])
def test_a_held_back_tail_is_delivered(engine, letters, ending, finish):
    """The beginning of a stop string waits for its end; when that never comes, the text arrives after all."""
    script = [*letters("the DEFG"), engine.manifest.stop_ids[0]]
    double, _ = scripted(engine, script)
    chunks = list(double.stream("go", stop=["DEFGHIJ"], max_tokens=8 if ending == "limit" else 100))
    assert "".join(chunk.text for chunk in chunks[:-1]) == "the "
    assert (chunks[-1].text, chunks[-1].reply.text) == ("DEFG", "the DEFG")
    assert chunks[-1].reply.finish_reason == finish


@pytest.mark.parametrize("text", ["🦝", "日本", "👩‍👩‍👧", "é", "שלום", "a🦝b"])
def test_characters_of_several_tokens(engine, words, text):
    """Case 28: byte tokens come out as whole characters, never as replacement characters."""
    script = [*words(text), engine.manifest.stop_ids[0]]
    double, _ = scripted(engine, script)
    chunks = list(double.stream("go"))
    assert "".join(chunk.text for chunk in chunks) == text
    assert all("\ufffd" not in chunk.text for chunk in chunks)


@pytest.mark.parametrize(("limit", "text"), [(1, ""), (3, ""), (4, "🦝"), (5, "🦝!")])
def test_a_limit_inside_a_character(engine, words, limit, text):
    """Case 29: the unfinished character is dropped, in the stream and in the reply, and the finish is the limit's."""
    double, _ = scripted(engine, [*words("🦝"), *words("!")])
    chunks = list(double.stream("go", max_tokens=limit))
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].reply.text == text
    assert chunks[-1].reply.finish_reason == "length"
    assert chunks[-1].reply.usage.completion_tokens == limit


def test_a_stop_string_right_after_half_a_character(engine, words, letters):
    double, _ = scripted(engine, [*words("🦝")[:2], *letters("END"), *letters("x")])
    chunks = list(double.stream("go", stop=["END"]))
    reply = chunks[-1].reply
    assert reply.finish_reason == "stop_text"
    assert "".join(chunk.text for chunk in chunks) == reply.text == "\ufffd\ufffd"


@pytest.mark.parametrize("count", [1, 5])
def test_length(engine, letters, count):
    double, runtime = scripted(engine, letters("abcdefgh"))
    reply = double.generate("go", max_tokens=count)
    assert (reply.text, reply.finish_reason) == ("abcdefgh"[:count], "length")
    assert runtime.steps == count - 1  # the last token needs no run after it


@pytest.mark.parametrize("value", [0, -1, 1.5, "10", True, None])
@pytest.mark.parametrize("name", ["max_tokens", "prefill_chunk"])
def test_counts_that_are_none(engine, letters, name, value):
    """Case 79."""
    double, runtime = scripted(engine, letters("a"))
    with pytest.raises(InputError, match=rf"{name} is {value!r}"):
        double.generate([picture(), "go"], **{"max_tokens": 2, name: value})
    assert (runtime.encodes, runtime.prefills) == (0, 0)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3], 3, None])
def test_stop_strings_that_are_none(engine, letters, stop):
    double, runtime = scripted(engine, letters("a"))
    with pytest.raises(PromptError, match="stop"):
        double.generate([picture(), "go"], stop=stop)
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_a_huge_limit_is_only_a_limit(engine, letters):
    double, _ = scripted(engine, [*letters("ab"), engine.manifest.stop_ids[0]])
    assert double.generate("go", max_tokens=10**9).text == "ab"


# --- the context


@pytest.fixture(scope="module")
def short(tiny_model, tmp_path_factory):
    """The tiny model with text only, exported for a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("short") / "bundle"
    export(tiny_model("gemma3").checkpoint, folder, ExportOptions(context=64))
    with Engine.open(folder, threads=1) as engine:
        yield engine


@pytest.mark.parametrize(("prompt", "expected"), [(62, 3), (63, 2), (64, 1)])
def test_a_reply_ends_where_the_context_ends(short, reader, prompt, expected):
    """Case 33: the last row of the context is used, and one token is drawn from it."""
    ids = [2, *range(100, 99 + prompt)]
    reply = short.generate([], prompt_ids=ids, sampling=GREEDY)
    assert (reply.finish_reason, len(reply.token_ids)) == ("context", expected)
    assert reply.prompt_token_ids == tuple(ids)
    assert reply.token_ids == reader.generate([], prompt_ids=ids, sampling=GREEDY, max_tokens=expected).token_ids


def test_the_token_limit_counts_before_the_context(short):
    reply = short.generate([], prompt_ids=[2, *range(100, 162)], sampling=GREEDY, max_tokens=2)
    assert (reply.usage.prompt_tokens, reply.finish_reason) == (63, "length")


@pytest.mark.parametrize("prompt", [65, 500])
@pytest.mark.parametrize("form", ["ids", "text"])
def test_a_prompt_over_the_context_is_refused_with_both_numbers(short, prompt, form):
    """Case 33: nothing is cut off."""
    conversation, ids = ([], [5] * prompt) if form == "ids" else ("!" * (prompt - 1), None)
    with pytest.raises(ContextFull, match=rf"{prompt} tokens.*holds 64") as error:
        short.generate(conversation, raw=True, prompt_ids=ids)
    assert (error.value.prompt_tokens, error.value.context) == (prompt, 64)


def test_a_prompt_over_the_context_can_be_counted(short):
    """Who has to shorten it wants to know by how much."""
    assert short.count_tokens("!" * 499, raw=True)["total"] == 500


def test_a_text_that_no_tokens_could_make_fit_is_not_tokenised(short, monkeypatch):
    """100 MB of text would take minutes and gigabytes only to be refused."""

    class NoEncode:
        def get_vocab(self):
            return short._tokenizer.get_vocab()

    monkeypatch.setattr(short._preprocessor, "_tokenizer", NoEncode())
    monkeypatch.setattr(short._preprocessor, "_prompts", None)
    longest = max(map(len, short._tokenizer.get_vocab()))
    characters = 1_000_000 + longest
    called = [
        Turn("assistant", ToolCall("f", {"x": ["a" * 500_000]})),
        Turn("tool", ToolResult("f", {"b": "c" * (500_000 + longest - 2)})),
    ]
    for ask, conversation in itertools.product(
        (short.generate, short.count_tokens), ([Text("a" * 1_000_000), Text("b" * longest)], called)
    ):
        with pytest.raises(ContextFull, match=r"at least \d+ tokens.*holds 64") as error:
            ask(conversation, raw=True)
        assert error.value.prompt_tokens == -(-characters // longest)


@pytest.mark.parametrize("at_least", [False, True])
def test_context_full_crosses_process_boundaries(at_least):
    error = pickle.loads(pickle.dumps(ContextFull(65, 64, at_least)))
    assert (str(error), error.prompt_tokens, error.context) == (str(ContextFull(65, 64, at_least)), 65, 64)


def test_an_image_is_never_cut(engine, words):
    """Case 33: the limit would fall inside the second image."""
    with with_manifest(engine, context=128) as narrow:
        double, runtime = scripted(narrow, words("hello"))
        with pytest.raises(ContextFull):
            double.generate([picture(), picture(1), "x"], image_tokens=70)
        assert (runtime.encodes, runtime.prefills) == (0, 0)
        assert double.generate([picture(), "x"], **SMALL).finish_reason == "length"


# --- sampling defaults


@pytest.mark.parametrize(
    ("requested", "effective"),
    [
        (None, (0.7, 5, 0.9, 0.0)),
        (Sampling(), (0.7, 5, 0.9, 0.0)),
        (Sampling(temperature=1.5), (1.5, 5, 0.9, 0.0)),
        (Sampling(temperature=0), (0.0, 5, 0.9, 0.0)),
        (Sampling(top_k=0, top_p=1.0, min_p=0.1), (0.7, 0, 1.0, 0.1)),
    ],
)
def test_the_request_goes_before_the_bundle_field_by_field(reader, requested, effective):
    """Case 63; what was used is reported."""
    facts = dataclasses.replace(reader.manifest.sampling, temperature=0.7, top_k=5, top_p=0.9, min_p=None)
    with with_manifest(reader, sampling=facts) as engine:
        used = engine.generate("x", sampling=requested, max_tokens=2).sampling
        assert (used.temperature, used.top_k, used.top_p, used.min_p) == effective
        greedy = [engine.generate("x", sampling=GREEDY, max_tokens=8).token_ids for _ in range(2)]
        assert greedy[0] == greedy[1]


def test_a_default_out_of_range_is_an_error_before_anything_runs(reader):
    facts = dataclasses.replace(reader.manifest.sampling, temperature=-1.0)
    with with_manifest(reader, sampling=facts) as engine:
        double, runtime = scripted(engine, [0])
        with pytest.raises(SamplingError, match="temperature"):
            double.generate("x")
        assert runtime.prefills == 0


# --- the engine as an object


def test_timings_add_up(engine):
    timings = engine.generate([picture(), "x"], cache=False, **SMALL).timings
    parts = timings.decode_file + timings.resize + timings.vision + timings.prefill
    assert 0 < parts <= timings.first_token <= timings.total
    stages = dataclasses.asdict(timings)
    assert stages.pop("audio") == 0  # nothing to hear
    assert all(value > 0 for value in stages.values())


def test_a_closed_engine_says_so(tiny_model):
    with Engine(tiny_model("gemma3").bundle) as engine:
        stream = engine.stream("hello", max_tokens=50)
        next(stream)
    uses = (lambda: next(stream), lambda: engine.generate("x"), lambda: engine.prompt_logits("x"), engine.verify)
    for use in uses:
        with pytest.raises(SiglanceError, match="closed"):
            use()


def test_opened_by_name_and_by_path(tiny_model, monkeypatch, tmp_path):
    folder = tiny_model("gemma3").bundle.folder
    monkeypatch.setenv("SIGLANCE_HOME", str(tmp_path))
    os.symlink(folder, tmp_path / "mine")
    texts = []
    for name in ("mine", folder, str(folder)):
        with Engine.open(name) as engine:
            texts.append(engine.generate("hello", sampling=GREEDY, max_tokens=5).text)
    assert len(set(texts)) == 1
