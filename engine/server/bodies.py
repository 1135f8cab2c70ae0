"""The JSON bodies of requests: read within bounds, and taken apart field by field.

Nothing in a body is ignored. Each reader takes the fields it knows and then calls `Fields.finish`, which refuses the
rest by name.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from .beside import AT_ONCE, beside
from .failures import Failure, gone
from .long_texts import put_back, take_out
from .settings import Settings

__all__ = ["MAX_DEPTH", "MAX_VALUES", "Fields", "parse_object", "read_object"]

MAX_DEPTH = 100
"""Objects and lists inside one another."""

MAX_VALUES = 1_000_000
"""Values of one body, about: a million empty lists take 64 MB."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"(?<!^)(?=[A-Z])")


async def read_object(http: HttpRequest, settings: Settings) -> dict[str, Any]:
    """The JSON object that is the body of a request.

    Raises Failure: 415 for another type or an encoding, 413 over the limit (before the rest is read), 400 otherwise.
    """
    # A page in a browser can send other types to any address, this one included, without being asked first.
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Failure(415, f"the content type is {kind[:100]!r}, it must be application/json")
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise Failure(415, f"the content encoding is {encoding[:100]!r}, bodies are taken as they are")
    body = await _read(http, settings.body_bytes)
    if len(body) <= AT_ONCE:
        return parse_object(body)
    return await beside(partial(parse_object, body))


async def _read(http: HttpRequest, limit: int) -> bytearray:
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async for piece in http.stream():
            body += piece
            if len(body) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise gone() from None
    return body


def _too_large(limit: int) -> Failure:
    return Failure(413, f"the body is over the limit of {limit} bytes", kind="too_large")


def parse_object(body: bytes | bytearray) -> dict[str, Any]:
    """The object that JSON text in UTF-8 stands for, its numbers finite, its texts valid Unicode. Raises Failure.

    A byte order mark in front of it is passed over, as RFC 8259 lets parsers do: programs for Windows write one.
    """
    if body.startswith(codecs.BOM_UTF8):
        body = body[len(codecs.BOM_UTF8) :]
    try:
        rest, texts = take_out(body)
    except UnicodeDecodeError as error:
        raise _not_unicode(error) from None
    try:
        value = _parsed(rest)
    except Failure:
        if not texts:
            raise
        value = _parsed(body)  # which says where it is wrong
    if rest.count(b"[") + rest.count(b"{") > MAX_DEPTH or _SURROGATE.search(rest):
        _check(value)
    put_back(value, texts)
    return value


