"""Random declarations that calls can be held to, and a model that writes at random."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import jsonschema_rs
import numpy as np
from hypothesis import strategies as st

from siglance.engine import Engine, Tool, ToolCall

from .scripted import ScriptedRuntime, scripted
from .tool_trees import names, texts

__all__ = ["declarations", "is_valid", "rambling"]

# Of times and addresses llguidance allows more: a leap second in any minute, names of any length; of dates the 29th of
# February in every year.
_FORMATS = ("date", "uuid", "ipv4")
_PATTERNS = ("^[a-c]{1,3}$", "x", "^é|[0-9]$", '^(a"b|\\\\)+$', "^$")


@st.composite
def _numbers(draw, kind: str) -> dict[str, Any]:
    """With bounds on no side, one or both."""
    values = st.integers(-(2**40), 2**40) | st.integers(-3, 3)
    if kind == "number":
        values = values | st.floats(-1e6, 1e6) | st.floats(-1, 1)
    low = draw(values)
    high = low + draw(st.integers(1, 100) | (st.floats(1e-3, 10) if kind == "number" else st.just(2)))
    schema: dict[str, Any] = {"type": kind}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = high + 1
    if kind == "integer" and draw(st.integers(0, 4)) == 0:
        schema["multipleOf"] = 1 if low + 1 >= high else draw(st.integers(1, 2))
    return schema


@st.composite
def _strings(draw) -> dict[str, Any]:
    limits = draw(st.sampled_from(["", "", "length", "least", "pattern", "format"]))
    least = draw(st.integers(0, 5))
    if limits == "length":
        return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 5))}
    if limits == "least":
        return {"type": "string", "minLength": least}
    if limits == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(_PATTERNS))}
    if limits == "format":
        return {"type": "string", "format": draw(st.sampled_from(_FORMATS))}
    return {"type": "string"}


_constants = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e20, 1e20) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=3,
)
_leaves = (
    _strings()
    | _numbers("integer")
    | _numbers("number")
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}, {"type": "object"}])
    | st.builds(lambda values: {"enum": values}, st.lists(_constants, min_size=1, max_size=3))
    | st.builds(lambda value: {"const": value, "description": "fixed"}, _constants)
    | st.just({"$ref": "#/$defs/tree"})
)
_TREE = {
    "type": "object",
    "properties": {
        "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
        "value": {"type": "integer"},
    },
    "required": ["value"],
    "additionalProperties": False,
}


@st.composite
def _arrays(draw, inner) -> dict[str, Any]:
    least = draw(st.integers(0, 3))
    schema: dict[str, Any] = {"type": "array"}
    if draw(st.booleans()):
        schema |= {"minItems": least, "maxItems": least + draw(st.integers(0, 2))}
    if draw(st.booleans()):
        schema["items"] = draw(inner)
    if draw(st.integers(0, 2)) == 0:
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=3))
        if "minItems" not in schema:
            schema["items"] = False
    return schema


@st.composite
def _objects(draw, inner) -> dict[str, Any]:
    properties = draw(st.dictionaries(texts | st.sampled_from(["a", "B", "b"]), inner, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [key for key in properties if draw(st.booleans())]
    if required:
        schema["required"] = required
    others = draw(st.sampled_from(["", "closed", "open", "schema"]))
    if others:
        schema["additionalProperties"] = {"closed": False, "open": True}.get(others, draw(inner))
    return schema


def _around(inner) -> st.SearchStrategy[dict[str, Any]]:
    choices = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    tagged = st.builds(
        lambda one, other: {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": kind}, "value": value}, "required": ["kind"]}
                for kind, value in (("one", one), ("other", other))
            ]
        },
        inner,
        inner,
    )
    whole = st.builds(lambda schema: {"allOf": [schema], "title": "t"}, inner)
    return _arrays(inner) | _objects(inner) | choices | tagged | whole


_schemas = st.recursive(_leaves, _around, max_leaves=4)
_parameters = _objects(_schemas).map(lambda schema: {**schema, "$defs": {"tree": _TREE}})


@st.composite
def declarations(draw) -> list[Tool]:
    """One to three tools."""
    found = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    return [Tool(name, "", draw(st.none() | _parameters), draw(st.booleans())) for name in found]


def is_valid(call: ToolCall, tools: Sequence[Tool]) -> bool:
    """Whether a call is of a tool that is declared, and its arguments are valid and declared."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return False
    schema = tool.parameters or {"type": "object"}
    if "additionalProperties" not in schema:
        known = {*schema.get("properties", {}), *schema.get("required", ())}
        if not call.arguments.keys() <= known:
            return False
    validator = jsonschema_rs.validator_for(dict(schema), validate_formats=True, formats={"date": _is_date})
    return validator.is_valid(json.loads(_text(call)))


def _is_date(text: str) -> bool:
    """Whether it is a date of a leap year, whatever its year is."""
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return False
    try:
        date.fromisoformat(f"2000{text[4:]}")
    except ValueError:
        return False
    return True


def _text(call: ToolCall) -> str:
    return json.dumps(dict(call.arguments))


class _Rambling(ScriptedRuntime):
    """Logits at random, the same for the same seed, that like what closes texts, values and calls more and more."""

    def __init__(self, engine: Engine, seed: int, wishes: Sequence[str]):
        super().__init__(engine.runtime, [0])
        self._seed = seed
        vocabulary = [
            engine._tokenizer.token_to_id(token) for token in (*wishes, '<|"|>', '"', "}", "]", "<tool_call|>")
        ]
        self._liked = [id for id in vocabulary if id is not None]

    def logits(self, run: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, run])
        logits = generator.standard_normal(self.vocabulary).astype(np.float32)
        logits[self._liked] += generator.uniform(0, min(2 + run / 50, 12), len(self._liked)).astype(np.float32)
        return logits


def rambling(engine: Engine, seed: int, *wishes: str) -> Engine:
    """The engine with a model that writes at random, and likes these tokens."""
    double, _ = scripted(engine, [0])
    double._runtime = _Rambling(engine, seed, wishes)  # pyright: ignore[reportAttributeAccessIssue]
    return double
