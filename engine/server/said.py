"""What a conversation says, before its files are there.

Bodies are read first, in a thread, because they may be long; then the files come, which may take time in other ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..parts import NormalPart, Turn
from .access import Access
from .beside import AT_ONCE, beside

__all__ = ["File", "Said", "SaidPart", "fetched"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class File:
    """A medium whose bytes are not there yet: in base64, or somewhere else.

    Attributes:
        place: where it stands in the body.
        base64: the file itself, or None.
        uri: where it is, or None.
        part: makes a part of its bytes; raises Failure.
    """

    place: str
    base64: str | None = None
    uri: str | None = None
    part: Callable[[bytes], NormalPart]


SaidPart = NormalPart | File
Said = tuple[str, Sequence[SaidPart]]
"""The role of a turn and its parts."""


async def fetched(turns: Sequence[Said], access: Access) -> tuple[Turn, ...]:
    """The turns with their files. Raises Failure for one that is not allowed, or that cannot be had."""
    return tuple([Turn(role, [await _fetched(part, access) for part in parts]) for role, parts in turns])


async def _fetched(part: SaidPart, access: Access) -> NormalPart:
    if not isinstance(part, File):
        return part
    if part.uri is not None:
        data = await access.read(part.uri, part.place)
        return await asyncio.to_thread(part.part, data) if len(data) > AT_ONCE else part.part(data)
    assert part.base64 is not None
    if len(part.base64) <= AT_ONCE:
        return part.part(access.base64(part.base64, part.place))
    return await beside(partial(_decoded, part, part.base64, access))


def _decoded(part: File, text: str, access: Access) -> NormalPart:
    return part.part(access.base64(text, part.place))
