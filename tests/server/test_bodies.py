"""Bodies of requests: what is read, what is refused, and that nothing in one is ignored."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from siglance.engine.server.bodies import MAX_DEPTH, MAX_VALUES, Fields, parse_object, read_object
from siglance.engine.server.failures import Failure
from siglance.engine.server.settings import Settings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(*pieces: bytes, most: int = 1000, ends: bool = True, **headers: str) -> dict:
    """Read a body that arrives in pieces; one that does not end is left by its client."""
    given = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request"} if ends else {"type": "http.disconnect"})
    raw = [(name.encode(), value.encode()) for name, value in given.items()]

    async def receive():
        return messages.pop(0)

    http = Request({"type": "http", "method": "POST", "path": "/", "headers": raw, "query_string": b""}, receive)
    return asyncio.run(read_object(http, Settings(body_bytes=most)))


def failure_of(body: bytes, **headers: str) -> Failure:
    with pytest.raises(Failure) as caught:
        read(body, **headers)
    return caught.value


@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_what_json_writes_is_read(value, ascii_only):
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8e1-.truefalsn \n', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_a_failure_of_the_caller(body):
    try:
        value, status = parse_object(body), 400
    except Failure as failure:
        value, status = {}, failure.status
    assert (type(value), status) == (dict, 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value at line 1, column 1"),
        (b"{", "not JSON"),
        (b'{"a": 1}x', "not JSON: Extra data"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
        (b"\xfe\xff\x00{\x00}", "not UTF-8 at byte 0"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b"true", "not true or false"),
        (b"3", "not a number"),
        (b'"a"', "not a text"),
        (b'{"a": NaN}', "NaN is not a number there"),
        (b'{"a": -Infinity}', "-Infinity is not a number there"),
        (b'{"a": 1e400}', "1e400, which is too large"),
        (b'{"a": -1e400}', "-1e400, which is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the field 'c' twice"),
        (b'{"\\ud800": 1, "\\ud800": 2}', r"the field '\ud800' twice"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', r"not valid Unicode: '\ud800'"),
        (b'{"a": {"x\\udfff": 1}}', "not valid Unicode"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", f"nested more than {MAX_DEPTH} deep"),
        (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", f"nested more than {MAX_DEPTH} deep"),
        (b'{"a": ' * 90_000, f"nested more than {MAX_DEPTH} deep"),
    ],
)
def test_what_is_refused_says_why(body, message):
    with pytest.raises(Failure) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.kind) == (400, "invalid")
    assert message in caught.value.message


def test_a_byte_order_mark_is_passed_over():
    assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


LONG = "iVBORw0KGgo=" * 9000


@pytest.mark.parametrize(
    "value",
    [
        {"a": LONG},
        {"a": [LONG, LONG[1:], "x", {"b": LONG}], "c": LONG[:70_000]},
        {LONG: 1, "a": LONG},
        {"a": '"' + LONG},
        {"a": "\\" + LONG, "b": LONG + "\\"},
        {"a": 'q"' + LONG, "b": LONG + '"', "c": LONG + "\n"},
        {"a": " " * 70_000 + LONG},
        {"a": "words, of: a [text] {that} goes on " * 3000},
        {"a": "Wörter " * 20_000, "b": 1},
        {"a": ["x"] * 30_000 + [LONG]},
    ],
    ids=range(10),
)
@pytest.mark.parametrize("indent", [None, 3])
def test_long_texts_are_what_json_says(value, indent):
    for ascii_only in (True, False):
        assert parse_object(bytearray(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode())) == value


def without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("twice in one object")
    return dict(pairs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text('{}[]",:\\ a1\n', max_size=12), st.integers(0, 3)), max_size=5))
def test_long_runs_anywhere_change_nothing(pieces):
    """Whatever stands around a long run of letters: what Python's own parser says, this one says."""
    body = ('{"a":"' + "".join(text + "xY" * (40_000 * (size == 3)) for text, size in pieces) + '"}').encode()
    try:
        expected = json.loads(body, object_pairs_hook=without_doubles)
    except ValueError as error:
        with pytest.raises(Failure, match=re.escape(getattr(error, "msg", str(error)))):
            parse_object(body)
    else:
        assert parse_object(body) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f'{{"a": "{LONG}", "b": }}', f"Expecting value at line 1, column {len(LONG) + 16}"),
        (f'{{"a": "x"{LONG}"y"}}', "Expecting ',' delimiter at line 1, column 10"),
        (f'{{"a": "{LONG}\n"}}', "Invalid control character"),
        (f'"{LONG}"', "must be a JSON object, not a text"),
        (f'{{"a": "{LONG}', "Unterminated string"),
        ('{"a": "' + "x" * 80_000 + "\udcff" + '"}', "not UTF-8 at byte 80007"),
    ],
)
def test_bodies_with_long_texts_are_refused_at_their_place(body, message):
    with pytest.raises(Failure) as caught:
        parse_object(body.encode("utf-8", "surrogateescape"))
    assert message in caught.value.message


