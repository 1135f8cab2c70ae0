"""Function calling: what a tool is, a call and a result, each checked to be JSON when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PromptError

__all__ = [
    "MAX_DEPTH",
    "NAME",
    "MalformedCall",
    "Tool",
    "ToolCall",
    "ToolLike",
    "ToolResult",
    "key_order",
    "read_tools",
    "strings",
    "swapped",
]

MAX_DEPTH = 64
"""Objects and lists inside one another."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,127}")
_NAME_RULE = "a letter or _, then up to 127 letters, digits or any of _ . : / -"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for.

    `parameters` is a JSON schema of type "object", or None for a function without any. Calls of a `strict` tool are
    held to it, see `call_grammar`. Raises PromptError for a name that cannot be written, and for what is no JSON.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        _check_name("tool", self.name)
        if not isinstance(self.description, str):
            raise PromptError(f"tool {self.name}: the description is {type(self.description).__name__}, expected text")
        _as_json(self.description, f"tool {self.name}: description")
        if not isinstance(self.strict, bool):
            raise PromptError(f"tool {self.name}: strict is {self.strict!r}, expected True or False")
        if self.parameters is None:
            return
        where = f"tool {self.name}: parameters"
        schema = _as_json(self.parameters, where)
        if not isinstance(schema, dict):
            raise PromptError(f"{where}: expected a JSON schema, not {type(self.parameters).__name__}")
        kind = schema.setdefault("type", "object")
        if not isinstance(kind, str) or kind.lower() != "object":
            raise PromptError(f"{where}: a function takes an object, the schema is of type {kind!r}")
        object.__setattr__(self, "parameters", schema)

    def declaration(self) -> dict[str, Any]:
        """The declaration in OpenAI's form, as chat templates read it: they know nothing of `strict`."""
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


ToolLike = Tool | Mapping[str, Any]
"""A tool, a declaration of OpenAI's API, or the function object inside of one."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model asks for a function: its name and its arguments, a JSON object.

    Raises PromptError for a name that cannot be written and for arguments that are no JSON object.
    """

    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_name("call", self.name)
        arguments = _as_json(self.arguments, f"call of {self.name}: arguments")
        if not isinstance(arguments, dict):
            raise PromptError(f"call of {self.name}: the arguments are {type(self.arguments).__name__}, not an object")
        object.__setattr__(self, "arguments", arguments)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a function returned: any JSON value. The results of a turn answer the calls of the turn before by name.

    Raises PromptError for a name that cannot be written and for what is no JSON.
    """

    name: str
    result: Any

    def __post_init__(self) -> None:
        _check_name("result", self.name)
        object.__setattr__(self, "result", _as_json(self.result, f"result of {self.name}"))

    @property
    def fields(self) -> dict[str, Any]:
        """The result as an object: one that is none stands under "value", as templates write it."""
        return self.result if isinstance(self.result, dict) else {"value": self.result}


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """A call that cannot be read: its text, quote tokens as `"`, and the reason."""

    text: str
    reason: str


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Tools in one form, from a list of `ToolLike`.

    Raises PromptError for anything else, and for two of one name.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise PromptError(f"tools is {type(tools).__name__}, expected a list of declarations")
    read = tuple(tool if isinstance(tool, Tool) else _read_tool(tool, index) for index, tool in enumerate(tools))
    seen: set[str] = set()
    for tool in read:
        if tool.name in seen:
            raise PromptError(f"two tools have the name {tool.name!r}")
        seen.add(tool.name)
    return read


def _read_tool(value: Any, index: int) -> Tool:
    where = f"tool {index}"
    if not isinstance(value, Mapping):
        raise PromptError(f"{where}: expected a declaration, not {type(value).__name__}")
    if "function" in value:
        _check_keys(value, ("type", "function"), where)
        if value.get("type", "function") != "function":
            raise PromptError(f"{where}: it is of type {value['type']!r}, only 'function' is known")
        value = value["function"]
        if not isinstance(value, Mapping):
            raise PromptError(f"{where}: its function is {type(value).__name__}, expected an object")
    _check_keys(value, ("name", "description", "parameters", "strict"), where)
    if "name" not in value:
        raise PromptError(f"{where}: it has no name")
    return Tool(value["name"], value.get("description") or "", value.get("parameters"), value.get("strict") or False)


def _check_keys(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise PromptError(f"{where}: the key {unknown!r} is not supported (known: {', '.join(known)})")


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PromptError(f"{what}: the name is {name!r}, expected {_NAME_RULE}")


def _as_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a JSON value, with plain dicts and lists. Raises PromptError naming the place of what is none."""
    if value is None or isinstance(value, (bool, str)):
        if isinstance(value, str):
            _check_unicode(value, where)
        return value
    if isinstance(value, int):
        return _checked_integer(value, where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PromptError(f"{where}: {value} is no JSON number")
        return value
    if not isinstance(value, (Mapping, list, tuple)):
        raise PromptError(f"{where}: a value of type {type(value).__name__} is no JSON")
    if depth == MAX_DEPTH:
        raise PromptError(f"{where}: more than {MAX_DEPTH} objects and lists inside one another")
    if not isinstance(value, Mapping):
        return [_as_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    for key in value:
        if not isinstance(key, str):
            raise PromptError(f"{where}: the key {key!r} is {type(key).__name__}, expected text")
        _check_unicode(key, where)
    return {key: _as_json(item, f"{where}.{key}", depth + 1) for key, item in value.items()}


def _checked_integer(value: int, where: str) -> int:
    try:
        str(value)
    except ValueError:  # Python's limit, 4,300 digits
        raise PromptError(f"{where}: an integer of {value.bit_length()} bits is too long") from None
    return int(value)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: not valid Unicode at character {error.start}") from None


def swapped(value: Any, swap: Callable[[str], str]) -> Any:
    """A JSON value with `swap` applied to its strings and keys; keys in the order in which they are written."""
    if isinstance(value, str):
        return swap(value)
    if isinstance(value, list):
        return [swapped(item, swap) for item in value]
    if isinstance(value, dict):
        return {swap(key): swapped(value[key], swap) for key in sorted(value, key=key_order)}
    return value


def strings(value: Any) -> Iterator[str]:
    """All strings and keys inside of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from strings(item)


def key_order(key: str) -> tuple[str, str]:
    """Jinja's `dictsort` does not tell upper from lower case."""
    return key.lower(), key
