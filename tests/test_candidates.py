"""Several replies to one prompt, log-probabilities, more stop ids; and seeds that hold whatever runs in between.

Requests run on the tiny model (random weights: its distribution is flat, so seeds matter) and on scripted ones.
"""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from siglance.engine import Engine, Sampling
from siglance.engine.decoding import MAX_CANDIDATES
from siglance.engine.errors import ModelOutputError, SamplingError
from siglance.engine.output import logprob_lines, reply_json
from siglance.kernels import reference_sampling

from .scripted import picture, scripted

FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def words(engine):
    return lambda text: engine._tokenizer.encode(text, add_special_tokens=False).ids


def ask(engine: Engine, seed: int = 3, **options):
    sampling = options.pop("sampling", Sampling(**FREE, seed=seed))
    return engine.generate([picture(), "what?"], image_tokens=70, sampling=sampling, **{"max_tokens": 12} | options)


# -- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_the_first_candidate_is_the_single_reply_and_each_can_be_had_again(engine, prompt):
    """Also where the prompt has pushed rows out of the window buffers, which the state's copy must hold as they are."""
    question = "x " * 300 if prompt == "long" else "x"
    options = {"max_tokens": 24}
    several = engine.generate(question, candidates=3, sampling=Sampling(**FREE, seed=11), **options)
    assert len({one.token_ids for one in several.candidates}) == len({one.seed for one in several.candidates}) == 3
    for one in several.candidates:
        alone = engine.generate(question, sampling=Sampling(**FREE, seed=one.seed), **options)
        assert (alone.text, alone.token_ids, alone.finish_reason) == (one.text, one.token_ids, one.finish_reason)
    assert several.candidates[0].seed == several.sampling.seed == 11
    fields = ("text", "token_ids", "finish_reason", "boxes", "truncated", "logprobs")
    assert all(getattr(several, name) == getattr(several.candidates[0], name) for name in fields)


def test_more_candidates_change_none_of_the_first(engine):
    three, five = ask(engine, candidates=3), ask(engine, candidates=5)
    assert three.candidates == five.candidates[:3]


def test_one_run_of_the_prompt_serves_all_candidates(engine, words):
    double, runtime = scripted(engine, [*words("hello"), engine.manifest.stop_ids[0]])
    reply = double.generate([picture(), "go"], candidates=4)
    assert [one.text for one in reply.candidates] == ["hello"] * 4
    assert (runtime.encodes, runtime.prefills) == (1, 1)
    assert reply.usage.completion_tokens == 4 * len(words("hello"))


