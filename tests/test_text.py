"""Text of a reply: streaming equals decoding at once, and stop strings end it exactly.

The laws compare `TextStream` with definitions written for one-shot decoding (`reply_text`), over random ids that are
rich in byte tokens. Cases 26, 28, 29 and 31 are public bug reports of other engines.
"""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from siglance.engine.errors import BundleError, PromptError
from siglance.engine.text import TextStream, check_stop, load_tokenizer, special_ids, token_bytes

from .toy_tokenizer import toy_tokenizer

EXAMPLES = 500

TOKENIZER = toy_tokenizer()
TOKENIZER.encode_special_tokens = True
SPECIAL = special_ids(TOKENIZER)
STRIP = decoders.Strip(" ", 1, 0)
FAMILY = "👨‍👩‍👧‍👦"


def ids_of(*pieces: str | bytes) -> list[int]:
    """Ids of texts, of special tokens given by name, and of bytes, each as byte tokens."""
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            ids += [TOKENIZER.token_to_id(f"<0x{byte:02X}>") for byte in piece]
        elif TOKENIZER.token_to_id(piece) is not None:
            ids.append(TOKENIZER.token_to_id(piece))
        else:
            ids += TOKENIZER.encode(piece, add_special_tokens=False).ids
    return ids


def byte_of(id: int) -> int | None:
    match = re.fullmatch("<0x(..)>", TOKENIZER.id_to_token(id))
    return int(match[1], 16) if match else None


def unfinished(data: bytes) -> int:
    """How many bytes at the end start a UTF-8 character and lack the rest, by trying all ways to complete them."""
    for count in (1, 2, 3):
        tail = data[-count:]
        if len(tail) == count and any(completes(tail, more) for more in COMPLETIONS):
            return count
    return 0


# Continuations that complete any unfinished character: the second byte has a narrower range after E0, ED, F0, F4.
COMPLETIONS = [bytes([second, *[0x80] * rest]) for second in (0x80, 0x90, 0xA0) for rest in range(3)]


def completes(tail: bytes, more: bytes) -> bool:
    try:
        return len((tail + more).decode()) == 1
    except UnicodeDecodeError:
        return False


def reply_text(ids: list[int], stop: tuple[str, ...] = (), hidden: frozenset[int] = SPECIAL) -> str:
    """The definition: one decode of the ids that are text, unfinished last character dropped, cut at the first stop."""
    visible = [id for id in ids if id not in hidden]
    run = bytearray()
    for id in visible:
        byte = byte_of(id)
        run = run + bytes([byte]) if byte is not None else bytearray()
    visible = visible[: len(visible) - unfinished(bytes(run))]
    text = TOKENIZER.decode(visible, skip_special_tokens=False)
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


def stream(
    ids: list[int], stop: tuple[str, ...] = (), tokenizer=TOKENIZER, hidden=None
) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, stop, hidden)
    return [*(text.push(id) for id in ids), text.finish()], text


BYTES = st.one_of(
    st.sampled_from([character.encode() for character in ("😀", "é", "你", "佷", "\u0301", FAMILY)]),
    st.sampled_from(
        [b"\xe4\xbd", b"\xf0\x9f", b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xe0\x80"]
    ),
    st.binary(min_size=1, max_size=3),
)
PIECES = st.one_of(
    BYTES,
    BYTES,
    st.sampled_from(["hello", " world", " the", "a", "b", "c", "\n\n", "<h3>", "é", "e\u0301", "שלום", "你好", " "]),
    st.sampled_from(["<eos>", "<turn|>", "<|channel>"]),
)
IDS = st.lists(PIECES, max_size=12).map(lambda pieces: ids_of(*pieces))


@settings(max_examples=EXAMPLES, deadline=None)
@given(IDS)
def test_law_joined_stream_equals_one_shot_decode(ids):
    chunks, _ = stream(ids)
    assert "".join(chunks) == reply_text(ids)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(st.sampled_from([*"aabbc", "hello", " world", "stop", b"\xf0\x9f\x98\x80", b"\xe4\xbd"]), max_size=16),
    st.lists(st.text("abc", min_size=1, max_size=4) | st.sampled_from(["😀", "o wor", "stop", "\ufffd"]), max_size=4),
)
def test_law_text_ends_exactly_before_the_earliest_stop(pieces, stop):
    ids = ids_of(*pieces)
    chunks, text = stream(ids, tuple(stop))
    expected = reply_text(ids, tuple(stop))
    assert "".join(chunks) == expected
    assert text.stopped == (expected != reply_text(ids))
    assert text.matched in ([None] if not text.stopped else stop)


