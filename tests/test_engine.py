"""The engine's face: what comes out of a request, when it ends, and what a request leaves behind - nothing."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image as PillowImage
from tokenizers import Tokenizer

from siglance.engine import Engine, Image, Sampling, SiglanceError, Text, Turn
from siglance.engine.bundle import Bundle
from siglance.engine.errors import ContextFull, ImageError, InputError, ModelOutputError, PromptError
from siglance.engine.self_test import formula_picture

from .scripted import scripted

GREEDY = Sampling(temperature=0)
SMALL = {"image_tokens": 70, "max_tokens": 6}


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text and pictures."""
    with Engine(tiny_model("gemma4").bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def reader(tiny_model):
    """A tiny model with text only."""
    with Engine(tiny_model("gemma3").bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def words(engine):
    """The ids of a text, and of control tokens spelled whole."""
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def text_of(engine):
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def letters(words):
    """`letters(text)`: one id per character, whatever merges the tokenizer has."""
    return lambda text: [words(character)[-1] for character in text]


def picture(index: int = 0, height: int = 60, width: int = 90) -> np.ndarray:
    return np.roll(formula_picture(height, width), 13 * index, axis=1) // (index + 1)


def with_manifest(engine: Engine, **changes: object) -> Engine:
    """The same bundle with other facts in its manifest."""
    bundle = engine.bundle
    return Engine(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, **changes)))


# --- stream and reply


@pytest.mark.parametrize("stop", [[], ["e"]])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_k=40, seed=11)])
def test_generate_is_the_joined_stream(engine, sampling, stop):
    request = {"image_tokens": 70, "max_tokens": 24, "sampling": sampling, "stop": stop}
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
    """Case 31: the text ends just before the earliest match, however it falls into tokens and pieces."""
    script = [*letters("".join(pieces)), engine.manifest.stop_ids[0]]
    double, _ = scripted(engine, script)
    chunks = list(double.stream("go", stop=stop))
    reply = chunks[-1].reply
    assert (reply.text, reply.finish_reason) == (text, finish)
    assert "".join(chunk.text for chunk in chunks) == text
    for string in stop:
        assert string not in text
    assert double.generate("go", stop=stop).text == text


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


def test_a_huge_limit_is_only_a_limit(engine, letters):
    double, _ = scripted(engine, [*letters("ab"), engine.manifest.stop_ids[0]])
    assert double.generate("go", max_tokens=10**9).text == "ab"


# --- the context


@pytest.fixture(scope="module")
def short(reader):
    """A model whose context holds 32 tokens."""
    with with_manifest(reader, context=32) as engine:
        yield engine


@pytest.mark.parametrize(("prompt", "expected"), [(30, 3), (31, 2), (32, 1)])
def test_a_reply_ends_where_the_context_ends(short, reader, prompt, expected):
    """Case 33: the last row of the context is used, and one token is drawn from it."""
    ids = [2, *range(100, 99 + prompt)]
    reply = short.generate([], prompt_ids=ids, sampling=GREEDY)
    assert (reply.finish_reason, len(reply.token_ids)) == ("context", expected)
    assert reply.token_ids == reader.generate([], prompt_ids=ids, sampling=GREEDY, max_tokens=expected).token_ids


def test_the_token_limit_counts_before_the_context(short):
    reply = short.generate([], prompt_ids=[2, *range(100, 130)], sampling=GREEDY, max_tokens=2)
    assert reply.finish_reason == "length"


@pytest.mark.parametrize("prompt", [33, 500])
def test_a_prompt_over_the_context_is_refused_with_both_numbers(short, prompt):
    """Case 33: nothing is cut off."""
    with pytest.raises(ContextFull, match=rf"{prompt} tokens.*holds 32") as error:
        short.generate([], prompt_ids=[5] * prompt)
    assert (error.value.prompt_tokens, error.value.context) == (prompt, 32)


def test_an_image_is_never_cut(engine, words):
    """Case 33: the limit would fall inside the second image."""
    with with_manifest(engine, context=128) as narrow:
        double, runtime = scripted(narrow, words("hello"))
        with pytest.raises(ContextFull):
            double.generate([picture(), picture(1), "x"], image_tokens=70)
        assert (runtime.encodes, runtime.prefills) == (0, 0)
        assert double.generate([picture(), "x"], **SMALL).finish_reason == "length"


# --- failures leave nothing behind


class Broken(Exception):
    pass


