"""A grammar of calls: what a model may write behind the token that begins one, so that its arguments are valid.

The call is in the format of `tool_format`: keys bare and sorted, texts between quote tokens. Two details differ from
what a chat template would write. A text that has a "pattern" or a "format" stands in double quotes, as in JSON, because
llguidance knows how to hold those to them, up to small print of formats (a leap second in any minute of a "time", the
29th of February in every year); readers of calls take both. And numbers are within what a reader can hold: 18 digits of
an integer, 15 before the point of any other number.

The grammar has no recursion: each rule knows how many objects and lists are around it, so that no call nests deeper
than it may. Equal rules are one.

A schema is held to as it stands, or more strictly. Keywords that cannot be held to are an error, those that describe
are not. Where a schema leaves open which keys an object has, it has those of "properties"; without these, any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .call_schemas import KEYWORDS, Schema, Schemas
from .errors import GrammarError
from .schema_checks import check_numbers
from .tool_format import is_bare, render_value
from .tools import Tool, key_order

__all__ = ["MAX_SCHEMA_BYTES", "call_grammar"]

MAX_SCHEMA_BYTES = 2**18
"""Of the schemas of all tools together."""

_DEPTH = 32  # objects and lists inside one another, below what readers take
_ANY_DEPTH = 4  # in a value of which nothing is declared
_MAX_RULES = 20_000

# Of keys that can stand bare those without odd white space.
_KEY = r"""/[^\s\x00-\x1f{}\[\],:"<]+( [^\s\x00-\x1f{}\[\],:"<]+)*/"""
_INTEGER = "/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/"


def call_grammar(tools: Sequence[Tool], *, quote: int, end: int, all_held: bool) -> str:
    """The grammar, in llguidance's variant of Lark's syntax.

    Args:
        tools: the functions that may be called.
        quote: id of the token around texts.
        end: id of the token that ends a call.
        all_held: whether the arguments of all are held to their schema, or only of those that are strict; the others'
            are an object then.

    Raises GrammarError for a schema that cannot be held to; the message names the tool and the place.
    """
    size = sum(len(json.dumps(tool.parameters)) for tool in tools)
    if size > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schemas of the tools have {size} bytes, the limit is {MAX_SCHEMA_BYTES}")
    rules = _Rules(quote)
    calls: list[str] = []
    for tool in tools:
        arguments = _Arguments(rules, tool).rule() if all_held or tool.strict else rules.any_object(0)
        calls.append(f"{_literal(f'call:{tool.name}')} {arguments} <[{end}]>")
    return "\n".join([f"start: {' | '.join(calls)}", *rules.lines])


class _Rules:
    """The rules of a grammar."""

    def __init__(self, quote: int):
        self._quote = f"<[{quote}]>"
        self._names: dict[str, str] = {}

    @property
    def lines(self) -> Iterator[str]:
        return (f"{name}: {body}" for body, name in self._names.items())

    def add(self, body: str, *, terminal: bool = False) -> str:
        """The name of a rule, or of a terminal."""
        name = self._names.get(body)
        if name is None:
            if len(self._names) == _MAX_RULES:
                raise GrammarError(f"the schemas of the tools need more than {_MAX_RULES} rules")
            name = self._names[body] = f"{'T' if terminal else 'r'}{len(self._names)}"
        return name

    def one_of(self, options: Sequence[str | None]) -> str | None:
        """A choice between the options that there are."""
        found = dict.fromkeys(option for option in options if option is not None)
        return self.add(" | ".join(found)) if found else None

    def quoted(self, text: str) -> str:
        return f"{self._quote} {text} {self._quote}"

    def exactly(self, value: Any) -> str:
        """A value as it is written."""
        pieces = enumerate(map(_literal, render_value(value)))
        return self.add(" ".join(self.quoted(piece) if place % 2 else piece for place, piece in pieces))

    def text(self, least: int = 0, most: int | None = None) -> str:
        """A text of so many characters."""
        repeated = "*" if (least, most) == (0, None) else _times(least, most)
        return self.add(self.quoted(self.add(f"/(?s:.{repeated})/", terminal=True)))

    def number(self, kind: str) -> str:
        return self.add(_INTEGER if kind == "integer" else _NUMBER, terminal=True)

    def json(self, schema: Schema) -> str:
        """What llguidance makes of a schema."""
        check_numbers(schema)
        return self.add(f"%json {json.dumps(schema)}")

    def any(self, depth: int, most: int = _ANY_DEPTH) -> str:
        """Any value inside of `depth` objects and lists, with at most `most` more inside of one another."""
        options = [self.text(), self.number("number"), '"true"', '"false"', '"null"']
        if most and depth < _DEPTH:
            inner = self.any(depth + 1, most - 1)
            options += [self.any_object(depth, most), self.add(f'"[" ({inner} ("," {inner})*)? "]"')]
        return self.add(" | ".join(options))

    def any_object(self, depth: int, most: int = _ANY_DEPTH) -> str:
        pair = self.pair((), self.any(depth + 1, most - 1))
        return self.add(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def declared_pair(self, key: str, value: str) -> str:
        written = _literal(f"{key}:") if is_bare(key) else f'{self.quoted(_literal(key))} ":"'
        return self.add(f"{written} {value}")

    def pair(self, taken: Sequence[str], value: str) -> str:
        """A key that is none of those that are taken, and a value."""
        but = " | ".join(_literal(key) for key in sorted(taken) if is_bare(key))
        key = self.add(f"{_KEY} & ~({but})" if but else _KEY, terminal=True)
        return self.add(f'{key} ":" {value}')


class _Arguments:
    """The rules of the arguments of one tool."""

    def __init__(self, rules: _Rules, tool: Tool):
        self._rules = rules
        self._root = dict(tool.parameters or {})
        self._schemas = Schemas(tool.name, self._root)
        self._known: dict[tuple[str, int], str | None] = {}
        self._open: set[tuple[str, int]] = set()
        self._kinds: dict[str, Callable[[Schema, int, str], str | None]] = {
            "string": self._string,
            "integer": lambda schema, depth, place: self._number("integer", schema, place),
            "number": lambda schema, depth, place: self._number("number", schema, place),
            "boolean": lambda schema, depth, place: rules.add('"true" | "false"'),
            "null": lambda schema, depth, place: '"null"',
            "array": self._array,
            "object": self._object,
        }

    def rule(self) -> str:
        schema = {**self._root, "type": "object"}
        if not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}:
            schema.setdefault("properties", {})  # a function that declares no arguments has none
        rule = self._value(schema, 0, "parameters")
        if rule is None:
            raise self._schemas.error("parameters", f"nothing of up to {_DEPTH} levels is valid")
        return rule

    def _value(self, schema: Any, depth: int, place: str) -> str | None:
        """The rule of values inside of `depth` objects and lists; None if there is no such value."""
        key = json.dumps(schema, sort_keys=True), depth
        if key in self._open:  # a choice of itself adds nothing
            return None
        if key not in self._known:
            self._open.add(key)
            self._known[key] = self._made(schema, depth, place)
            self._open.remove(key)
        return self._known[key]

    def _made(self, schema: Any, depth: int, place: str) -> str | None:
        rules, schemas = self._rules, self._schemas
        resolved = schemas.resolved(schema, place)
        if isinstance(resolved, bool):
            return rules.any(depth) if resolved else None
        choices = schemas.choices(resolved, place)
        if choices is not None:
            return rules.one_of([self._value(choice, depth, place) for choice in choices])
        types, constants = schemas.types(resolved, place), schemas.constants(resolved, place)
        if constants is not None:
            keywords = (key for kind in types or () for key in KEYWORDS[kind] if key in resolved and key != "format")
            beside = next(keywords, None)
            if beside is not None:
                raise schemas.error(place, f"{beside!r} beside a list of values cannot be held to")
            options: list[str | None] = [rules.exactly(value) for value in constants]
        elif types is None:
            return rules.any(depth)
        else:
            options = [self._kinds[kind](resolved, depth, place) for kind in types]
        if resolved.get("nullable") is True:  # OpenAPI's and Google's
            options.append('"null"')
        return rules.one_of(options)

    def _string(self, schema: Schema, depth: int, place: str) -> str | None:
        least, most = self._schemas.counts(schema, "minLength", "maxLength", place)
        if most is not None and least > most:
            return None
        if "pattern" in schema or schema.get("format") not in (None, "enum"):  # Google's "enum" says nothing
            kept = {key: schema[key] for key in KEYWORDS["string"] if key in schema}
            return self._rules.json({"type": "string", **kept})
        return self._rules.text(least, most)

    def _number(self, kind: str, schema: Schema, place: str) -> str | None:
        bounded = self._schemas.bounds(schema, kind, place)
        if bounded is None:
            return None
        return self._rules.json(bounded) if bounded else self._rules.number(kind)

    def _array(self, schema: Schema, depth: int, place: str) -> str | None:
        least, most = self._schemas.counts(schema, "minItems", "maxItems", place)
        if depth >= _DEPTH:
            return None
        first: list[str | None] = []
        for index, item in enumerate(self._schemas.list(schema, "prefixItems", place)):
            first.append(self._value(item, depth + 1, f"{place}.prefixItems[{index}]"))
        others = self._value(schema.get("items", True), depth + 1, f"{place}.items")
        if others is None or None in first:  # the list ends before that item
            room = len(first[: first.index(None)] if None in first else first)
            most = room if most is None else min(room, most)
        if most is not None and least > most:
            return None
        # What may follow the listed items, then these, from the last to the first.
        items = [item for item in first if item is not None][:most]
        before = max(len(items), 1)
        tail = ""
        if others is not None and (most is None or most > before):
            tail = f'("," {others}){_times(max(least - before, 0), None if most is None else most - before)}'
        if not items and most != 0:
            assert others is not None
            items = [others]
        for index in range(len(items) - 1, -1, -1):
            written = self._rules.add(f"""{'","' if index else ""} {items[index]} {tail}""".strip())
            tail = written if index < least else f"{written}?"
        return self._rules.add(f'"[" {tail} "]"')

    def _object(self, schema: Schema, depth: int, place: str) -> str | None:
        if depth >= _DEPTH:
            return None
        rules, required = self._rules, set(self._schemas.required(schema, place))
        open_to = schema.get("additionalProperties", "properties" not in schema)
        undeclared = schema.get("additionalProperties", True)
        declared = {**dict.fromkeys(required, undeclared), **self._schemas.properties(schema, place)}
        value = self._value(open_to, depth + 1, f"{place}.additionalProperties")
        other = None if value is None else rules.pair(list(declared), value)
        # What follows a pair, and the pairs where none stands before them, from the last key to the first.
        rest = "" if other is None else f'("," {other})*'
        pairs = None if other is None else rules.add(f"{other} {rest}")
        for key in sorted(declared, key=key_order, reverse=True):
            inner = self._value(declared[key], depth + 1, f"{place}.{key}")
            if inner is None and key in required:
                return None
            if inner is None:
                continue
            pair = rules.declared_pair(key, inner)
            begun = f"{pair} {rest}"
            pairs = rules.add(begun if key in required or pairs is None else f"{begun} | {pairs}")
            rest = rules.add(f'"," {begun}' if key in required else f'("," {pair})? {rest}')
        if pairs is None:
            return rules.add('"{" "}"')
        return rules.add(f'"{{" {pairs}{"" if required else "?"} "}}"')


def _literal(text: str) -> str:
    return json.dumps(text)  # a text of Lark is written like one of JSON, and has no control characters as they are


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"