@settings(max_examples=EXAMPLES, deadline=None)
@given(IDS, st.lists(st.text("ab helo", min_size=1, max_size=5), max_size=3))
def test_law_nothing_is_held_back_but_open_bytes_and_a_proper_prefix_of_a_stop(ids, stop):
    text = TextStream(TOKENIZER, stop)
    given_out, visible, run = "", [], 0  # run: byte tokens at the end of `visible`
    for id in ids:
        given_out += text.push(id)
        if text.stopped:
            break
        if id not in SPECIAL:
            visible.append(id)
            run = 0 if byte_of(id) is None else run + 1
        settled = TOKENIZER.decode(visible[: len(visible) - run], skip_special_tokens=False)
        held = settled[len(given_out) :]
        assert not held or any(string.startswith(held) and string != held for string in stop)


# -- case 28: characters split over tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["😀", FAMILY, "e\u0301", "שלום", "你好世界", "佷", "a😀b😀", "x 😀 y", "🇩🇪", "\u0301", "👍🏽"],
)
def test_case_28_split_characters_arrive_whole(text):
    ids = ids_of(text.encode()) + ids_of(" the")
    chunks, _ = stream(ids)
    assert "".join(chunks) == text + " the"
    assert "\ufffd" not in "".join(chunks)


def test_case_28_a_space_token_inside_a_character_gives_what_one_shot_decode_gives():
    chunks, _ = stream(ids_of(b"\xe4\xbd", " the"))
    assert chunks == ["", "", "\ufffd\ufffd the", ""]


def test_case_28_invalid_bytes_never_stall_the_stream():
    ids = ids_of(b"\xff" * 50)
    chunks, _ = stream(ids)
    assert chunks == ["\ufffd"] * 50 + [""]


def test_case_28_one_wrong_byte_spoils_its_run_as_in_one_shot_decode():
    ids = ids_of("😀".encode() + b"\xff" + "😀".encode(), "a")
    chunks, _ = stream(ids)
    assert "".join(chunks) == TOKENIZER.decode(ids) == "\ufffd" * 9 + "a"
    assert chunks[:5] == ["", "", "", "", "\ufffd" * 5]


def test_byte_runs_go_on_across_ids_that_are_not_text():
    beyond = TOKENIZER.get_vocab_size() + 7  # a padded row of the embedding table
    first, last = ids_of(b"\xf0\x9f"), ids_of(b"\x98\x80")
    for between in (ids_of("<turn|>"), [beyond]):
        chunks, _ = stream([*first, *between, *last])
        assert "".join(chunks) == "😀"


# -- case 29: the limit falls inside a character ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_case_29_partial_bytes_at_the_end_are_dropped(count):
    ids = ids_of("hello", "😀".encode()[:count])
    chunks, _ = stream(ids)
    assert "".join(chunks) == "hello" == reply_text(ids)


def test_case_29_whole_characters_before_the_partial_one_stay():
    chunks, _ = stream(ids_of("😀é".encode() + b"\xf0\x9f"))
    assert "".join(chunks) == "😀é"


def test_case_29_stop_string_right_after_half_a_character():
    chunks, text = stream(ids_of("a", b"\xf0\x9f", "stop", "b"), ("stop",))
    assert "".join(chunks) == "a\ufffd\ufffd"
    assert text.matched == "stop"


# -- case 31: stop strings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["hello", "\nUs", "er:", " the"], ("\nUser:",), "hello"),  # over two pieces
        (["hello", "own", " f", "ox", "!"], ("own fox",), "hello"),  # over three
        (["hello"], ("hello world and more",), "hello"),  # longer than the answer: the held tail is delivered
        (["hello", " world"], ("hel",), ""),  # the first characters
        (["abcdx"], ("abc", "abcd"), ""),  # one is a prefix of the other
        (["abcabd"], ("abcd", "abd"), "abc"),
        (["x stop! y"], ("stop!",), "x "),  # inside, with text after it
        (["ABC", "DEF", "GHI", "J", "K"], ("DEFGHIJ",), "ABC"),
        (["ABC", "DEF", "GHI", "K"], ("DEFGHIJ",), "ABCDEFGHIK"),  # nearly
        (["aaa", "ab"], ("aab",), "aa"),  # the match overlaps a failed start
        (["abc", "X"], ("abcX", "bc"), ""),  # a longer one that began earlier
        (["abc", "Y"], ("abcX", "bc"), "a"),
        (["abc"], ("abcX", "bc"), "a"),
        (["hello"], (), "hello"),
    ],
)
def test_case_31_text_ends_exactly_before_the_match(pieces, stop, expected):
    ids = ids_of(*pieces)
    chunks, text = stream(ids, stop)
    assert "".join(chunks) == expected == reply_text(ids, stop)
    assert text.stopped == (expected != "".join(pieces))