def failing(graph, monkeypatch, at: int) -> None:
    """The graph's run number `at` from here on fails, once."""
    calls = itertools.count()
    for name in ("run", "run_bound"):
        real = getattr(graph, name)

        def run(argument, real=real):
            if next(calls) == at:
                raise Broken
            return real(argument)

        monkeypatch.setattr(graph, name, run)


@pytest.fixture(scope="module")
def expected(engine):
    """What an untouched engine says."""
    return (
        engine.generate([picture(), "and this?"], sampling=GREEDY, **SMALL).token_ids,
        engine.prompt_logits([picture(), "and this?"], image_tokens=70),
    )


def check_untouched(engine, expected) -> None:
    reply = engine.generate([picture(), "and this?"], sampling=GREEDY, **SMALL)
    assert reply.token_ids == expected[0]
    np.testing.assert_array_equal(engine.prompt_logits([picture(), "and this?"], image_tokens=70), expected[1])


@pytest.mark.parametrize(
    ("graph", "at"), [("vision", 0), ("vision", 1), ("embed", 0), ("decoder", 0), ("decoder", 1), ("decoder", 4)]
)
def test_a_run_that_fails(tiny_model, expected, monkeypatch, graph, at):
    """Case 53: whichever graph fails at whichever run, the next answer is a fresh engine's."""
    with Engine(tiny_model("gemma4").bundle) as engine:
        failing(getattr(engine.runtime, graph), monkeypatch, at)
        with pytest.raises(Broken):
            engine.generate([picture(1), picture(2), "what?"], image_tokens=70, max_tokens=9)
        check_untouched(engine, expected)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_logits_that_are_not_finite(engine, expected, letters, at, value):
    """Cases 17 and 53: a typed error instead of padding for ever."""
    row = np.full(engine.runtime.vocabulary, value, np.float32)
    double, _ = scripted(engine, letters("abcdef"), rows={at: row})
    stream = double.stream("go")
    assert [next(stream).text for _ in range(at)] == list("ab")[:at]
    with pytest.raises(ModelOutputError, match="non-finite"):
        next(stream)
    check_untouched(engine, expected)


def test_equal_logits_are_legal(engine):
    double, _ = scripted(engine, [0], rows={0: np.zeros(engine.runtime.vocabulary, np.float32)})
    assert double.generate("go", max_tokens=1, sampling=GREEDY).token_ids == (0,)


@pytest.mark.parametrize(
    "conversation",
    [
        [b"not a picture", "what?"],
        [picture(), 7],
        [],
        [""],
        ["x" * 5000],
        [Turn("user", [picture(1), "a"]), Turn("assistant", "b"), Turn("user", [b"", "c"])],
        [Turn("user", "a"), Turn("nobody", "b")],
    ],
)
def test_requests_that_are_refused(engine, expected, conversation):
    with pytest.raises(InputError):
        engine.generate(conversation, image_tokens=70)
    check_untouched(engine, expected)


# --- determinism


REQUESTS = [
    (["what is this?"], Sampling(temperature=1.2, seed=1)),
    (["what is this?"], Sampling(temperature=1.2, seed=2)),
    (["hello"], Sampling(temperature=0.8, top_k=20, seed=3)),
    ([picture(), "what?"], GREEDY),
    ([picture(1), "what?"], Sampling(temperature=2, top_p=0.9, seed=4)),
]


@pytest.fixture(scope="module")
def alone(engine):
    """The text of every request, run alone."""
    return [engine.generate(parts, sampling=sampling, **SMALL).text for parts, sampling in REQUESTS]


def test_the_same_seed_gives_the_same_text_whatever_ran_between(engine, alone):
    assert alone[0] != alone[1]
    for index in (0, 4, 0, 2, 1, 0):
        parts, sampling = REQUESTS[index]
        assert engine.generate(parts, sampling=sampling, **SMALL).text == alone[index]


def test_without_a_seed_one_is_drawn_and_reported(engine):
    first = engine.generate("hello", sampling=Sampling(temperature=1.5), max_tokens=12)
    again = engine.generate(
        "hello", sampling=Sampling(temperature=1.5, seed=first.sampling.seed), max_tokens=12
    )
    assert again.token_ids == first.token_ids


def test_streams_that_take_turns(engine, alone):
    streams = [engine.stream(parts, sampling=sampling, **SMALL) for parts, sampling in REQUESTS]
    texts = [""] * len(streams)
    for round_of_chunks in itertools.zip_longest(*streams):
        for index, chunk in enumerate(round_of_chunks):
            texts[index] += chunk.text if chunk else ""
    assert texts == alone


