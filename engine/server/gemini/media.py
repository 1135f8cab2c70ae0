"""Media in parts of a Gemini request: what they are, which part of them is seen, and with how many tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...manifest import Manifest
from ...parts import Audio, Image, NormalPart, Pdf, Video
from ...prompt import Text
from ..bodies import Fields
from ..failures import Failure
from ..said import File

__all__ = ["LEVELS", "MAX_FPS", "PART_LEVELS", "budget", "read_file"]

LEVELS = ("MEDIA_RESOLUTION_UNSPECIFIED", "MEDIA_RESOLUTION_LOW", "MEDIA_RESOLUTION_MEDIUM", "MEDIA_RESOLUTION_HIGH")
PART_LEVELS = (*LEVELS, "MEDIA_RESOLUTION_ULTRA_HIGH")
MAX_FPS = 24.0

_TYPE = re.compile(r"([a-z]+)/([a-z0-9.+-]+)((?:\s*;\s*[a-z0-9_-]+=[a-z0-9._-]+)*)")
_RATE = re.compile(r";\s*rate=([0-9]{1,6})(?![0-9])")
_PCM = ("l16", "pcm")
_PCM_RATE = 16_000  # of raw samples whose type does not say
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)s")


def read_file(part: Fields, kind: str, manifest: Manifest, resolution: str | None) -> File:
    """The medium of a part that has inlineData or fileData. `resolution` is the level of one that says nothing."""
    source = part.object(kind)
    assert source is not None
    name = "data" if kind == "inlineData" else "fileUri"
    where = source.text(name)
    if where is None:
        raise source.missing(name)
    source.text("displayName", 1024)  # a label
    family, subtype, parameters = _media_type(source, needed=kind == "inlineData")
    source.finish()
    clip = _clip(part)
    if clip is not None:
        if family not in ("", "video"):
            raise part.failure("videoMetadata", f"goes with a video, not with {family}/{subtype}")
        family = "video"
    tokens = _tokens(part, family, manifest, resolution)
    make = _maker(family, subtype, parameters, tokens, clip or {}, source)
    uri = where if kind == "fileData" else None
    return File(place=source.path(name), base64=None if uri is not None else where, uri=uri, part=make)


def _tokens(part: Fields, family: str, manifest: Manifest, resolution: str | None) -> int | None:
    """The token budget of a medium."""
    own = part.object("mediaResolution")
    seen = family not in ("audio", "text")
    if own is None:
        return budget(manifest, family, resolution) if seen else None
    level = own.choice("level", PART_LEVELS)
    tokens = own.integer("numTokens", 1)
    own.finish()
    if not seen:
        raise part.failure("mediaResolution", "goes with what is seen, not with text or sound")
    if level is not None and tokens is not None:
        raise own.failure("numTokens", "and level exclude each other")
    return budget(manifest, family, level) if tokens is None else tokens


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
