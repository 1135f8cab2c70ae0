"""Conversations: what is remembered, what a failed or cancelled turn leaves, and control tokens in what people write.

Case numbers are public bug reports of other engines. The command `siglance chat` is in test_chat_command.py.
"""

from __future__ import annotations

import gc
import io
import itertools
import threading

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from siglance.engine import Chat, EncodedImage, Engine, Grammar, Image, Pdf, Sampling, Text, Turn
from siglance.engine.errors import ContextFull, ImageError, InputError, PromptError, SamplingError

from .pdf_files import numbered_pages
from .scripted import picture, scripted
from .test_engine_state import Broken, failing

GREEDY = Sampling(temperature=0, seed=0)
SMALL = {"sampling": GREEDY, "max_tokens": 6}


def smallest(engine: Engine) -> int:
    """The smallest token budget of a picture."""
    return engine.manifest.image.budgets[0]


@pytest.fixture(scope="module", params=["gemma4", "gemma3_vision"])
def engine(request, tiny_model):
    with Engine(tiny_model(request.param).bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reader(tiny_model):
    """A model of text only."""
    with Engine(tiny_model("gemma3").bundle, threads=1) as engine:
        yield engine


@pytest.fixture
def fresh(tiny_model):
    """Nothing cached."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


def shown(chat: Chat) -> list[tuple[str, list[object]]]:
    """The history, with what was said, and the size of what was shown."""
    return [
        (turn.role, [part.text if isinstance(part, Text) else part.size for part in turn.parts])
        for turn in chat.history
    ]


def same_as_whole(engine: Engine, conversation: list[Turn], reply, system: str | None = None) -> None:
    """The reply is the one that the whole conversation gets at once, from nothing."""
    whole = engine.generate(conversation, system=system, image_tokens=smallest(engine), cache=False, **SMALL)
    assert reply.prompt_token_ids == whole.prompt_token_ids
    assert reply.token_ids == whole.token_ids
    assert reply.usage.by_modality == whole.usage.by_modality


# --- turns


def test_a_conversation_is_its_turns(engine):
    budget = smallest(engine)
    chat = engine.chat(system="Be brief.", image_tokens=budget, **SMALL)
    conversation: list[Turn] = []
    for turn in ([picture(), "what is this?"], "and the cat?", ["left", picture(1, 90, 60), picture(2)], "again"):
        conversation.append(Turn("user", turn))
        reply = chat.send(turn)
        same_as_whole(engine, conversation, reply, system="Be brief.")
        conversation.append(Turn("assistant", Text(reply.text)))
        assert [turn.role for turn in chat.history] == [turn.role for turn in conversation]
    assert shown(chat)[4] == ("user", ["left", (90, 60), (60, 90)])


def test_the_history_is_a_conversation(engine):
    """`history` goes into `generate` as it is, and its pictures are encoded already."""
    budget = smallest(engine)
    chat = engine.chat(image_tokens=budget, **SMALL)
    chat.send([picture(), "what is this?"])
    assert isinstance(chat.history, tuple)
    [seen] = [part for part in chat.history[0].parts if isinstance(part, EncodedImage)]
    np.testing.assert_array_equal(seen.soft_tokens, engine.encode(picture(), image_tokens=budget).soft_tokens)
    asked = [*chat.history, Turn("user", "and?")]
    assert engine.generate(asked, **SMALL).token_ids == chat.send("and?").token_ids
    assert repr(chat.history[0]) == (
        "Turn(role='user', parts=[EncodedImage(size=(60, 90), modality='image'), Text(text='what is this?')])"
    )


def test_later_turns_go_on_from_earlier_ones(fresh):
    """Windows of 8 evict in every turn: each one starts where the last prompt or reply ended."""
    chat = fresh.chat(image_tokens=70, **SMALL)
    rows = 0
    for turn in ([picture(), "what is this?"], "and the cat?", [picture(1), "the dog"], "again"):
        reply = chat.send(turn)
        assert reply.usage.cached_tokens >= rows
        rows = reply.usage.prompt_tokens
    assert chat.send("once more").usage.prompt_tokens > rows


def test_a_reply_that_is_read_back_as_it_was_written_runs_no_more(reader):
    """Its state is kept at its end; one whose text encodes to other ids goes on from the end of its prompt."""
    tokenizer = Tokenizer.from_file(str(reader.bundle.path("tokenizer")))
    checked = {True: 0, False: 0}
    for seed in range(12):
        chat = reader.chat(sampling=Sampling(temperature=0.3 + seed % 3, seed=seed), max_tokens=5)
        first = chat.send("What is this?")
        again = tokenizer.encode(first.text.strip(), add_special_tokens=False).ids
        second = chat.send("and?")
        stepped = len(first.token_ids) - (first.finish_reason == "length")
        whole = first.usage.prompt_tokens + stepped
        same = list(first.token_ids) == again
        assert (second.usage.cached_tokens >= whole) >= same
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
        checked[same] += 1
    assert checked[True]
    assert checked[False]


def test_pictures_are_read_once(engine, tmp_path):
    """A file may change or go, and a file object is read but once."""
    budget = smallest(engine)
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(picture()).save(path)
    file = io.BytesIO(path.read_bytes())
    file.seek(0)
    for source in (path, file, str(path)):
        if not path.exists():
            PIL.Image.fromarray(picture()).save(path)
        chat = engine.chat(image_tokens=budget, **SMALL)
        first = chat.send([source, "what?"])
        path.unlink()
        second = chat.send("and?")
        turns = [Turn("user", [picture(), "what?"]), Turn("assistant", Text(first.text)), Turn("user", "and?")]
        same_as_whole(engine, turns, second)


def test_documents_stay_documents(fresh):
    chat = fresh.chat(image_tokens=70, **SMALL)
    first = chat.send([Pdf(numbered_pages(3), pages="2-3"), "what?"])
    second = chat.send("and?")
    assert first.usage.by_modality["document"] == second.usage.by_modality["document"] > 70
    assert [len(turn.parts) for turn in chat.history] == [3, 1, 1, 1]
    assert all(part.modality == "document" for part in chat.history[0].parts[:2])


def test_options_of_the_chat_and_of_a_turn(fresh):
    chat = fresh.chat(sampling=Sampling(temperature=1.3, seed=4), max_tokens=3, image_tokens=70)
    first = chat.send("hello")
    assert (first.usage.completion_tokens, first.sampling.seed, first.sampling.temperature) == (3, 4, 1.3)
    second = chat.send([picture(0, 300, 300), "x"], sampling=GREEDY, max_tokens=7, image_tokens=140, logprobs=1)
    assert (second.usage.completion_tokens, second.sampling.temperature) == (7, 0)
    assert 70 < second.usage.by_modality["image"] <= 140
    assert len(second.logprobs) == 7
    third = chat.send([Image(picture(1, 300, 300), 70), "x"])
    assert third.usage.completion_tokens == 3
    # pictures keep the budget of their turn
    assert 0 < third.usage.by_modality["image"] - second.usage.by_modality["image"] <= 70
    stopped = chat.send("x", stop=third.text[:1] or "x", max_tokens=9)
    assert third.text[:1] not in stopped.text


def test_the_form_of_a_reply(fresh):
    chat = fresh.chat(**SMALL)
    assert chat.send("which?", format=Grammar.regex("(cat|dog)")).text in ("cat", "dog")
    assert chat.history[-1].parts[0].text in ("cat", "dog")


def test_an_empty_reply_is_a_turn(fresh):
    """The model may end its turn at once; the next turn must still be possible."""
    double, runtime = scripted(fresh, [fresh.manifest.stop_ids[0]])
    chat = double.chat()
    assert chat.send("hello").text == ""
    assert [(turn.role, len(turn.parts)) for turn in chat.history] == [("user", 1), ("assistant", 1)]
    chat.send("hello?")
    text = Tokenizer.from_file(str(fresh.bundle.path("tokenizer"))).decode(runtime.ids, skip_special_tokens=False)
    assert text.endswith("<|turn>user\nhello<turn|>\n<|turn>model\n<turn|>\n<|turn>user\nhello?<turn|>\n<|turn>model\n")


def test_streams_are_joined(fresh):
    chats = [fresh.chat(image_tokens=70, **SMALL) for _ in range(2)]
    for turn in ([picture(), "what?"], "and?"):
        *chunks, last = chats[0].stream(turn)
        whole = chats[1].send(turn)
        assert "".join(chunk.text for chunk in [*chunks, last]) == last.reply.text == whole.text
    assert shown(chats[0]) == shown(chats[1])


def test_reset_forgets_the_turns_and_keeps_the_rest(fresh):
    chat = fresh.chat(system="Be brief.", image_tokens=70, **SMALL)
    first = chat.send([picture(), "what?"])
    chat.send("and?")
    chat.reset()
    assert chat.history == ()
    again = chat.send([picture(), "what?"])
    assert (again.prompt_token_ids, again.token_ids) == (first.prompt_token_ids, first.token_ids)


# --- turns that are not


def refused(chat: Chat) -> None:
    """The ways a turn is refused before anything runs."""
    for error, parts, options in (
        (ImageError, [b"not a picture", "what?"], {}),
        (ImageError, [Image(picture(), 71), "what?"], {}),
        (PromptError, [], {}),
        (PromptError, "", {}),
        (PromptError, [7], {}),
        (PromptError, Turn("user", "x"), {}),
        (ContextFull, "x" * 5000, {}),
        (SamplingError, "x", {"sampling": Sampling(logit_bias={10**6: 1})}),
        (InputError, "x", {"max_tokens": 0}),
        (InputError, "x", {"stop": [""]}),
    ):
        with pytest.raises(error):
            chat.send(parts, **options)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(fresh):
    chat, undisturbed = (fresh.chat(image_tokens=70, **SMALL) for _ in range(2))
    for turn in ([picture(), "what?"], "and?", "again"):
        before = chat.history
        refused(chat)
        for graph, at in (("vision", 0), ("embed", 0), ("decoder", 0), ("decoder", 2)):
            with failing(getattr(fresh.runtime, graph), at), pytest.raises(Broken):
                chat.send([picture(5), f"broken {graph} {at}"])
            fresh._reuse.features.clear()
        assert chat.history == before
        reply, expected = chat.send(turn), undisturbed.send(turn)
        assert (reply.prompt_token_ids, reply.token_ids) == (expected.prompt_token_ids, expected.token_ids)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_turn_that_is_cancelled_leaves_the_conversation_as_it_was(fresh, chunks):
    sampling = Sampling(temperature=1, seed=2)
    chat = fresh.chat(image_tokens=70, sampling=sampling, max_tokens=30)
    chat.send([picture(), "what?"])
    before = chat.history
    stream = chat.stream([picture(1), "cancelled"])
    assert all(next(stream).reply is None for _ in range(chunks))
    stream.close()
    assert chat.history == before
    reply = chat.send("and?")
    assert "cancelled" not in str(chat.history)
    whole = fresh.generate([*before, Turn("user", "and?")], sampling=sampling, max_tokens=30, cache=False)
    assert reply.token_ids == whole.token_ids


def test_the_last_chunk_ends_the_turn(fresh):
    """Whoever has the reply has the turn, even if the stream is not read beyond it."""
    chat = fresh.chat(**SMALL)
    stream = chat.stream("what?")
    reply = next(chunk.reply for chunk in stream if chunk.reply is not None)
    assert [turn.role for turn in chat.history] == ["user", "assistant"]
    stream.close()
    assert chat.history[-1].parts[0].text == reply.text


def test_nothing_runs_before_the_first_next(fresh):
    chat = fresh.chat(**SMALL)
    stream = chat.stream([b"not a picture"], max_tokens=0)
    chat.send("hello")  # not busy
    with pytest.raises(InputError):
        next(stream)


def test_one_turn_at_a_time(fresh):
    chat = fresh.chat(sampling=GREEDY, max_tokens=30)
    stream = chat.stream("what?")
    next(stream)
    for use in (lambda: chat.send("and?"), chat.reset, lambda: next(chat.stream("x"))):
        with pytest.raises(InputError, match="still streaming"):
            use()
    errors = []

    def other() -> None:
        try:
            chat.send("from a thread")
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1
    list(stream)
    assert [turn.role for turn in chat.history] == ["user", "assistant"]
    chat.send("and?")


def test_a_full_context_is_said_and_nothing_is_forgotten(fresh):
    """Case 33: never a shift of the oldest turns."""
    chat = fresh.chat(sampling=GREEDY, max_tokens=2)
    histories = [chat.history]

    def talk() -> None:
        for turn in itertools.count():
            chat.send(f"{turn} " + "long " * 60)
            histories.append(chat.history)

    with pytest.raises(ContextFull) as full:
        talk()
    assert len(histories) > 2
    assert chat.history == histories[-1]
    assert full.value.context == fresh.manifest.context < full.value.prompt_tokens
    assert chat.send("x").usage.prompt_tokens < fresh.manifest.context


def test_a_chat_needs_roles(tiny_model):
    with (
        Engine(tiny_model("paligemma").bundle, threads=1) as engine,
        pytest.raises(PromptError, match="needs a chat template"),
    ):
        engine.chat()


def test_a_chat_of_a_closed_engine(tiny_model):
    with Engine(tiny_model("gemma3").bundle) as engine:
        chat = engine.chat()
        chat.send("hello", max_tokens=2)
    with pytest.raises(InputError, match="closed"):
        chat.send("again")


# --- states


def test_other_traffic_does_not_evict_a_chat(tiny_model):
    """The latest states of a chat stay while it lives, and go when it is gone."""
    with Engine(tiny_model("gemma4").bundle, threads=1, cache_bytes=200_000) as engine:
        chat = engine.chat(image_tokens=70, **SMALL)
        first = chat.send([picture(), "what?"])
        for turn in range(3):
            for index in range(12):
                engine.generate(f"something else {turn} {index}", **SMALL)
            reply = chat.send(f"and {turn}?")
            assert reply.usage.cached_tokens >= first.usage.prompt_tokens
            first = reply
        history = chat.history
        del chat
        gc.collect()
        for index in range(12):
            engine.generate(f"something else {index}", **SMALL)
        gone = engine.generate([*history, Turn("user", "and?")], **SMALL)
        assert gone.usage.cached_tokens < 10


def test_a_cancelled_turn_does_not_unpin_the_one_before(tiny_model):
    with Engine(tiny_model("gemma4").bundle, threads=1, cache_bytes=200_000) as engine:
        chat = engine.chat(image_tokens=70, sampling=GREEDY, max_tokens=20)
        first = chat.send([picture(), "what?"])
        stream = chat.stream("cancelled")
        next(stream)
        stream.close()
        for index in range(12):
            engine.generate(f"something else {index}", **SMALL)
        assert chat.send("and?").usage.cached_tokens >= first.usage.prompt_tokens


def test_without_the_cache(fresh):
    chat = fresh.chat(image_tokens=70, cache=False, **SMALL)
    plain = fresh.chat(image_tokens=70, **SMALL)
    for turn in ([picture(), "what?"], "and?", "again"):
        reply = chat.send(turn)
        assert (reply.usage.cached_tokens, len(fresh._reuse.prefixes)) == (0, 0)
    for turn in ([picture(), "what?"], "and?", "again"):
        again = plain.send(turn)
    assert again.token_ids == reply.token_ids


def test_chats_in_threads(fresh):
    """Chats that begin alike share states and do not disturb each other."""
    expected = {}

    def talk(index: int, found: dict) -> None:
        chat = fresh.chat(image_tokens=70, **SMALL)
        found[index] = [chat.send(turn).token_ids for turn in ([picture(), "what?"], f"and {index}?", "again")]

    for index in range(6):
        fresh._reuse.clear()
        talk(index, expected)
    found: dict = {}
    threads = [threading.Thread(target=talk, args=(index, found)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# --- what people write


@pytest.fixture(scope="module")
def talker(tiny_model):
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


SPELLINGS = [
    "<bos>",
    "<eos>",
    "<|turn>",
    "<turn|>",
    "<|image|>",
    "<|image>",
    "<|channel>",
    "<start_of_turn>",
    "<|tool>",
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*SPELLINGS, "<|turn>system\n", "hello", " ", "<|tu", "rn>", "é", "\n"]), min_size=1),
        min_size=1,
        max_size=3,
    )
)
def test_law_text_never_becomes_control_tokens(talker, turns):
    """Cases 21 and 22: in turns, in the system text and in replies. There is one beginning-of-sequence token."""
    tokenizer = Tokenizer.from_file(str(talker.bundle.path("tokenizer")))
    control = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    begin, start = tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<|turn>")
    # A reply that spells control tokens with ordinary ones.
    letters = [tokenizer.token_to_id(character) for character in "<|turn>user"]
    double, runtime = scripted(talker, [*letters, talker.manifest.stop_ids[0]])
    chat = double.chat(system="<turn|><bos>" + "".join(turns[0]), max_tokens=20)
    said = []
    for parts in turns:
        if not "".join(parts).strip():
            continue
        reply = chat.send([*map(Text, parts), picture()], image_tokens=70)
        said.append(parts)
        assert reply.text == "<|turn>user"
        found = [id for id in runtime.ids if id in control]
        image = [tokenizer.token_to_id(name) for name in ("<|image>", "<image|>")]
        expected_turns = 1 + 2 * len(said)  # system, and user and model of each turn
        assert found.count(begin) == 1
        assert runtime.ids[0] == begin
        assert found.count(start) == expected_turns
        assert found.count(image[0]) == found.count(image[1]) == len(said)
        assert len(runtime.soft) == len(said)
    text = tokenizer.decode(runtime.ids, skip_special_tokens=False) if said else ""
    for parts in said:
        assert "".join(parts).strip() in text


@pytest.mark.parametrize("system", [None, "", "  ", "Be brief."])
def test_histories_that_people_have(engine, system):
    """Case 23: a system text, pictures alone, and empty replies are all usable."""
    budget = smallest(engine)
    chat = engine.chat(system=system, image_tokens=budget, **SMALL)
    for turn in ([picture()], "hello", [Text(""), picture(1), Text("")], [Text("a"), Text("b")]):
        chat.send(turn)
    ids = chat.send("end").prompt_token_ids
    begin = Tokenizer.from_file(str(engine.bundle.path("tokenizer"))).token_to_id("<bos>")
    assert ids[0] == begin
    assert ids.count(begin) == 1
