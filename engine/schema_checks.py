"""JSON schemas that llguidance accepts and should not: checked before it sees them.

They come from outside, so the work is bounded, and nothing here is recursive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from .errors import GrammarError

__all__ = ["check_numbers", "patterns_beside_names"]

_MAX_MULTIPLE = 100_000  # half a second
_MAX_PATTERN_WORK = 10_000  # patterns times names beside them: a second


def check_numbers(schema: Any) -> None:
    """Raise GrammarError for a JSON schema with numbers that llguidance accepts and should not."""
    _check_multiples(schema)
    _check_bounds(schema)


def _check_multiples(schema: Any) -> None:
    """Refuse "multipleOf" with large numbers: llguidance's automaton has a state per remainder, and no limit on them.

    Values that meet in one place make their least common multiple. Powers of ten only look at the last digits.
    """
    together = 1
    for value in _values_of("multipleOf", schema):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            continue  # llguidance says what is wrong with it
        digits = "".join(map(str, Decimal(str(value)).as_tuple().digits)).rstrip("0")
        together = math.lcm(together, int(digits))
        if together > _MAX_MULTIPLE:
            raise GrammarError(
                f"the JSON schema cannot be used: with {value} the values of 'multipleOf' have a least common multiple "
                f"above {_MAX_MULTIPLE} (without zeros at the end)"
            )


def _check_bounds(schema: Any) -> None:
    """Refuse bounds beyond 64 bits: llguidance moves them to where 64 bits end, and so allows what they forbid."""
    beyond: dict[str, Callable[[float], bool]] = {
        **dict.fromkeys(("minimum", "exclusiveMinimum"), lambda value: value >= 2**63),
        **dict.fromkeys(("maximum", "exclusiveMaximum"), lambda value: value < -(2**63)),
    }
    for key, is_beyond in beyond.items():
        for value in _values_of(key, schema):
            if isinstance(value, int | float) and is_beyond(value):
                raise GrammarError(f"the JSON schema cannot be used: {key!r} is {value}, which has more than 64 bits")


def patterns_beside_names(schema: Any) -> Iterator[tuple[list[str], str]]:
    """Each pattern of "patternProperties", with the names that are declared beside it, if any are."""
    work = 0
    for holder in _objects(schema):
        names, patterns = holder.get("properties"), holder.get("patternProperties")
        if isinstance(names, dict) and names and isinstance(patterns, dict):
            work += len(names) * len(patterns)
            if work > _MAX_PATTERN_WORK:
                raise GrammarError("the JSON schema cannot be used: too many 'patternProperties' beside 'properties'")
            yield from ((list(names), pattern) for pattern in patterns)


def _values_of(key: str, value: Any) -> Iterator[Any]:
    """All values of `key` anywhere in a JSON value."""
    return (holder[key] for holder in _objects(value) if key in holder)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value; not recursive, because schemas may be nested deeply."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
