"""Random tools, calls and results, and how a declaration reads back."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from siglance.engine.tool_format import CONTROL_TOKENS, QUOTE
from siglance.engine.tools import Tool, ToolCall, ToolResult

# Whatever could be taken for a part of the format, beside ordinary text.
_AWKWARD = (
    *(
        "",
        " ",
        "\n",
        " \n ",
        "{",
        "}",
        "[]",
        ":",
        ",",
        "a:1",
        '"',
        "\\",
        "\\u0041",
        "''",
        "null",
        "None",
        "true",
        "1e5",
    ),
    *("-", "<", "<|", '<|"', '"|>', "call:f{a:1}", "<turn|>", "<bos>", "<|image|>", "\u2028", "\ufeff", "\x00", "\x1f"),
    *("é", "e\u0301", "日本語", "🦝", "שלום", "\ue000", "\U0010ffff", "description", "type", "properties", "required"),
    *CONTROL_TOKENS,
    f"say {QUOTE}hello{QUOTE} to 'them'",
)
_awkward = st.sampled_from(_AWKWARD)
texts = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | _awkward
    | st.tuples(_awkward, _awkward).map("".join)
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
trees = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=6
)
objects = st.dictionaries(texts, trees, max_size=5)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,20}", fullmatch=True)
calls = st.builds(ToolCall, names, objects)
results = st.builds(ToolResult, names, trees)

_types = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null"])


def _schemas(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas around other schemas; names of properties are any text, those of keywords included."""
    optional = {
        "type": _types | st.lists(_types, min_size=1, max_size=2),
        "description": texts,
        "enum": st.lists(trees, max_size=3),
        "default": trees,
        "nullable": st.booleans(),
        "properties": st.dictionaries(texts | st.just("type"), inner, max_size=3),
        "required": st.lists(texts, max_size=3),
        "items": inner,
        "additionalProperties": inner | st.booleans(),
        "anyOf": st.lists(inner, max_size=2),
    }
    return st.fixed_dictionaries({}, optional=optional)


schemas = st.recursive(st.fixed_dictionaries({"type": _types}, optional={"description": texts}), _schemas, max_leaves=5)
_parameters = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(texts, schemas, max_size=4),
        "required": st.lists(texts, max_size=3),
    },
)
tools = st.builds(Tool, names, texts, st.none() | _parameters)


def tool_of(name: str, fields: dict[str, Any]) -> Tool:
    """The tool of a declaration that was read: what capitals have become is undone where a type stands."""
    return Tool(name, fields["description"], _lower_types(fields.get("parameters")))


def _lower_types(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    lowered = dict(schema)
    if "type" in schema:
        kind = schema["type"]
        lowered["type"] = kind.lower() if isinstance(kind, str) else [one.lower() for one in kind]
    if "properties" in schema:
        lowered["properties"] = {name: _lower_types(inner) for name, inner in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            lowered[key] = _lower_types(schema[key])
    if "anyOf" in schema:
        lowered["anyOf"] = [_lower_types(inner) for inner in schema["anyOf"]]
    return lowered


def keys_of(value: Any) -> list[str]:
    """All keys inside of a value."""
    if isinstance(value, dict):
        return [*value, *(key for inner in value.values() for key in keys_of(inner))]
    return [key for inner in value for key in keys_of(inner)] if isinstance(value, list) else []


def same(one: Any, other: Any) -> bool:
    """Equal in types too: 1 is neither 1.0 nor True, and -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)
