"""What a Gemini request says: its contents and parts as turns of the engine.

A part has one of text, inlineData, fileData, functionCall and functionResponse. Their order is kept. Results of
functions stand in contents of the user there and are turns of their own here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import InputError
from ...manifest import Manifest
from ...parts import Audio, Image, NormalPart, Pdf, Turn, Video
from ...prompt import Text, Thought
from ...tools import ToolCall, ToolResult
from ..access import Access
from ..bodies import Fields
from ..failures import Failure

__all__ = [
    "LEVELS",
    "MAX_FPS",
    "PART_LEVELS",
    "Said",
    "budget",
    "checked",
    "fetched",
    "read_contents",
    "read_system",
    "repeated",
]

LEVELS = ("MEDIA_RESOLUTION_UNSPECIFIED", "MEDIA_RESOLUTION_LOW", "MEDIA_RESOLUTION_MEDIUM", "MEDIA_RESOLUTION_HIGH")
PART_LEVELS = (*LEVELS, "MEDIA_RESOLUTION_ULTRA_HIGH")

_KINDS = ("text", "inlineData", "fileData", "functionCall", "functionResponse")
_ROLES = {"": "user", "user": "user", "model": "assistant", "function": "tool", "tool": "tool"}
_TYPE = re.compile(r"([a-z]+)/([a-z0-9.+-]+)((?:\s*;\s*[a-z0-9_-]+=[a-z0-9._-]+)*)")
_RATE = re.compile(r";\s*rate=([0-9]{1,6})(?![0-9])")
_PCM = ("l16", "pcm")
_PCM_RATE = 16_000  # of raw samples whose type does not say
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)s")
MAX_FPS = 24.0

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """A medium whose bytes are not there yet: in base64, or somewhere else."""

    place: str
    base64: str | None
    uri: str | None
    part: Callable[[bytes], NormalPart]


SaidPart = NormalPart | File
Said = tuple[str, list[SaidPart]]
"""The role of a turn and its parts."""


# --- media that are not there yet


async def fetched(turns: Sequence[Said], access: Access) -> tuple[Turn, ...]:
    """The turns with their files. Raises Failure for one that is not allowed, or that cannot be had."""
    return tuple([Turn(role, [await _fetched(part, access) for part in parts]) for role, parts in turns])


async def _fetched(part: SaidPart, access: Access) -> NormalPart:
    if not isinstance(part, File):
        return part
    if part.uri is not None:
        return part.part(await access.read(part.uri, part.place))
    assert part.base64 is not None
    return part.part(await asyncio.to_thread(access.base64, part.base64, part.place))


# --- contents


def read_contents(body: Fields, manifest: Manifest, resolution: str | None) -> list[Said]:
    """The turns of a request. `resolution` is the level of media that have none of their own. Raises Failure."""
    contents = repeated(body, "contents")
    if contents is None:
        raise body.missing("contents")
    if not contents:
        raise body.failure("contents", "is empty")
    reader = _Reader(manifest, resolution)
    for content in contents:
        reader.read(content)
    return reader.turns


def read_system(body: Fields) -> str | None:
    """The system instruction, whose parts are paragraphs. Google's own clients also take a bare text for it."""
    if isinstance(body.value("systemInstruction"), str):
        return body.text("systemInstruction")
    content = body.object("systemInstruction")
    if content is None:
        return None
    content.text("role", 40)  # Google's clients say "user", which means nothing here
    paragraphs: list[str] = []
    for part in repeated(content, "parts") or ():
        text = part.text("text")
        if text is None:
            raise part.failure("text", "is missing: a system instruction holds text only")
        part.finish()
        paragraphs.append(text)
    content.finish()
    return "\n\n".join(paragraphs)


def repeated(fields: Fields, name: str, most: int | None = None) -> list[Fields] | None:
    """A list of objects; a single one may stand for a list of one, as in many of Google's own examples."""
    if isinstance(fields.value(name), dict):
        only = fields.object(name)
        assert only is not None
        return [only]
    return fields.objects(name, most)