def test_case_31_only_a_proper_prefix_tail_is_held_back():
    text = TextStream(TOKENIZER, ["DEFGHIJ"])
    assert [text.push(id) for id in ids_of(*"ABCDEFX")] == ["A", "B", "C", "", "", "", "DEFX"]


def test_case_31_the_held_tail_is_delivered_at_the_end():
    chunks, text = stream(ids_of(*"ABCDEF"), ("DEFGHIJ",))
    assert chunks[-1] == "DEF"
    assert not text.stopped
    assert text.matched is None


def test_ids_after_a_stop_give_no_text():
    chunks, _ = stream(ids_of(*"abcdef", b"\xff"), ("c",))
    assert chunks == ["a", "b", *[""] * 6]


@pytest.mark.parametrize("stop", [[""], ["a", ""], [None], [3]])
def test_stop_strings_must_be_text_that_is_not_empty(stop):
    with pytest.raises(PromptError, match=r"stop string \d is"):
        TextStream(TOKENIZER, stop)


def test_stop_strings_are_valid_unicode():
    with pytest.raises(PromptError, match="stop string 1: not valid Unicode at character 2"):
        check_stop(["a", "ab\ud800"])


def test_one_string_is_one_stop_string():
    chunks, _ = stream(ids_of("hello", " world"), "o w")  # type: ignore[arg-type]
    assert "".join(chunks) == "hell"


# -- ids that are not text -------------------------------------------------------------------------------------------


def test_case_26_the_turn_end_is_not_text():
    chunks, _ = stream(ids_of(*"Hi", "<turn|>"))
    assert "".join(chunks) == "Hi"


def test_hidden_ids_are_explicit():
    ids = ids_of("<loc0000>", "<loc1023>", " the", "<eos>")
    assert "".join(stream(ids)[0]) == " the"
    assert "".join(stream(ids, hidden=ids_of("<eos>"))[0]) == "<loc0000><loc1023> the"


# -- cost ------------------------------------------------------------------------------------------------------------


class CountingTokenizer:
    """Counts the ids that are handed to `decode`."""

    def __init__(self):
        self.decoded = 0

    def decode(self, ids, skip_special_tokens):
        self.decoded += len(ids)
        return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)

    id_to_token = functools.partialmethod(lambda self, id: TOKENIZER.id_to_token(id))
    get_added_tokens_decoder = functools.partialmethod(lambda self: TOKENIZER.get_added_tokens_decoder())


def test_each_id_is_decoded_at_most_once_in_a_long_reply():
    tokenizer = CountingTokenizer()
    ids = ids_of("hello", " the", "😀".encode(), b"\xff", "a") * 1250  # 10,000 ids
    chunks, _ = stream(ids, ("never", "\n\nUser:"), tokenizer)
    assert "".join(chunks) == reply_text(ids)
    assert len(ids) == 10_000
    assert tokenizer.decoded <= len(ids)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=5), min_size=30, max_size=60))
def test_law_many_stop_strings_end_the_text_as_each_alone_would(text, stop):
    """Of all stop strings the one that matches first."""
    ids = [id for letter in text for id in ids_of(letter)]
    many = TextStream(TOKENIZER, stop)
    found = "".join(map(many.push, ids)) + many.finish()
    assert found == min((reply_text(ids, (string,)) for string in stop), key=len)
    assert many.stopped == any(string in text for string in stop)


def test_stop_strings_in_one_form():
    assert check_stop("end") == check_stop(["end"]) == ("end",)
    assert check_stop(()) == ()


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.sampled_from([*"ab <>\n", "é", "世", "🦝"]), max_size=10))
def test_law_the_bytes_of_tokens_joined_are_the_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(TOKENIZER, id) for id in ids).decode() == text


def test_ids_without_text_have_no_bytes():
    assert token_bytes(TOKENIZER, TOKENIZER.get_vocab_size() + 5) == b""
    assert token_bytes(TOKENIZER, TOKENIZER.token_to_id("<0xFF>")) == b""


@pytest.mark.parametrize(
    "decoder",
    [
        pytest.param(decoders.Metaspace(), id="drops the space in front of the first token"),
        pytest.param(decoders.WordPiece(), id="puts spaces between tokens"),
        pytest.param(decoders.ByteLevel(), id="parts of characters"),
        pytest.param(
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), STRIP]),
            id="strips",
        ),
    ],
)
def test_a_decoder_that_reads_tokens_by_what_is_in_front_of_them_is_refused(decoder, tmp_path):
    """Streams would lose spaces, or characters, without a word."""
    tokenizer = toy_tokenizer()
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="token by token"):
        load_tokenizer(tmp_path / "tokenizer.json")