def test_a_pair_of_surrogates_is_one_character():
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_depth_is_counted_and_not_width():
    assert parse_object(b'{"a": ' + b"[" * 98 + b"]" * 98 + b"}")
    assert len(parse_object(b'{"a": [' + b"[]," * 5000 + b"[]]}")["a"]) == 5001


def test_a_body_of_very_many_values_is_refused_unread():
    with pytest.raises(Failure, match=f"about {MAX_VALUES + 2} values, over the limit of {MAX_VALUES}"):
        parse_object(b'{"a":[' + b"1," * (MAX_VALUES - 1) + b"1]}")


def test_a_body_arrives_in_pieces():
    assert read(b'{"a"', b"", b": 1}") == {"a": 1}


def test_a_large_body_is_parsed_too():
    assert len(read(b'{"a": "' + b"x" * 300_000 + b'"}', most=10**6)["a"]) == 300_000


def test_the_limit_is_in_the_message_and_no_more_is_read():
    with pytest.raises(Failure, match="over the limit of 1000 bytes") as caught:
        read(b"x" * 600, b"x" * 600, ends=False)
    assert (caught.value.status, caught.value.kind) == (413, "too_large")


def test_a_length_over_the_limit_is_refused_before_the_body():
    assert failure_of(b"", content_length="1001").status == 413
    assert failure_of(b"", content_length="9" * 400).status == 413
    assert failure_of(b"", content_length="junk").status == 400


def test_a_client_that_leaves_in_the_middle():
    with pytest.raises(Failure) as caught:
        read(b'{"a"', ends=False)
    assert (caught.value.status, caught.value.kind) == (499, "gone")


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonl", "x" * 500]
)
def test_other_types_are_refused(kind):
    failure = failure_of(b"{}", content_type=kind)
    assert failure.status == 415
    assert "application/json" in failure.message
    assert len(failure.message) < 200


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", " application/json "])
def test_spellings_of_the_right_type(kind):
    assert read(b"{}", content_type=kind) == {}


def test_encoded_bodies_are_refused():
    assert failure_of(b"{}", content_encoding="gzip").status == 415
    assert read(b"{}", content_encoding="identity") == {}


# --- fields


def fields(**data: object) -> Fields:
    return Fields(data)


def message_of(take, *arguments: object) -> str:
    with pytest.raises(Failure) as caught:
        take(*arguments)
    assert caught.value.status == 400
    return caught.value.message


TAKES = ("text", "integer", "number", "flag", "list", "texts", "object", "objects", "value")


@pytest.mark.parametrize("take", TAKES)
def test_absent_and_null_are_none(take):
    given = fields(there=None)
    assert getattr(given, take)("there") is None
    assert getattr(given, take)("missing") is None
    assert "there" not in given
    given.finish()


def test_null_is_a_choice_of_nothing():
    assert fields(a=None).choice("a", ("x",)) is None


@pytest.mark.parametrize(
    ("take", "value", "expected"),
    [
        ("text", 1, "a is 1, expected a text"),
        ("text", True, "a is true, expected a text"),
        ("text", {}, "a is an object, expected a text"),
        ("integer", True, "a is true, expected an integer"),
        ("integer", "10", "a is '10', expected an integer"),
        ("integer", 1.5, "a is 1.5, expected an integer"),
        ("integer", [1], "a is a list, expected an integer"),
        ("number", False, "a is false, expected a number"),
        ("number", "0.5", "a is '0.5', expected a number"),
        ("number", 10**400, f"a is 1{'0' * 58}…, which is too large"),
        ("flag", 1, "a is 1, expected true or false"),
        ("flag", "true", "a is 'true', expected true or false"),
        ("list", {}, "a is an object, expected a list"),
        ("texts", ["x", 1], "a[1] is 1, expected a text"),
        ("texts", "x", "a is 'x', expected a list"),
        ("object", [], "a is a list, expected an object"),
        ("object", "x" * 100, f"a is '{'x' * 58}…, expected an object"),
        ("objects", [{}, None], "a[1] is null, expected an object"),
    ],
)
def test_wrong_kinds(take, value, expected):
    assert message_of(getattr(fields(a=value), take), "a") == expected


