"""JSON read strictly into dataclasses: a key that is unknown or missing, or another type, is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from .errors import BundleError

__all__ = ["build", "unique_keys"]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `json.loads` that raises ValueError for a key that occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return values


def build(kind: Any, value: Any, file: str, where: str = "") -> Any:
    """Convert parsed JSON to `kind`, which is a dataclass, a container of one, or a scalar type.

    Raises BundleError naming `file` and the key for anything missing, unknown or of the wrong type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, file, where)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else build(arguments[0], value, file, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{file}: '{where}' must be a list, not {type(value).__name__}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise BundleError(f"{file}: '{where}' must have {len(arguments)} items, not {len(value)}")
        return tuple(build(arguments[0], item, file, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{file}: '{where}' must be an object, not {type(value).__name__}")
        return {key: build(arguments[1], item, file, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise BundleError(f"{file}: '{where}' must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def _build_dataclass(kind: type, value: Any, file: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{file}: '{where}' must be an object, not {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise BundleError(f"{file}: unknown key '{prefix}{key}' (known here: {', '.join(hints)})")
    for key in hints:
        if key not in value:
            raise BundleError(f"{file}: missing key '{prefix}{key}'")
    return kind(**{key: build(hints[key], value[key], file, prefix + key) for key in hints})