def test_threads_get_their_own_answers(engine, alone):
    def ask(index: int) -> bool:
        parts, sampling = REQUESTS[index % len(REQUESTS)]
        return engine.generate(parts, sampling=sampling, **SMALL).text == alone[index % len(REQUESTS)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(32)))


# --- pictures


def encoded(image: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(image).save(file, format)
    return file.getvalue()


def test_every_form_of_a_picture_is_the_same_picture(engine, tmp_path):
    image = picture()
    data = encoded(image)
    path = tmp_path / "a b ü.png"
    path.write_bytes(data)
    forms = [
        *(image, data, bytearray(data), memoryview(data), path, str(path), PillowImage.fromarray(image)),
        *(io.BytesIO(data), "data:image/png;base64," + base64.b64encode(data).decode(), Image(path), Image(data, 70)),
    ]
    seen = engine.encode(image, image_tokens=70)
    for form in forms:
        found = engine.encode(form, image_tokens=70)
        np.testing.assert_array_equal(found.soft_tokens, seen.soft_tokens)
        assert found.size == (60, 90)


@pytest.mark.parametrize(
    ("part", "is_picture"),
    [
        ("missing.png", True),
        ("My Photo.JPEG", True),
        ("data:image/png;base64,AAAA", True),
        ("what is in the photo?", False),
        ("notes.txt", False),
        ("two lines\nphoto.png", False),
        (Text("missing.png"), False),
        (Text("data:image/png;base64,AAAA"), False),
    ],
)
def test_a_plain_string_is_text_unless_it_names_a_picture(engine, part, is_picture):
    if is_picture:
        with pytest.raises(ImageError, match="image 1"):
            engine.count_tokens(part)
    else:
        assert engine.count_tokens(part)["image"] == 0


@pytest.mark.parametrize("part", [None, 7, 1.5, {"text": "x"}, object(), ["nested"]])
def test_other_parts_are_refused_with_index_and_type(engine, part):
    with pytest.raises(PromptError, match=rf"part 1 is of type {type(part).__name__}"):
        engine.count_tokens(["x", part])


def test_an_error_about_a_picture_names_it_and_shows_no_data(engine, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match=r"image 2 \(page\.jpg\)"):
        engine.generate([picture(), tmp_path / "page.jpg", "x"])
    payload = base64.b64encode(b"secret text").decode()
    with pytest.raises(ImageError) as error:
        engine.generate([f"data:image/png;base64,{payload}", "x"])
    assert "image 1" in str(error.value)
    assert payload not in str(error.value)


def test_encode_once_and_ask_twice(engine):
    seen = engine.encode(picture(), image_tokens=70)
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    for question in ("what?", "and where?"):
        image_each_time = engine.generate([picture(), question], sampling=GREEDY, **SMALL)
        reused = engine.generate([seen, question], sampling=GREEDY, max_tokens=6)
        assert reused.token_ids == image_each_time.token_ids
        assert reused.prompt_token_ids == image_each_time.prompt_token_ids
        assert reused.usage == image_each_time.usage
        double.generate([seen, question])
    assert runtime.encodes == 0


def test_an_encoded_picture_of_another_bundle_is_refused(tiny_model, engine):
    with Engine(tiny_model("gemma4", key_style="hub", dead_shared_kv=True, seed=3).bundle) as other:
        seen = other.encode(picture(), image_tokens=70)
    with pytest.raises(InputError, match="image 2 was encoded by another bundle"):
        engine.generate([picture(), seen, "what?"])


def test_encode_takes_a_picture(engine):
    with pytest.raises(InputError, match="not text"):
        engine.encode(Text("photo"))


@pytest.mark.parametrize("budget", [0, 71, -70, 10**6, 70.0, "70", True])
def test_a_budget_that_is_none_is_refused_with_the_ones_there_are(engine, budget):
    with pytest.raises(ImageError, match="image 1.*70, 140, 280, 560, 1120"):
        engine.count_tokens([Image(picture(), budget), "x"])
    with pytest.raises(ImageError, match="image.*70, 140, 280, 560, 1120"):
        engine.encode(picture(), image_tokens=budget)


def test_counts_are_known_before_anything_runs(engine, reader):
    """Count, usage and ids agree for every mixture of budgets; counting runs no graph."""
    class NoRuntime:
        def __getattr__(self, name):
            raise AssertionError(f"{name} of the runtime was used")

    counting = scripted(engine, [0])[0]
    counting._runtime = NoRuntime()
    for parts, budget in (
        (["hi"], None),
        ([picture(), "hi"], 70),
        ([Image(picture(), 140), "and", Image(picture(1, 40, 200), 70)], None),
        ([Image(picture(), 140), "and", picture(1, 200, 40)], 70),
    ):
        counts = counting.count_tokens(parts, image_tokens=budget)
        reply = engine.generate(parts, image_tokens=budget, max_tokens=1)
        soft = engine.manifest.prompt.image.soft
        images = sum(
            len(engine.encode(part, image_tokens=budget)) for part in parts if not isinstance(part, str)
        )
        assert counts == {"total": len(reply.prompt_token_ids), **reply.usage.by_modality}
        assert counts["image"] == images
        placeholders = engine._tokenizer.token_to_id(soft)
        assert reply.prompt_token_ids.count(placeholders) == images
        assert reply.usage.prompt_tokens == counts["total"] == counts["text"] + counts["image"]
    assert reader.count_tokens("hi")["image"] == 0


def test_parts_keep_their_order(engine, words, text_of):
    """Case 68: text and pictures stay where they are, and each picture's soft tokens land in its own rows."""
    one, two = picture(), picture(2, 120, 60)
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    brightness = {name: double.encode(image, image_tokens=70).soft_tokens[0, 0] for name, image in (("1", one), ("2", two))}
    assert brightness["1"] != brightness["2"]

    def order(parts: list) -> str:
        """The prompt with each block of soft tokens as the number of its picture."""
        double.generate(parts, image_tokens=70)
        image = engine.manifest.prompt.image
        shown, at = "", 0
        for block in runtime.soft:
            number = next(name for name, value in brightness.items() if np.all(block.values == value))
            assert runtime.ids[block.start : block.start + len(block.values)] == words(image.soft) * len(block.values)
            shown += text_of(runtime.ids[at : block.start]) + number
            at = block.start + len(block.values)
        shown += text_of(runtime.ids[at:])
        return shown.replace(image.before, "[").replace(image.after, "]")

    turn = ["<bos><|turn>user\n", "<turn|>\n<|turn>model\n"]
    for parts, middle in (
        (["before:", one, "after:", two, "end"], "before:[1]after:[2]end"),
        (["before:", two, "after:", one, "end"], "before:[2]after:[1]end"),
        ([one, "text"], "[1]text"),
        (["text", one], "text[1]"),
        ([one, one, "twice"], "[1][1]twice"),
        ([one], "[1]"),
    ):
        assert order(parts) == middle.join(turn)


def test_the_order_of_pictures_changes_the_answer(engine):
    one, two = picture(), picture(2)
    rows = [engine.prompt_logits([*pair, "x"], image_tokens=70)[-1] for pair in ((one, two), (two, one), (one, one))]
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert np.abs(rows[0] - rows[2]).max() > 1e-3


def test_pictures_in_several_turns(engine, expected):
    """Case 53: all of them stay, in order; and a picture that fails in a later turn changes nothing afterwards."""
    turns = [
        Turn("user", [picture(), "a?"]),
        Turn("assistant", "b"),
        Turn("user", [picture(1), "c?"]),
        Turn("assistant", "d"),
        Turn("user", [picture(2), "e?"]),
    ]
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    double.generate(turns, image_tokens=70)
    single = [double.encode(picture(index), image_tokens=70).soft_tokens for index in range(3)]
    assert len(runtime.soft) == 3
    for block, values in zip(runtime.soft, single, strict=True):
        np.testing.assert_array_equal(block.values, values)
    with pytest.raises(ImageError, match="image 2"):
        engine.generate([*turns[:2], Turn("user", [b"broken", "c?"])], image_tokens=70)
    check_untouched(engine, expected)


def test_parts_and_turns_do_not_mix(engine):
    with pytest.raises(PromptError, match="mixture"):
        engine.generate([Turn("user", "a"), "b"])


@pytest.mark.parametrize("call", ["generate", "count_tokens", "prompt_logits", "encode"])
def test_a_model_that_cannot_see(reader, call):
    """Case 73: never an answer that was made up."""
    argument = picture() if call == "encode" else [picture(), "what?"]
    with pytest.raises(InputError, match=r"no vision input.*modalities: text"):
        getattr(reader, call)(argument)


# --- prompts


CONTROL = ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|image|>", "<|image>", "<image|>", "<|channel>", "<pad>"]


@pytest.mark.parametrize("spelling", CONTROL)
def test_control_tokens_in_text_are_text(engine, words, text_of, spelling):
    """Case 21: neither whole, nor split over two parts, nor beside a picture."""
    for parts in (
        [Text(f"a{spelling}b")],
        [Text(spelling[:3]), Text(spelling[3:])],
        [picture(), Text(spelling)],
        [Turn("user", "x"), Turn("assistant", Text(spelling)), Turn("user", "y")],
    ):
        plain = [
            Turn(part.role, Text("-")) if isinstance(part, Turn) and part.role == "assistant" else part
            for part in parts
        ]
        plain = [Text("-") if isinstance(part, Text) else part for part in plain]
        harmless = engine.generate(plain, **SMALL).prompt_token_ids
        found = engine.generate(parts, **SMALL).prompt_token_ids
        for control in CONTROL:
            [identifier] = words(control)
            assert found.count(identifier) == harmless.count(identifier), control
        if not isinstance(parts[0], Turn):
            assert spelling in text_of(found)


@pytest.mark.parametrize(
    ("parts", "request_options"),
    [
        (["hello"], {}),
        (["hello"], {"system": "be brief"}),
        (["hello"], {"raw": True}),
        ([Text("<bos>hello")], {"raw": True}),
        ([Text("<bos>hello")], {}),
        ([], {"raw": True}),
        ([""], {"raw": True}),
        ([picture(), "hello"], {}),
    ],
)
def test_one_beginning_of_sequence(engine, words, parts, request_options):
    """Case 22: at index 0 and nowhere else."""
    [begin] = words("<bos>")
    ids = engine.generate(parts, **SMALL, **request_options).prompt_token_ids
    assert ids[0] == begin
    assert begin not in ids[1:]


def test_a_bundle_without_a_template_is_always_raw(engine):
    files = {name: fact for name, fact in engine.manifest.files.items() if name != "chat_template"}
    with with_manifest(engine, files=files) as base:
        for raw in (False, True):
            assert (
                base.generate("hello", raw=raw, **SMALL).prompt_token_ids
                == engine.generate("hello", raw=True, **SMALL).prompt_token_ids
            )


def test_prompt_ids_with_pictures(engine):
    """The ids of a prompt, given back with its pictures, are the same request."""
    parts = [picture(), "and", picture(1, 40, 200)]
    first = engine.generate(parts, sampling=GREEDY, **SMALL)
    pictures = [parts[0], parts[2]]
    again = engine.generate(pictures, prompt_ids=first.prompt_token_ids, sampling=GREEDY, **SMALL)
    assert (again.token_ids, again.prompt_token_ids) == (first.token_ids, first.prompt_token_ids)
    assert again.usage == first.usage
    with pytest.raises(PromptError, match="soft tokens"):
        engine.generate(pictures[::-1], prompt_ids=first.prompt_token_ids, **SMALL)
    with pytest.raises(PromptError, match="soft tokens"):
        engine.generate(pictures[:1], prompt_ids=first.prompt_token_ids, **SMALL)
    with pytest.raises(PromptError, match="text beside it"):
        engine.generate([*pictures, "x"], prompt_ids=first.prompt_token_ids, **SMALL)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompt_chunks_do_not_change_the_answer(engine, chunk):
    reply = engine.generate([picture(), "what?"], sampling=GREEDY, **SMALL)
    chunked = engine.generate([picture(), "what?"], sampling=GREEDY, prefill_chunk=chunk, **SMALL)
    assert chunked.token_ids == reply.token_ids


def test_the_last_row_of_the_prompt_logits_gives_the_first_token(engine):
    rows = engine.prompt_logits([picture(), "what?"], image_tokens=70)
    reply = engine.generate([picture(), "what?"], sampling=GREEDY, **SMALL)
    assert rows.shape == (reply.usage.prompt_tokens, engine.runtime.vocabulary)
    assert rows.dtype == np.float32
    assert int(rows[-1].argmax()) == reply.token_ids[0]


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


# --- the engine as an object


def test_timings_add_up(engine):
    timings = engine.generate([encoded(picture()), "x"], **SMALL).timings
    parts = timings.decode_file + timings.resize + timings.vision + timings.prefill
    assert 0 < parts <= timings.first_token <= timings.total
    assert all(value > 0 for value in dataclasses.asdict(timings).values())


def test_a_closed_engine_says_so(tiny_model):
    with Engine(tiny_model("gemma3").bundle) as engine:
        stream = engine.stream("hello", max_tokens=50)
        next(stream)
    for use in (lambda: next(stream), lambda: engine.generate("x"), engine.verify):
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