def test_ranges_name_value_and_limits():
    given = fields(a=0, b=10**9, c=-0.5, d=2.5, e=10**4299)
    assert message_of(given.integer, "a", 1, 5) == "a is 0, it must be between 1 and 5"
    assert message_of(given.integer, "b", 1, 1024) == "b is 1000000000, it must be between 1 and 1024"
    assert message_of(given.number, "c", 0.0) == "c is -0.5, it must be at least 0.0"
    assert message_of(given.number, "d", None, 2.0) == "d is 2.5, it must be at most 2.0"
    assert message_of(given.integer, "e", 0, 9).startswith("e is 1000")
    assert given.integer("b") == 10**9
    assert given.number("d", 2.5, 2.5) == 2.5


def test_whole_numbers_are_integers_however_they_are_written():
    found = fields(a=3.0, b=1e300, c=2)
    assert found.integer("a") == 3
    assert isinstance(found.integer("a"), int)
    assert isinstance(found.number("c"), float)
    assert message_of(found.integer, "b", 0, 10).startswith("b is 1000")


def test_bounds_of_texts_and_lists():
    given = fields(a="abcd", b=[1, 2, 3])
    assert message_of(given.text, "a", 3) == "a has 4 characters, over the limit of 3"
    assert message_of(given.list, "b", 2) == "b has 3 items, over the limit of 2"
    assert message_of(given.texts, "b", 3) == "b[0] is 1, expected a text"


def test_choices_are_listed():
    given = fields(a="mp4", b=["png"])
    assert given.choice("a", ("mp4", "webm")) == "mp4"
    assert message_of(given.choice, "a", ("wav", "mp3")) == "a is 'mp4', expected one of wav, mp3"
    assert message_of(given.choice, "b", ("png",)) == "b is a list, expected one of png"


def test_every_field_that_was_not_taken_is_refused_by_name():
    part = Fields({"parts": [{"text": "x"}, {"videoMetadatas": 1}]}, "contents[0]").objects("parts")
    assert part is not None
    part[0].text("text")
    part[0].finish()
    with pytest.raises(Failure) as caught:
        part[1].finish()
    assert caught.value.message == "contents[0].parts[1].videoMetadatas is not known"
    assert caught.value.field == "contents[0].parts[1].videoMetadatas"
    assert message_of(fields(a=1, b=2).finish) == "a, b are not known"
    assert len(message_of(Fields({f"{'x' * 1000}{index}": 1 for index in range(1000)}).finish)) < 1000


def test_nulls_that_were_not_taken_are_refused_too():
    assert message_of(fields(a=None).finish) == "a is not known"


def test_places_of_inner_fields():
    inner = fields(generationConfig={"thinkingConfig": {"budget": "x"}}).object("generationConfig")
    assert inner is not None
    thinking = inner.object("thinkingConfig")
    assert thinking is not None
    with pytest.raises(Failure) as caught:
        thinking.integer("budget")
    assert caught.value.field == "generationConfig.thinkingConfig.budget"
    assert thinking.missing("depth").message == "generationConfig.thinkingConfig.depth is missing"


def test_both_spellings():
    snake = Fields({"top_p": 0.5, "response_json_schema": {"max_items": 1}}, both_cases=True)
    assert snake.number("topP") == 0.5
    assert snake.path("topP") == "top_p"
    schema = snake.object("responseJsonSchema")
    assert schema is not None
    assert schema.integer("maxItems") == 1
    snake.finish()
    camel = Fields({"topP": 0.5}, both_cases=True)
    assert "topP" in camel
    assert camel.number("topP") == 0.5
    camel.finish()


def test_one_field_in_both_spellings_is_refused():
    given = Fields({"topP": 0.5, "top_p": 0.6}, "generationConfig", both_cases=True)
    assert message_of(given.number, "topP") == "generationConfig.topP is given twice, also as top_p"


def test_only_the_one_spelling_otherwise():
    given = fields(top_p=0.5)
    assert given.number("topP") is None
    assert message_of(given.finish) == "top_p is not known"
