"""Function calling in Gemma 4's own format: declarations, calls and responses as text, and calls back to data.

    declaration:NAME{description:"...",parameters:{properties:{...},required:[...],type:"OBJECT"}}
    call:NAME{key:value,...}
    response:NAME{key:value,...}

Values are objects with bare, sorted keys, lists, strings, numbers, `true`, `false` and `null` (`None` in older chat
templates). Strings stand between two quote tokens; there is no escape. So a text in this format is not one string but
*segments*, the pieces between its quote tokens: those at odd places are strings, exactly as they are, those at even
places are everything else. A string may hold whatever it likes then, the spelling of the quote token included, and no
reader has to search for its end.

Prompts are written by the checkpoint's own chat template; what is rendered here is what that template is held to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .tools import MAX_DEPTH, NAME, Tool, ToolCall, ToolResult, key_order

__all__ = [
    "CONTROL_TOKENS",
    "QUOTE",
    "CallError",
    "is_bare",
    "parse",
    "parse_call",
    "render_call",
    "render_declaration",
    "render_response",
    "render_value",
]

QUOTE = '<|"|>'
CONTROL_TOKENS = ("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", QUOTE)
"""Tokens of the format. Whatever a tokenizer says about them, they are never text."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_SPACE = re.compile(r"\s*")
_BARE_VALUE = re.compile(r"[^\s,:{}\[\]\"]*")
_NEVER_BARE = frozenset('{}[],:"\n\r')
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_JSON = json.JSONDecoder(strict=False)


class CallError(ValueError):
    """Why a text is not in the format. Never leaves the engine: it becomes the reason of a `MalformedCall`."""


# --- writing


def render_declaration(tool: Tool) -> list[str]:
    """Segments of what stands between `<|tool>` and `<tool|>`."""
    fields: dict[str, Any] = {"description": tool.description}
    if tool.parameters is not None:
        fields["parameters"] = _upper_types(tool.parameters)
    return _render(f"declaration:{tool.name}", fields)


def render_call(call: ToolCall) -> list[str]:
    """Segments of what stands between `<|tool_call>` and `<tool_call|>`; `parse_call` gives the call back."""
    return _render(f"call:{call.name}", call.arguments)


def render_response(result: ToolResult) -> list[str]:
    """Segments of what stands between `<|tool_response>` and `<tool_response|>`."""
    return _render(f"response:{result.name}", result.fields)


def render_value(value: Any) -> list[str]:
    """Segments of a value inside of any of them."""
    return _render("", value)


def _upper_types(schema: Any) -> Any:
    """A JSON schema with its types in capitals, where they are types and not names of properties or data."""
    if not isinstance(schema, Mapping):
        return schema
    written: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "type":
            written[key] = [str(one).upper() for one in value] if isinstance(value, list) else str(value).upper()
        elif key in ("properties", "$defs") and isinstance(value, Mapping):
            written[key] = {name: _upper_types(inner) for name, inner in value.items()}
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            written[key] = [_upper_types(inner) for inner in value]
        elif key in ("items", "additionalProperties"):
            written[key] = _upper_types(value)
        else:
            written[key] = value
    return written


def _render(head: str, value: Any) -> list[str]:
    writer = _Writer()
    writer.bare(head)
    writer.value(value)
    return ["".join(pieces) for pieces in writer.segments]