class _Reader:
    """Reads contents in their order; calls and results are matched on the way."""

    def __init__(self, manifest: Manifest, resolution: str | None):
        self.turns: list[Said] = []
        self._manifest = manifest
        self._resolution = resolution
        self._calls: list[tuple[str | None, str] | None] = []  # ids and names of the latest; None has its result
        self._results: list[tuple[int, ToolResult]] = []  # and the calls that they answer

    def read(self, content: Fields) -> None:
        said = content.text("role") or ""
        role = _ROLES.get(said.lower())
        if role is None:
            raise content.failure("role", f"is {said[:40]!r}, expected 'user' or 'model'")
        parts = repeated(content, "parts")
        if parts is None:
            raise content.missing("parts")
        if not parts:
            raise content.failure("parts", "is empty")
        content.finish()
        if role == "assistant" and not self._goes_on(role):
            self._calls, self._results = [], []
        spoken: list[SaidPart] | None = None
        for part in parts:
            kind = _kind(part, role)
            if kind == "functionResponse":
                spoken = None
                self._answer(part)
            else:
                if spoken is None:
                    spoken = []
                    self.turns.append((role, spoken))
                spoken.append(self._part(part, kind, role))
            part.finish()

    def _goes_on(self, role: str) -> bool:
        return bool(self.turns) and self.turns[-1][0] == role

    def _answer(self, part: Fields) -> None:
        """Add a result. Those of one turn stand in the order of the calls that they answer, because the engine goes by
        name and order."""
        id, result = _result(part)
        index = next(
            (
                index
                for index, call in enumerate(self._calls)
                if call is not None and call[1] == result.name and id in (None, call[0])
            ),
            None,
        )
        if index is None:
            which = f"{result.name!r}" if id is None else f"{result.name!r} with the id {id[:40]!r}"
            raise part.failure("functionResponse", f"answers no call of the turn before it: {which}")
        self._calls[index] = None
        if not self._goes_on("tool"):
            self._results = []
            self.turns.append(("tool", []))
        self._results.append((index, result))
        self._results.sort(key=lambda answer: answer[0])
        self.turns[-1][1][:] = [answer for _, answer in self._results]

    def _part(self, part: Fields, kind: str, role: str) -> SaidPart:
        if kind == "functionCall":
            id, call = _call(part)
            self._calls.append((id, call.name))
            return call
        if kind == "text":
            text = part.text("text") or ""
            if not part.flag("thought"):
                return Text(text)
            if role != "assistant":
                raise part.failure("thought", "is true, but only the model has thoughts")
            return Thought(text)
        if part.flag("thought"):
            raise part.failure("thought", "is true, but a thought is text")
        return self._file(part, kind)

    # --- media

    def _file(self, part: Fields, kind: str) -> File:
        source = part.object(kind)
        assert source is not None
        name = "data" if kind == "inlineData" else "fileUri"
        where = source.text(name)
        if where is None:
            raise source.missing(name)
        family, subtype, parameters = _media_type(source, needed=kind == "inlineData")
        source.finish()
        clip = _clip(part)
        if clip is not None:
            if family not in ("", "video"):
                raise part.failure("videoMetadata", f"goes with a video, not with {family}/{subtype}")
            family = "video"
        tokens = self._tokens(part, family)
        make = _maker(family, subtype, parameters, tokens, clip or {}, source)
        uri = where if kind == "fileData" else None
        return File(source.path(name), None if uri is not None else where, uri, make)

    def _tokens(self, part: Fields, family: str) -> int | None:
        """The token budget of a medium."""
        own = part.object("mediaResolution")
        seen = family not in ("audio", "text")
        if own is None:
            return budget(self._manifest, family, self._resolution) if seen else None
        level = own.choice("level", PART_LEVELS)
        tokens = own.integer("numTokens", 1)
        own.finish()
        if not seen:
            raise part.failure("mediaResolution", "goes with what is seen, not with text or sound")
        if level is not None and tokens is not None:
            raise own.failure("numTokens", "and level exclude each other")
        return budget(self._manifest, family, level) if tokens is None else tokens


def budget(manifest: Manifest, family: str, level: str | None) -> int | None:
    """The token budget of a level: LOW is the smallest that the bundle has, MEDIUM its default, HIGH the next above
    that and ULTRA_HIGH the largest. None is the default too, or a bundle that sees nothing of this kind."""
    facts = manifest.video if family == "video" else manifest.image
    if facts is None or level is None:
        return None
    above = [tokens for tokens in facts.budgets if tokens > facts.default_budget]
    return {
        "LOW": facts.budgets[0],
        "MEDIUM": facts.default_budget,
        "HIGH": above[0] if above else facts.default_budget,
        "ULTRA_HIGH": facts.budgets[-1],
    }.get(level.removeprefix("MEDIA_RESOLUTION_"))


