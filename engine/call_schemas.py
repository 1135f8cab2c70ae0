"""The JSON schemas of tools, read keyword by keyword: references, choices, types, bounds.

Schemas come from outside. Whatever is wrong with one, or cannot be held to, is a GrammarError that names the tool and
the place; the work for one tool is bounded.
"""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from .errors import GrammarError

__all__ = ["KEYWORDS", "Schema", "Schemas"]

Schema = Mapping[str, Any]

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
"""The keywords that are held to, by the type that they are about."""

_NOT_HELD = (
    *("not", "if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas"),
    *("contains", "minContains", "maxContains", "uniqueItems", "additionalItems", "unevaluatedItems"),
    *("patternProperties", "propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
_NO_EFFECT: dict[str, Any] = {"uniqueItems": False, "minProperties": 0, "patternProperties": {}}
_ASSERTIONS = frozenset(["type", "enum", "const", "anyOf", "oneOf", *_NOT_HELD]).union(*KEYWORDS.values())
_MAX_WORK = 50_000
_MAX_COUNT = 10**9
_LARGEST_INTEGER = 10**18
_LARGEST = 10**15 - 1
_STORED = {"int32": 2**31 - 1}  # Google's formats of integers
_STEP = Decimal("1e-12")  # from a bound below 1 that is not included


class Schemas:
    """The schema of one tool, and the schemas inside of it."""

    def __init__(self, name: str, root: Schema):
        self._name = name
        self._root = root
        self._work = 0

    def error(self, place: str, problem: str) -> GrammarError:
        """To be raised."""
        return GrammarError(f"tool {self._name}: {place}: {problem}")

    # --- references and choices

    def resolved(self, schema: Any, place: str) -> Schema | bool:
        """The schema without references and "allOf". Raises GrammarError for keywords that cannot be held to."""
        seen: set[str] = set()
        while isinstance(schema, Mapping) and ("$ref" in schema or "allOf" in schema):
            base = {key: value for key, value in schema.items() if key not in ("$ref", "allOf", "$defs", "definitions")}
            parts = [self.resolved(part, f"{place}.allOf") for part in self.list(schema, "allOf", place)]
            if "$ref" in schema:
                reference = schema["$ref"]
                target = self._referred(reference, place)
                if reference in seen:
                    raise self.error(place, f"{reference!r} refers to itself")
                seen.add(reference)
                parts.append(target)
            schema = base
            for part in parts:
                schema = self.merged(schema, part, place)
        self._count_work()
        self._check(schema, place)
        if isinstance(schema, Mapping):
            not_held = (key for key in schema if key in _NOT_HELD and schema[key] != _NO_EFFECT.get(key, ...))
            keyword = next(not_held, None)
            if keyword is not None:
                raise self.error(place, f"{keyword!r} cannot be held to in a call")
        return schema

    def choices(self, schema: Schema, place: str) -> list[Schema | bool] | None:
        """The schemas of "anyOf" or "oneOf", each with what stands beside it; None without these keywords."""
        keyword = next((key for key in ("anyOf", "oneOf") if key in schema), None)
        if keyword is None:
            return None
        base = {key: value for key, value in schema.items() if key != keyword}
        where = f"{place}.{keyword}"
        options = [
            self.merged(base, self.resolved(option, where), where) for option in self.list(schema, keyword, place)
        ]
        if keyword == "oneOf":
            for index, one in enumerate(options):
                if not all(self._disjoint(one, other, where) for other in options[:index]):
                    raise self.error(where, "a value could be valid by two of them; anyOf can be held to")
        return options

    def merged(self, one: Schema | bool, other: Any, place: str) -> Schema | bool:
        """A schema of what both allow."""
        self._check(other, place)
        if isinstance(one, bool) or isinstance(other, bool):
            return other if one is True else one if other is True else False
        merged = dict(one)
        if "additionalProperties" in {**one, **other} and "properties" in one and "properties" in other:
            raise self.error(place, "'additionalProperties' is not about the properties beside it alone")
        for key, value in other.items():
            if key not in merged or key not in _ASSERTIONS or _same(merged[key], value):
                merged[key] = value
            elif key == "type":
                merged[key] = [kind for kind in _listed(value) if kind in _listed(merged[key])]
                if not merged[key]:
                    return False
            elif key == "required":
                merged[key] = [*self.required(one, place), *self.required(other, place)]
            elif key == "properties" and not {*self.properties(one, place)} & {*self.properties(other, place)}:
                merged[key] = {**merged[key], **value}
            else:
                raise self.error(place, f"{key!r} is there twice, which cannot be held to")
        return merged

    def _referred(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self.error(place, f"the reference {str(reference)[:40]!r} leads out of the schema")
        found: Any = self._root
        for step in urllib.parse.unquote(reference).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isascii() and step.isdecimal() and int(step[:9]) < len(found):
                found = found[int(step[:9])]
            else:
                raise self.error(place, f"the reference {reference[:40]!r} leads to nothing")
        return found

    def _disjoint(self, one: Schema | bool, other: Schema | bool, place: str, depth: int = 4) -> bool:
        """Whether it can be told, looking into a few levels of objects, that no value is valid by both."""
        self._count_work()
        if isinstance(one, bool) or isinstance(other, bool):
            return one is False or other is False
        first, second = (set(self.types(schema, place) or TYPES) for schema in (one, other))
        if not _wider(first) & _wider(second):
            return True
        values, others = self.constants(one, place), self.constants(other, place)
        if values is not None and others is not None:
            return not any(value in others for value in values)
        if not depth or first != {"object"} or second != {"object"}:
            return False
        common = {*self.required(one, place)} & {*self.required(other, place)}
        fields, others = self.properties(one, place), self.properties(other, place)

        def field(properties: Schema, key: str) -> Schema | bool:
            return self.resolved(properties.get(key, True), place)

        return any(self._disjoint(field(fields, key), field(others, key), place, depth - 1) for key in common)

    # --- keywords

    def types(self, schema: Schema, place: str) -> list[str] | None:
        """The types that are named; else those that the keywords are about; None if there are none of these.

        A schema that names no type allows all others too. What its keywords are about is meant.
        """
        if "type" not in schema:
            about = [kind for kind in TYPES if kind != "integer" and any(key in schema for key in KEYWORDS[kind])]
            return about or None
        kinds = _listed(schema["type"])
        unknown = next((kind for kind in kinds if kind not in TYPES), None)
        if unknown is not None or not kinds:
            raise self.error(place, f"'type' is {str(schema['type'])[:40]!r}, expected {', '.join(TYPES)}")
        return [kind for kind in dict.fromkeys(kinds) if kind != "integer" or "number" not in kinds]

    def constants(self, schema: Schema, place: str) -> list[Any] | None:
        """The values of "enum" and "const" that are of a type that is named; None without these keywords."""
        if "enum" not in schema and "const" not in schema:
            return None
        values = self.list(schema, "enum", place) if "enum" in schema else [schema["const"]]
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        if "type" in schema:
            types = self.types(schema, place) or []
            values = [value for value in values if _is_of(value, types)]
        return values

    def list(self, schema: Schema, keyword: str, place: str) -> list[Any]:
        """A list, [] for none."""
        value = schema.get(keyword, [])
        if not isinstance(value, list):
            raise self.error(place, f"{keyword!r} is {str(value)[:40]!r}, expected a list")
        return value

    def required(self, schema: Schema, place: str) -> list[str]:
        names = self.list(schema, "required", place)
        if not all(isinstance(name, str) for name in names):
            raise self.error(place, "'required' is no list of names")
        return names

    def properties(self, schema: Schema, place: str) -> Schema:
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            raise self.error(place, f"'properties' is {str(properties)[:40]!r}, expected an object")
        return properties

    def counts(self, schema: Schema, least: str, most: str, place: str) -> tuple[int, int | None]:
        """The values of "minLength" and "maxLength", or "minItems" and "maxItems"."""
        found: list[int | None] = []
        for keyword in (least, most):
            value = schema.get(keyword)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise self.error(place, f"{keyword!r} is {str(value)[:40]!r}, expected an integer of 0 or more")
            found.append(None if value is None else math.ceil(min(value, _MAX_COUNT)))
        return found[0] or 0, found[1]

    def bounds(self, schema: Schema, kind: str, place: str) -> Schema | None:
        """The schema of numbers of a kind, with a lowest and a highest one; None for no numbers, {} for any.

        llguidance is exact with bounds of 15 digits. Those that have more, or are not included, are moved inside.
        """
        given: dict[str, int | float] = {}
        for key in _BOUNDS:
            value = schema.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise self.error(place, f"{key!r} is {str(value)[:40]!r}, expected a number")
            if value is not None:
                given[key] = value
        if kind == "integer":
            stored = _STORED.get(str(schema.get("format")))
            if not given and stored is None:
                return {}
            ends = _whole_ends(given, stored or _LARGEST_INTEGER)
        elif not given:
            return {}
        else:
            ends = _decimal_ends(given)
        if ends[0] > ends[1]:
            return None
        multiple = {"multipleOf": given["multipleOf"]} if "multipleOf" in given else {}
        return {"type": kind, "minimum": ends[0], "maximum": ends[1], **multiple}

    def _check(self, schema: Any, place: str) -> None:
        if not isinstance(schema, Mapping | bool):
            raise self.error(place, f"expected a schema, found {str(schema)[:40]!r}")

    def _count_work(self) -> None:
        self._work += 1
        if self._work > _MAX_WORK:
            raise GrammarError(f"tool {self._name}: its schema takes more than {_MAX_WORK} steps to resolve")


def _listed(types: Any) -> list[str]:
    return [str(kind).lower() for kind in (types if isinstance(types, list) else [types])]


def _wider(types: set[str]) -> set[str]:
    """With the integers that are among the numbers."""
    return types | {"integer"} if "number" in types else types


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _is_of(value: Any, types: Sequence[str]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" in types or ("integer" in types and value == int(value))
    names = {bool: "boolean", str: "string", type(None): "null", list: "array", dict: "object"}
    return names[type(value)] in types


def _whole_ends(given: Mapping[str, int | float], largest: int) -> tuple[int, int]:
    least, most = [-largest], [largest]
    for key, value in given.items():
        if key == "minimum":
            least.append(math.ceil(value))
        elif key == "exclusiveMinimum":
            least.append(math.floor(value) + 1)
        elif key == "maximum":
            most.append(math.floor(value))
        elif key == "exclusiveMaximum":
            most.append(math.ceil(value) - 1)
    return max(least), min(most)


def _decimal_ends(given: Mapping[str, int | float]) -> tuple[int | float, int | float]:
    least, most = [Decimal(-_LARGEST)], [Decimal(_LARGEST)]
    for key, value in given.items():
        if key in ("minimum", "exclusiveMinimum"):
            least.append(_inside(value, ROUND_CEILING, included=key == "minimum"))
        elif key in ("maximum", "exclusiveMaximum"):
            most.append(_inside(value, ROUND_FLOOR, included=key == "maximum"))
    low, high = (int(end) if end == int(end) else float(end) for end in (max(least), min(most)))
    return low, high


def _inside(value: int | float, rounding: str, *, included: bool) -> Decimal:
    """A bound in at most 15 digits; whatever number is within it, as it is written, is within the given one as a float.

    Rounding keeps the order, so only a bound that is not included needs a distance.
    """
    given = Decimal(value) if isinstance(value, int) else Decimal(repr(value))
    if abs(given) > _LARGEST + 1:
        return Decimal(_LARGEST + 1).copy_sign(given)
    small = abs(given) < 1
    bound = given.quantize(_STEP, rounding) if small else Context(prec=15, rounding=rounding).plus(given)
    if included or bound != given:
        return bound
    step = _STEP if small else Decimal((0, (1,), given.adjusted() - 14))
    return bound + step if rounding == ROUND_CEILING else bound - step