def _parsed(body: bytes | bytearray) -> dict[str, Any]:
    # Each value but the first has one of these characters in front of it; text has them too, base64 has none.
    values = sum(body.count(mark) for mark in (b",", b"[", b"{", b":"))
    if values > MAX_VALUES:
        raise Failure(400, f"the body has about {values} values, over the limit of {MAX_VALUES}")
    try:
        value = json.loads(
            body.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise Failure(400, f"the body is nested more than {MAX_DEPTH} deep") from None
    except UnicodeDecodeError as error:
        raise _not_unicode(error) from None
    except json.JSONDecodeError as error:
        raise Failure(400, f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:  # an integer of thousands of digits
        raise Failure(400, "the body has a number of too many digits") from None
    if not isinstance(value, dict):
        raise Failure(400, f"the body must be a JSON object, not {_kind(value)}")
    return value


def _not_unicode(error: UnicodeDecodeError) -> Failure:
    return Failure(400, f"the body is not UTF-8 at byte {error.start}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Failure(400, f"the body has the field {_short(twice)!r} twice in one object")
    return found


def _refuse_constant(name: str) -> float:
    raise Failure(400, f"the body is not JSON: {name} is not a number there")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Failure(400, f"the body has the number {_short(text)}, which is too large")
    return value


def _check(value: object) -> None:
    """Refuse what is nested too deep, and halves of characters."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for text in (text for item in level for text in _texts(item)):
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise Failure(400, f"the body has a text that is not valid Unicode: {text[:40]!a}") from None
        level = [inner for item in level for inner in _inner(item)]
        if not level:
            return
    raise Failure(400, f"the body is nested more than {MAX_DEPTH} deep")


def _texts(item: object) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict):
        yield from item


def _inner(item: object) -> Collection[object]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


class Fields:
    """A JSON object whose fields are taken one by one.

    A field that is absent or null gives None. Whatever is wrong with one raises Failure(400) that names its place, its
    value and what is allowed.
    """

    def __init__(self, data: dict[str, Any], place: str = "", *, both_cases: bool = False):
        """`place` is where the object is in the body, "" for the body itself. With `both_cases` a field that is asked
        for as "topP" may be spelt "top_p" too; given in both spellings it is refused. As Google's own parser does, it
        then also takes numbers that are written as texts, and choices in small letters."""
        self._data = data
        self._both_cases = both_cases
        self._taken: set[str] = set()
        self.place = place

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._data.get(self._spelling(name)) is not None

    def path(self, name: str) -> str:
        """The place of a field in the body, in the spelling of the caller."""
        spelling = self._spelling(name)
        return f"{self.place}.{spelling}" if self.place else spelling

    def failure(self, name: str, problem: str) -> Failure:
        """A Failure about a field, to be raised: "{path} {problem}"."""
        return Failure(400, f"{self.path(name)} {problem}", field=self.path(name))

    def missing(self, name: str) -> Failure:
        """A Failure, to be raised: the field is needed."""
        return self.failure(name, "is missing")

    def value(self, name: str) -> Any:
        """Whatever is there."""
        spelling = self._spelling(name)
        self._taken.add(spelling)
        return self._data.get(spelling)

    def text(self, name: str, most: int | None = None) -> str | None:
        """A text of at most `most` characters."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        if most is not None and len(value) > most:
            raise self.failure(name, f"has {len(value)} characters, over the limit of {most}")
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """An integer between `low` and `high`, both included."""
        value = self.value(name)
        if value is None:
            return None
        value = self._written(value)
        if isinstance(value, float) and value.is_integer():  # 1.0 is one; clients of typed languages write it so
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, f"an integer{_between(low, high)}")
        self._check_range(name, value, low, high)
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        """A number between `low` and `high`, both included."""
        value = self.value(name)
        if value is None:
            return None
        value = self._written(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, value, f"a number{_between(low, high)}")
        self._check_range(name, value, low, high)
        try:
            return float(value)
        except OverflowError:
            raise self.failure(name, f"is {_short(value)}, which is too large") from None

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def choice(self, name: str, values: Collection[str]) -> str | None:
        """One of `values`."""
        value = self.value(name)
        if self._both_cases and isinstance(value, str):
            value = next((each for each in values if each.lower() == value.lower()), value)
        if value is not None and (not isinstance(value, str) or value not in values):
            raise self._wrong(name, value, f"one of {', '.join(values)}")
        return value

    def list(self, name: str, most: int | None = None) -> list[Any] | None:
        """A list of at most `most` items, of whatever kind."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        if most is not None and len(value) > most:
            raise self.failure(name, f"has {len(value)} items, over the limit of {most}")
        return value

    def texts(self, name: str, most: int | None = None) -> list[str] | None:
        """A list of at most `most` texts."""
        items = self.list(name, most)
        for index, item in enumerate(items or ()):
            if not isinstance(item, str):
                raise self._wrong(name, item, "a text", f"[{index}]")
        return items

    def object(self, name: str) -> Fields | None:
        """An object."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Fields(value, self.path(name), both_cases=self._both_cases)

    def objects(self, name: str, most: int | None = None) -> list[Fields] | None:
        """A list of at most `most` objects."""
        items = self.list(name, most)
        if items is None:
            return None
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise self._wrong(name, item, "an object", f"[{index}]")
        return [
            Fields(item, f"{self.path(name)}[{index}]", both_cases=self._both_cases) for index, item in enumerate(items)
        ]

    def finish(self) -> None:
        """Refuse every field that was not taken."""
        unknown = [name for name in self._data if name not in self._taken]
        if unknown:
            places = [f"{self.place}.{_short(name)}" if self.place else _short(name) for name in unknown[:10]]
            verb = "is" if len(unknown) == 1 else "are"
            raise Failure(400, f"{', '.join(places)} {verb} not known", field=places[0])

    def _spelling(self, name: str) -> str:
        """The spelling of a name that the object has."""
        if not self._both_cases:
            return name
        other = _WORD.sub("_", name).lower()
        if other == name or other not in self._data:
            return name
        if name in self._data:
            place = f"{self.place}." if self.place else ""
            raise Failure(400, f"{place}{name} is given twice, also as {other}", field=place + name)
        return other

    def _written(self, value: object) -> object:
        """The number that a text stands for, where texts may."""
        if self._both_cases and isinstance(value, str) and len(value) <= 40 and _NUMBER.fullmatch(value):
            number = int(value) if value.lstrip("-").isdecimal() else float(value)
            return number if math.isfinite(number) else value
        return value

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            raise self.failure(name, f"is {_short(value)}, it must be{_between(low, high).removeprefix(' of')}")

    def _wrong(self, name: str, value: object, expected: str, index: str = "") -> Failure:
        shown = _short(value, quote=True) if isinstance(value, int | float | str) else _kind(value)
        place = self.path(name) + index
        return Failure(400, f"{place} is {shown}, expected {expected}", field=place)


def _between(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" between {low} and {high}"
    return f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _short(value: object, quote: bool = False) -> str:
    """A value for a message, not more than a line of it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = repr(value) if quote and isinstance(value, str) else str(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:59]}…"