def _kind(part: Fields, role: str) -> str:
    """The one kind of data that a part has, if it may stand in content of this role."""
    kinds = [kind for kind in _KINDS if kind in part]
    if not kinds:
        part.finish()  # names what is there instead
        raise Failure(400, f"{part.place} has no data: expected one of {', '.join(_KINDS)}", field=part.place)
    if len(kinds) > 1:
        raise part.failure(kinds[1], f"and {kinds[0]} exclude each other")
    kind = kinds[0]
    wrong = {
        "user": kind == "functionCall",
        "assistant": kind == "functionResponse",
        "tool": kind != "functionResponse",
    }
    if wrong[role]:
        raise part.failure(kind, f"does not go with the role of {part.place.rpartition('.parts')[0]}")
    return kind


def _media_type(source: Fields, *, needed: bool) -> tuple[str, str, str]:
    """Family, subtype and parameters of a media type in lower case; all "" if there is none and none is needed."""
    text = source.text("mimeType", 200)
    if text is None:
        if needed:
            raise source.missing("mimeType")
        return "", "", ""
    match = _TYPE.fullmatch(text.strip().lower())
    if match is None:
        raise source.failure("mimeType", f"is {text[:60]!r}, which is no media type")
    return match[1], match[2], match[3]


def _maker(
    family: str, subtype: str, parameters: str, tokens: int | None, clip: dict[str, Any], source: Fields
) -> Callable[[bytes], NormalPart]:
    """What makes a part of the bytes of a file of this type. Without a type its content says what it is."""
    if family == "video":
        return lambda data: Video(data, tokens=tokens, **clip)
    if family in ("image", ""):
        return lambda data: Image(data, tokens=tokens)
    if (family, subtype) in (("application", "pdf"), ("application", "x-pdf")):
        return lambda data: Pdf(data, tokens=tokens)
    if family == "audio":
        rate = _RATE.search(parameters)
        raw = int(rate[1]) if rate else _PCM_RATE
        return lambda data: Audio(data, sample_rate=raw if subtype in _PCM else None)
    if family == "text":
        return lambda data: _decoded(data, source)
    known = "image/*, application/pdf, video/*, audio/*, text/*"
    raise source.failure("mimeType", f"is {f'{family}/{subtype}'[:60]!r}, expected one of {known}")


def _decoded(data: bytes, source: Fields) -> Text:
    try:
        return Text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Failure(
            400, f"{source.place} is not UTF-8 at byte {error.start}: text is taken in UTF-8 only", field=source.place
        ) from None


def _clip(part: Fields) -> dict[str, Any] | None:
    """Which part of a video is seen, and how many frames of it."""
    video = part.object("videoMetadata")
    if video is None:
        return None
    clip = {"start": _seconds(video, "startOffset"), "end": _seconds(video, "endOffset")}
    fps = video.number("fps", 0, MAX_FPS)
    if fps == 0:
        raise video.failure("fps", f"is 0, it must be above 0 and at most {MAX_FPS}")
    video.finish()
    return clip | {"fps": fps}


def _seconds(fields: Fields, name: str) -> float | None:
    """A duration: "1.5s", or its seconds and nanoseconds in an object."""
    if isinstance(fields.value(name), dict):
        duration = fields.object(name)
        assert duration is not None
        seconds, nanoseconds = duration.integer("seconds", 0, 10**12), duration.integer("nanos", 0, 999_999_999)
        duration.finish()
        return (seconds or 0) + (nanoseconds or 0) / 1e9
    text = fields.text(name, 60)
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise fields.failure(name, f"is {text[:40]!r}, expected seconds such as '1.5s'")
    return float(match[1])


# --- functions


def _call(part: Fields) -> tuple[str | None, ToolCall]:
    """The id of a call, and the call."""
    call = part.object("functionCall")
    assert call is not None
    id, name = call.text("id", 200), call.text("name")
    if name is None:
        raise call.missing("name")
    arguments = call.value("args")
    if not isinstance(arguments, dict | None):
        call.object("args")  # says what is wrong
    call.finish()
    return id, checked(call.place, lambda: ToolCall(name, arguments or {}))


def _result(part: Fields) -> tuple[str | None, ToolResult]:
    """The id of the call that a result answers, and the result."""
    response = part.object("functionResponse")
    assert response is not None
    id, name = response.text("id", 200), response.text("name")
    if name is None:
        raise response.missing("name")
    if response.object("response") is None:
        raise response.missing("response")
    result = response.value("response")
    response.finish()
    return id, checked(response.place, lambda: ToolResult(name, result))


def checked(place: str, make: Callable[[], _Value]) -> _Value:
    """What `make` makes; what the engine says against it becomes a Failure that names the place."""
    try:
        return make()
    except InputError as error:
        raise Failure(400, f"{place}: {error}", field=place) from None
