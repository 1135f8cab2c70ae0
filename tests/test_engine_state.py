"""What a request leaves behind in an engine: nothing. Failures, refusals, threads and interleaved streams."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer

from siglance.engine import Engine, Sampling, Turn
from siglance.engine.errors import InputError, ModelOutputError

from .scripted import picture, scripted

GREEDY = Sampling(temperature=0, seed=0)
SMALL = {"image_tokens": 70, "max_tokens": 6}


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text and pictures."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def letters(engine):
    """`letters(text)`: one id per character."""
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    return lambda text: [tokenizer.token_to_id(character) for character in text]


# --- failures leave nothing behind


class Broken(Exception):
    pass


@contextlib.contextmanager
def failing(graph, at: int) -> Iterator[None]:
    """The run number `at` of the graph fails, counted from here."""
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("run", "run_bound"):
            real = getattr(graph, name)

            def run(*arguments, real=real):
                if next(calls) == at:
                    raise Broken
                return real(*arguments)

            patch.setattr(graph, name, run)
        yield


@pytest.fixture(scope="module")
def expected(tiny_model):
    """What a fresh engine says."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as fresh:
        return (
            fresh.generate([picture(), "and this?"], sampling=GREEDY, **SMALL).token_ids,
            fresh.prompt_logits([picture(), "and this?"], image_tokens=70),
        )


def check_untouched(engine, expected) -> None:
    reply = engine.generate([picture(), "and this?"], sampling=GREEDY, **SMALL)
    assert reply.token_ids == expected[0]
    np.testing.assert_array_equal(engine.prompt_logits([picture(), "and this?"], image_tokens=70), expected[1])


@pytest.mark.parametrize(
    ("graph", "at"), [("vision", 0), ("vision", 1), ("embed", 0), ("decoder", 0), ("decoder", 1), ("decoder", 4)]
)
def test_a_run_that_fails(engine, expected, graph, at):
    """Case 53: whichever graph fails at whichever run, the next answer is a fresh engine's."""
    with failing(getattr(engine.runtime, graph), at), pytest.raises(Broken):
        engine.generate([picture(1), picture(2), "what?"], image_tokens=70, max_tokens=9, sampling=GREEDY)
    check_untouched(engine, expected)


def test_soft_tokens_that_are_not_finite(engine, expected, monkeypatch):
    """Cases 17 and 53: a tower that overflows is an error, not an answer."""

    def overflown(feeds):
        return {"soft_tokens": np.full((len(feeds["patches"]) // 9, engine.runtime.hidden), np.nan, np.float32)}

    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime.vision, "run", overflown)
        with pytest.raises(ModelOutputError, match="not finite"):
            engine.generate([picture(7), "what?"], **SMALL)
    check_untouched(engine, expected)


@pytest.mark.parametrize("budget", [70, 140, 280])
@pytest.mark.parametrize("shift", [-1, 1])
def test_another_number_of_soft_tokens_than_the_prompt_has_places_for(engine, expected, monkeypatch, budget, shift):
    """Case 8: layout, tower and prompt count alike, or the request ends in an error before anything is spliced in."""
    run = engine.runtime.vision.run

    def miscounted(feeds):
        values = run(feeds)["soft_tokens"]
        return {"soft_tokens": values[:-1] if shift < 0 else np.concatenate([values, values[:1]])}

    count = engine.count_tokens([picture(7), "what?"], image_tokens=budget)["image"]
    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime.vision, "run", miscounted)
        with pytest.raises(
            ModelOutputError, match=rf"soft tokens of shape \[{count + shift}, 64\], expected \[{count}, "
        ):
            engine.generate([picture(7), "what?"], image_tokens=budget, max_tokens=6)
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
    assert list(stream) == []
    check_untouched(engine, expected)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failure_after_some_text_reaches_the_caller(engine, letters, at):
    double, runtime = scripted(engine, letters("abcdef"), errors={at: Broken()})
    stream = double.stream("go")
    assert [next(stream).text for _ in range(at)] == list("abc")[:at]
    with pytest.raises(Broken):
        next(stream)
    runtime.errors = {}
    assert double.generate("go", max_tokens=6).text == "abcdef"


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
def alone(tiny_model):
    """The text of every request, each from an engine that did nothing else."""
    texts = []
    for parts, sampling in REQUESTS:
        with Engine(tiny_model("gemma4").bundle, threads=1) as fresh:
            texts.append(fresh.generate(parts, sampling=sampling, **SMALL).text)
    return texts


def test_the_same_seed_gives_the_same_text_whatever_ran_between(engine, alone):
    assert alone[0] != alone[1]
    for index in (0, 4, 0, 2, 1, 0):
        parts, sampling = REQUESTS[index]
        assert engine.generate(parts, sampling=sampling, **SMALL).text == alone[index]


def test_without_a_seed_one_is_drawn_and_reported(engine):
    first = engine.generate("hello", sampling=Sampling(temperature=1.5), max_tokens=12)
    again = engine.generate("hello", sampling=Sampling(temperature=1.5, seed=first.sampling.seed), max_tokens=12)
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

    with ThreadPoolExecutor(8) as pool:  # Case 64
        assert all(pool.map(ask, range(32)))