class _Writer:
    """Collects the pieces of each segment."""

    def __init__(self) -> None:
        self.segments: list[list[str]] = [[]]

    def bare(self, text: str) -> None:
        self.segments[-1].append(text)

    def string(self, text: str) -> None:
        self.segments += [[text], []]

    def value(self, value: Any) -> None:
        if isinstance(value, str):
            self.string(value)
        elif isinstance(value, Mapping):
            self.bare("{")
            for index, key in enumerate(sorted(value, key=key_order)):
                self.bare("," if index else "")
                (self.bare if is_bare(key) else self.string)(key)
                self.bare(":")
                self.value(value[key])
            self.bare("}")
        elif isinstance(value, list):
            self.bare("[")
            for index, item in enumerate(value):
                self.bare("," if index else "")
                self.value(item)
            self.bare("]")
        else:
            self.bare("null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value))


def is_bare(key: str) -> bool:
    """Whether a key can stand without quotes and be read again."""
    return bool(key) and key == key.strip() and not _NEVER_BARE.intersection(key)


# --- reading


def parse_call(segments: Sequence[str], *, held: bool = False) -> ToolCall:
    """The call that segments spell. Raises CallError with the reason why they do not.

    One that was `held` to a grammar may have a key twice where any keys are allowed, because no grammar knows which
    there have been; the last value counts then, as in JSON.
    """
    name, arguments = parse(segments, "call", held=held)
    return ToolCall(name, arguments)


def parse(segments: Sequence[str], kind: str, *, held: bool = False) -> tuple[str, dict[str, Any]]:
    """The name and the fields of `kind:NAME{...}`, in time that is linear in the length of the text.

    White space between tokens, keys in quotes and strings in the manner of JSON are accepted: models write them.
    Raises CallError for everything else that is not in the format.
    """
    reader = _Reader(segments, held)
    reader.expect(f"{kind}:")
    name = reader.name()
    fields = reader.value(0)
    reader.end()
    return name, fields


class _Reader:
    """A place in segments."""

    def __init__(self, segments: Sequence[str], held: bool):
        if len(segments) % 2 == 0:
            raise CallError("a string has no end")
        self._segments = segments
        self._held = held
        self._index = 0  # always that of a segment outside of strings
        self._at = 0

    @property
    def _text(self) -> str:
        return self._segments[self._index]

    def _peek(self) -> str:
        """The next character behind white space; QUOTE before a string, "" at the end."""
        self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess] - matches anywhere
        if self._at < len(self._text):
            return self._text[self._at]
        return QUOTE if self._index + 1 < len(self._segments) else ""

    def _fail(self, wanted: str) -> NoReturn:
        found = self._peek()
        shown = {"": "the end", QUOTE: "a string"}.get(found) or repr(self._text[self._at : self._at + 20])
        raise CallError(f"expected {wanted}, found {shown}")

    def expect(self, text: str) -> None:
        self._peek()
        if not self._text.startswith(text, self._at):
            self._fail(repr(text))
        self._at += len(text)

    def name(self) -> str:
        end = self._text.find("{", self._at)
        if end < 0:
            self._at = len(self._text)
            self._fail("'{' behind the name")
        name, self._at = self._text[self._at : end].strip(), end
        if not NAME.fullmatch(name):
            raise CallError(f"{_short(name)} is not the name of a function")
        return name

    def end(self) -> None:
        if self._peek():
            self._fail("the end")

    def value(self, depth: int) -> Any:
        next = self._peek()
        if next in ("{", "["):
            if depth == MAX_DEPTH:
                raise CallError(f"more than {MAX_DEPTH} objects and lists inside one another")
            self._at += 1
            return self._object(depth + 1) if next == "{" else self._list(depth + 1)
        if next == QUOTE:
            return self._string()
        if next == '"':
            return self._json_string()
        return self._bare_value()

    def _object(self, depth: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._takes("}"):
            return fields
        while True:
            key = self._key()
            if key in fields and not self._held:
                raise CallError(f"the key {_short(key)} occurs twice in one object")
            self.expect(":")
            fields[key] = self.value(depth)
            if self._takes("}"):
                return fields
            self._comma("'}'")

    def _list(self, depth: int) -> list[Any]:
        items: list[Any] = []
        if self._takes("]"):
            return items
        while True:
            items.append(self.value(depth))
            if self._takes("]"):
                return items
            self._comma("']'")

    def _takes(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _comma(self, close: str) -> None:
        if not self._takes(","):
            self._fail(f"',' or {close}")

    def _string(self) -> str:
        string = self._segments[self._index + 1]
        self._index, self._at = self._index + 2, 0
        return string

    def _json_string(self) -> str:
        try:
            string, self._at = _JSON.raw_decode(self._text, self._at)
            string.encode()
        except ValueError as error:  # also UnicodeEncodeError, for half of a surrogate pair
            raise CallError(f"a string in double quotes cannot be read: {error}") from None
        return string

    def _key(self) -> str:
        next = self._peek()
        if next == QUOTE:
            return self._string()
        if next == '"':
            return self._json_string()
        end = self._text.find(":", self._at)
        if end < 0:
            self._fail("a key and ':'")
        key = self._text[self._at : end].rstrip()
        if not is_bare(key):
            raise CallError(f"{_short(key)} is not a key")
        self._at = end
        return key

    def _bare_value(self) -> Any:
        match = _BARE_VALUE.match(self._text, self._at)
        assert match is not None
        word = match.group()
        if not word:
            self._fail("a value")
        if word in _WORDS:
            value = _WORDS[word]
        elif _FLOAT.fullmatch(word):
            value = _number(word)
        else:
            raise CallError(f"{_short(word)} is not a value (text stands between quote tokens)")
        self._at = match.end()
        return value


def _number(word: str) -> int | float:
    try:
        number = int(word) if _INTEGER.fullmatch(word) else float(word)
    except ValueError:  # Python's limit, 4,300 digits
        raise CallError(f"the number {_short(word)} is too long") from None
    if not math.isfinite(number):
        raise CallError(f"the number {_short(word)} is out of range")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
