"""Google's form of schemas (a subset of OpenAPI 3.0) as JSON schemas.

What differs: types are in capitals, null is a property `nullable`, the order of properties a list, bounds may be text,
and an object has the properties it declares and no others.
"""

from __future__ import annotations

import re
from typing import Any

from ..bodies import Fields

__all__ = ["json_schema", "plain_schema"]

_TYPES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum")
_TEXTS = ("format", "title", "description", "pattern")
_LARGEST = 2**63 - 1
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,2})?")
# Formats that say how a number is stored. Of these only the integers bound its value.
_STORED = {"float": None, "double": None, "enum": None, "int32": 2**31, "int64": 2**63}


def plain_schema(schema: Fields) -> dict[str, Any]:
    """The schema with the keys and types of JSON Schema, and with Google's `nullable`, which chat templates know.

    Raises Failure for whatever Google's form does not have.
    """
    plain: dict[str, Any] = {}
    kind = schema.text("type")
    if kind is not None and kind.upper() != "TYPE_UNSPECIFIED":
        if kind.upper() not in _TYPES:
            raise schema.failure("type", f"is {kind[:40]!r}, expected one of {', '.join(_TYPES)}")
        plain["type"] = kind.lower()
    for name in _TEXTS:
        _put(plain, name, schema.text(name))
    _put(plain, "nullable", schema.flag("nullable"))
    for name in _COUNTS:
        _put(plain, name, _count(schema, name))
    for name in _BOUNDS:
        _put(plain, name, schema.number(name))
    enum = schema.texts("enum")
    if enum is not None:
        plain["enum"] = [_value_of(schema, plain.get("type"), text) for text in enum]
    for name in ("default", "example"):
        _put(plain, name, schema.value(name))
    items = schema.object("items")
    if items is not None:
        plain["items"] = plain_schema(items)
    choices = schema.objects("anyOf")
    if choices is not None:
        plain["anyOf"] = [plain_schema(choice) for choice in choices]
    _read_properties(schema, plain)
    _read_references(schema, plain)
    schema.finish()
    return plain


def _read_properties(schema: Fields, plain: dict[str, Any]) -> None:
    properties = _named(schema, "properties")
    order = schema.texts("propertyOrdering")
    if order is not None:
        unknown = next((name for name in order if name not in properties), None)
        if unknown is not None:
            raise schema.failure("propertyOrdering", f"has {unknown[:40]!r}, which is no property")
        properties = {name: properties[name] for name in [*order, *properties]}
    if "properties" in schema:
        plain["properties"] = properties
    _put(plain, "required", schema.texts("required"))
    if isinstance(schema.value("additionalProperties"), dict):
        others = schema.object("additionalProperties")
        assert others is not None
        plain["additionalProperties"] = plain_schema(others)
    else:
        _put(plain, "additionalProperties", schema.flag("additionalProperties"))


def _read_references(schema: Fields, plain: dict[str, Any]) -> None:
    definitions = _named(schema, "defs")
    if definitions:
        plain["$defs"] = definitions
    reference = schema.text("ref")
    if reference is not None:
        head, name, tail = reference.partition("#/defs/")
        if head or not name or not tail:
            raise schema.failure("ref", f"is {reference[:40]!r}, expected '#/defs/NAME'")
        plain["$ref"] = f"#/$defs/{tail}"


def _named(schema: Fields, name: str) -> dict[str, dict[str, Any]]:
    """An object of schemas, whose keys are names and not fields."""
    listed = schema.object(name)
    if listed is None:
        return {}
    # Names may be anything, "a_b" beside "aB" too, so that `listed` must not look for other spellings of them.
    exact = Fields(schema.value(name), listed.place)
    read: dict[str, dict[str, Any]] = {}
    for key in schema.value(name):
        inner = exact.object(key)
        if inner is None:
            raise exact.failure(key, "is null, expected an object")
        read[key] = plain_schema(Fields(exact.value(key), inner.place, both_cases=True))
    return read


def _put(plain: dict[str, Any], name: str, value: Any) -> None:
    if value is not None:
        plain[name] = value


def _count(schema: Fields, name: str) -> int | None:
    """A count; Google writes 64-bit integers as text."""
    value = schema.value(name)
    if isinstance(value, str) and _INTEGER.fullmatch(value) and 0 <= int(value) <= _LARGEST:
        return int(value)
    return schema.integer(name, 0, _LARGEST)


def _value_of(schema: Fields, kind: str | None, text: str) -> str | int | float:
    """A value of an enumeration, which Google writes as text whatever its type is."""
    if kind not in ("integer", "number"):
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if kind == "integer" or not _DECIMAL.fullmatch(text):
        raise schema.failure("enum", f"has {text[:40]!r}, which is no {kind}")
    return float(text)


def json_schema(plain: dict[str, Any]) -> dict[str, Any]:
    """What `plain_schema` read, as a JSON schema of what it allows."""
    schema = {name: value for name, value in plain.items() if name not in ("nullable", "example", "format")}
    bound = _STORED.get(plain.get("format", "enum"))
    if plain.get("format", "enum") not in _STORED:
        schema["format"] = plain["format"]
    if bound is not None and plain.get("type") == "integer":
        schema["minimum"] = max(schema.get("minimum", -bound), -bound)
        schema["maximum"] = min(schema.get("maximum", bound - 1), bound - 1)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            schema[name] = json_schema(schema[name])
    for name in ("properties", "$defs"):
        if name in schema:
            schema[name] = {key: json_schema(inner) for key, inner in schema[name].items()}
    if "anyOf" in schema:
        schema["anyOf"] = [json_schema(choice) for choice in schema["anyOf"]]
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return _or_null(schema) if plain.get("nullable") else schema


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or null. A reference to one of its own definitions keeps them at the same place."""
    definitions = {"$defs": schema.pop("$defs")} if "$defs" in schema else {}
    return {"anyOf": [schema, {"type": "null"}], **definitions}