def test_candidates_stream_one_after_the_other(engine):
    options = {"candidates": 3, "logprobs": 1, "max_tokens": 12, "sampling": Sampling(**FREE, seed=4)}
    chunks = list(engine.stream("x", **options))
    reply = chunks[-1].reply
    assert [chunk.reply is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [index for index, _ in itertools.groupby(chunk.candidate for chunk in chunks)] == [0, 1, 2]
    for index, one in enumerate(reply.candidates):
        own = [chunk for chunk in chunks if chunk.candidate == index]
        assert "".join(chunk.text for chunk in own) == one.text
        assert tuple(itertools.chain.from_iterable(chunk.token_ids for chunk in own)) == one.token_ids
        assert tuple(itertools.chain.from_iterable(chunk.logprobs for chunk in own)) == one.logprobs


def test_closing_between_candidates_stops_the_work(engine, words):
    double, runtime = scripted(engine, [*words("ab"), engine.manifest.stop_ids[0]])
    stream = double.stream("go", candidates=100)
    while next(stream).candidate == 0:
        pass
    stream.close()
    assert runtime.steps <= 2 * len(words("ab")) + 2


@pytest.mark.parametrize("value", [0, -1, MAX_CANDIDATES + 1, 1.0, True, "2", None])
def test_counts_of_candidates_out_of_range(engine, words, value):
    double, runtime = scripted(engine, words("a"))
    with pytest.raises(SamplingError, match=rf"candidates is {value!r}, expected an integer between 1 and 128"):
        double.generate([picture(), "go"], candidates=value)
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_a_failure_in_a_later_candidate_is_the_failure_of_the_request(engine, words):
    bad = np.full(engine.runtime.vocabulary, np.nan, np.float32)
    double, _ = scripted(engine, words("hello"), rows={1: bad})
    with pytest.raises(ModelOutputError, match="non-finite"):
        double.generate("go", candidates=2)
    assert engine.generate("go", max_tokens=1, candidates=2).usage.completion_tokens == 2


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_text_between_interleaved_streams(engine):
    """Two streams, a whole request and another engine's random numbers take turns; each is as if alone."""
    alone = {seed: ask(engine, seed).token_ids for seed in (5, 6)}
    options = {"image_tokens": 70, "max_tokens": 12}
    streams = {
        seed: engine.stream([picture(), "what?"], sampling=Sampling(**FREE, seed=seed), **options) for seed in (5, 6)
    }
    found: dict[int, tuple[int, ...]] = {5: (), 6: ()}
    while streams:
        for seed, stream in list(streams.items()):
            chunk = next(stream, None)
            if chunk is None:
                del streams[seed]
                continue
            found[seed] += chunk.token_ids
            np.random.default_rng().random()
            ask(engine, seed=9, max_tokens=2, candidates=2)
    assert found == alone
    assert ask(engine, 5).token_ids == alone[5]


def test_a_seed_that_was_drawn_gives_the_reply_again(engine):
    first = ask(engine, sampling=Sampling(**FREE))
    again = ask(engine, sampling=Sampling(**FREE, seed=first.sampling.seed))
    assert again.token_ids == first.token_ids
    assert ask(engine, sampling=Sampling(**FREE)).sampling.seed != first.sampling.seed


# -- penalties and bias in requests ----------------------------------------------------------------------------------


def test_soft_tokens_of_pictures_are_not_penalised_but_the_rest_of_the_prompt_is(engine, words):
    [seen] = words("a")
    soft = engine._tokenizer.token_to_id("<|image|>")
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    row[[seen, soft]] = 8.0, 7.9
    double, runtime = scripted(engine, [0], rows={0: row})
    request = {"max_tokens": 1, "image_tokens": 70}
    first = double.generate([picture(), "a"], sampling=Sampling(temperature=0), **request)
    assert first.token_ids == (seen,)
    penalised = double.generate([picture(), "a"], sampling=Sampling(temperature=0, repetition_penalty=1.5), **request)
    assert runtime.ids.count(soft) > 10
    assert penalised.token_ids == (soft,)


def test_penalties_count_what_the_reply_has(engine, words):
    first, second, third = (words(character)[0] for character in "abc")
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    row[[first, second, third]] = 8.0, 7.5, 7.0
    double, _ = scripted(engine, [first], rows=dict.fromkeys(range(10), row))
    request = {"max_tokens": 5}
    assert double.generate("go", sampling=Sampling(temperature=0), **request).text == "aaaaa"
    sampling = Sampling(temperature=0, presence_penalty=2)
    assert double.generate("go", sampling=sampling, **request).text == "abcaa"
    sampling = Sampling(temperature=0, frequency_penalty=0.4)
    assert double.generate("go", sampling=sampling, **request).text == "aabab"


def test_bias_beyond_the_vocabulary_is_refused_before_any_work(engine, words):
    double, runtime = scripted(engine, words("a"))
    size = engine.runtime.vocabulary
    with pytest.raises(SamplingError, match=rf"logit_bias has the token id {size}, the vocabulary .* {size} tokens"):
        double.generate([picture(), "go"], sampling=Sampling(logit_bias={size: 1.0}))
    assert (runtime.encodes, runtime.prefills) == (0, 0)
    assert double.generate("go", max_tokens=1, sampling=Sampling(logit_bias={size - 1: 100.0}, temperature=0))


def test_case_63_the_effective_values_are_reported(engine):
    sampling = Sampling(temperature=0.5, presence_penalty=1, repetition_penalty=1.2, logit_bias={5: -3}, seed=2)
    used = ask(engine, sampling=sampling).sampling
    assert (used.presence_penalty, used.frequency_penalty, used.repetition_penalty) == (1.0, 0.0, 1.2)
    assert (used.logit_bias, used.seed, used.temperature) == ({5: -3.0}, 2, 0.5)


# -- stop ids --------------------------------------------------------------------------------------------------------


def test_case_26_a_request_may_add_stop_ids(engine, words):
    """They end the reply, are no part of it, and do not replace the bundle's."""
    [comma] = words(",")
    own = engine.manifest.stop_ids[1]
    double, runtime = scripted(engine, [*words("ab"), comma, *words("cd"), own])
    reply = double.generate("go", stop_ids=[comma])
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("ab", "stop_id", len(words("ab")))
    assert reply.token_ids == tuple(words("ab"))
    assert runtime.steps == len(words("ab"))
    assert double.generate("go", stop_ids=()).text == "ab,cd"
    assert double.generate("go", stop_ids={5}).finish_reason == "stop_id"


@pytest.mark.parametrize("value", [[-1], [10**6], [1.0], ["a"], "a", 3, [True], None])
def test_stop_ids_that_are_none(engine, words, value):
    double, runtime = scripted(engine, words("a"))
    with pytest.raises(SamplingError, match="stop_ids"):
        double.generate([picture(), "go"], stop_ids=value)
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_case_31_any_number_of_stop_strings(engine, words):
    """Thousands, of which the earliest match ends the text."""
    many = [f"never {index:05}" for index in range(5000)] + ["lo", "world"]
    double, _ = scripted(engine, [*words("hello world"), engine.manifest.stop_ids[0]])
    assert double.generate("go", stop=many).text == "hel"
    assert double.generate("go", stop=many[:-2]).text == "hello world"
    double, _ = scripted(engine, [*words("say never 04999!"), engine.manifest.stop_ids[0]])
    assert double.generate("go", stop=many).text == "say "


# -- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, FREE | {"seed": 3, "presence_penalty": 2.0, "top_k": 5}])
def test_log_probabilities_are_the_models_own(engine, sampling):
    """Of the row that the whole prompt and reply have there, before penalties, filters and temperature."""
    reply = engine.generate("x", max_tokens=6, sampling=Sampling(**sampling), logprobs=3)
    ids = [*reply.prompt_token_ids, *reply.token_ids]
    all_rows = engine.prompt_logits([], prompt_ids=ids)
    assert [entry.id for entry in reply.logprobs] == list(reply.token_ids)
    for place, entry in enumerate(reply.logprobs):
        row = all_rows[len(reply.prompt_token_ids) - 1 + place].tolist()
        expected = reference_sampling.log_probabilities(row)
        assert entry.logprob == pytest.approx(expected[entry.id], abs=1e-3)
        best = sorted(range(len(row)), key=lambda id: (-row[id], id))[:3]
        assert [other.logprob for other in entry.top] == pytest.approx([expected[id] for id in best], abs=1e-3)
        assert [other.logprob for other in entry.top] == sorted((other.logprob for other in entry.top), reverse=True)


def test_tops_are_the_best_with_the_lowest_id_among_equals(engine, words):
    row = np.zeros(engine.runtime.vocabulary, np.float32)
    row[[40, 300, 301, 7]] = 5.0, 9.0, 9.0, -np.inf
    double, _ = scripted(engine, [0], rows={0: row})
    [entry] = double.generate("go", max_tokens=1, logprobs=4, sampling=Sampling(temperature=0)).logprobs
    assert [other.id for other in entry.top] == [300, 301, 40, 0]
    assert (entry.id, entry.logprob) == (300, entry.top[0].logprob)
    assert all(math.isfinite(other.logprob) for other in entry.top)


def test_log_probabilities_have_the_bytes_of_each_token(engine, words):
    """Case 28 at the level of tokens: the bytes joined are the text, also where a token is part of a character."""
    special = engine._tokenizer.token_to_id("<|channel>")
    double, _ = scripted(engine, [*words(" hé🦝"), special, engine.manifest.stop_ids[0]])
    reply = double.generate("go", logprobs=0)
    *text, marker = reply.logprobs
    assert b"".join(entry.bytes for entry in text).decode() == reply.text == " hé🦝"
    assert {entry.text for entry in text if len(entry.bytes) == 1 and entry.bytes[0] > 127} == {"\ufffd"}
    assert (marker.text, marker.bytes, marker.top) == ("<|channel>", b"<|channel>", ())


def test_log_probabilities_are_absent_unless_asked_for(engine):
    reply = ask(engine)
    assert reply.logprobs is None
    assert reply_json(reply)["logprobs"] is None
    assert not list(logprob_lines(reply))


@pytest.mark.parametrize("value", [-1, 21, 1.0, True, "2"])
def test_counts_of_log_probabilities_out_of_range(engine, words, value):
    double, runtime = scripted(engine, words("a"))
    with pytest.raises(SamplingError, match=rf"logprobs is {value!r}, expected an integer between 0 and 20"):
        double.generate([picture(), "go"], logprobs=value)
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_replies_as_json(engine, words):
    row = np.full(engine.runtime.vocabulary, -np.inf, np.float32)
    row[words("a")] = 0.0
    double, _ = scripted(engine, words("a"), rows={0: row})
    reply = double.generate("go", max_tokens=1, candidates=2, logprobs=2)
    facts = json.loads(json.dumps(reply_json(reply), allow_nan=False))
    [entry] = facts["logprobs"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("a", [97], 0.0)
    assert [other["token"] for other in entry["top"]] == ["a"]  # the others are impossible
    assert [one["seed"] for one in facts["candidates"]] == [one.seed for one in reply.candidates]
    assert facts["candidates"][0]["text"] == facts["text"] == "a"
    assert len(list(logprob_lines(reply))) == 2
