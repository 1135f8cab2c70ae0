"""Long texts of a JSON body, which are files in base64 mostly: taken out before it is parsed, put back afterwards.

Python's parser looks at every character while no other thread runs, the event loop included: 25 ms for 22 MB. A text
without a backslash is what stands between its quotes, and those are found a hundred times faster.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["put_back", "take_out"]

_LONG = 2**16  # bytes
_BEGINNING = re.compile(rb"[A-Za-z0-9+/_-]")
_BEHIND = re.compile(rb"[ \t\r\n]{0,64}[,\]}]")


def take_out(body: bytes | bytearray) -> tuple[bytes, dict[str, str]]:
    """A body with a name for each of its long texts, and these texts by name.

    Only texts that are values, begin like base64 and have neither escapes nor control characters are taken out. The
    rest is JSON if and only if the body is; where the two are not, they are wrong at different places.

    Raises UnicodeDecodeError for a text that is not UTF-8.
    """
    texts: dict[str, str] = {}
    rest: list[memoryview | bytes] = []
    whole, secret, kept, start = memoryview(body), secrets.token_hex(16), 0, 0
    while start + _LONG <= len(body):
        last = body.rfind(b'"', start, start + _LONG)
        if last >= 0:
            start = last + 1
            continue
        end = body.find(b'"', start + _LONG)
        if end < 0:
            break
        if _is_value(body, start, end):
            name = f"{secret}-{len(texts)}"
            texts[name] = _decoded(whole, start, end)
            rest += [whole[kept:start], name.encode()]
            kept = end
        start = end + 1
    return b"".join([*rest, whole[kept:]]), texts


def _is_value(body: bytes | bytearray, start: int, end: int) -> bool:
    """Whether `body[start:end]`, which has no quotes but one behind it, is the whole text of a value.

    What stands between two texts begins with a comma, a colon, a bracket or white space; a name has a colon behind it.
    """
    return (
        body[max(start - 2, 0) : start] not in (b"", b'\\"')
        and body[start - 1 : start] == b'"'
        and _BEGINNING.match(body, start) is not None
        and _BEHIND.match(body, end + 1) is not None
        and body.find(b"\\", start, end) < 0
        and int(np.frombuffer(body, np.uint8, end - start, start).min()) >= 0x20
    )


def _decoded(whole: memoryview, start: int, end: int) -> str:
    try:
        return str(whole[start:end], "utf-8")
    except UnicodeDecodeError as error:
        raise UnicodeDecodeError(
            error.encoding, error.object, start + error.start, start + error.end, error.reason
        ) from None


def put_back(value: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Put the texts that were taken out where their names stand."""
    waiting: list[Any] = [value] if texts else []
    while waiting:
        item = waiting.pop()
        for key, inner in item.items() if isinstance(item, dict) else enumerate(item):
            if isinstance(inner, dict | list):
                waiting.append(inner)
            elif isinstance(inner, str) and inner in texts:
                item[key] = texts[inner]
