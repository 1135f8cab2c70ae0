"""What a caller may put into a prompt, made one form at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import PIL.Image

from .audio import AudioSource
from .errors import PromptError
from .image import ImageSource
from .prompt import Text, Thought
from .reply import Candidate, EncodedImage, EncodedSound, EncodedVideo, Reply
from .sources import FileSource
from .tools import ToolCall, ToolResult

__all__ = [
    "Audio",
    "AudioInput",
    "Conversation",
    "Image",
    "ImageInput",
    "NormalPart",
    "PartLike",
    "Pdf",
    "Turn",
    "TurnPart",
    "Video",
    "Words",
    "turns_of",
]

# A text that is one line ending in one of these is taken for the path of a file; `Text(...)` says that it is not. Names
# of formats that are not read are among them: their refusal says more than an answer about the name would.
_FILE_NAME = re.compile(
    r"[^\n]*\.(a?png|jpe?g|jfif|mpo|webp|gif|bmp|dib|tiff?|p[bgnp]m|ico|cur|icns|avif|heic|heif|jxl|jp2|j2k|jpx|tga|psd"
    r"|qoi|dds|pcx|sgi|svg|pdf|wave?|w64|mp3|mpga|flac|aac|m4[ab]|og[ga]|opus|weba|aif[fc]?|caf|amr|au|pcm|wma|midi?)",
    re.IGNORECASE,
)
_VIDEO_NAME = re.compile(
    r"[^\n]*\.(mp4|m4v|mov|qt|mpe?g|mpe|m[12]v|vob|m?ts|m2ts|avi|divx|wmv|asf|flv|f4v|webm|mkv|3gpp?|3g2|ogv)",
    re.IGNORECASE,
)
_FILE_URI = re.compile(r"\s*data:\s*(image/|video/|audio/|application/(x-)?pdf)", re.IGNORECASE)
_VIDEO_URI = re.compile(r"\s*data:\s*video/", re.IGNORECASE)


def _shown(value: object) -> str:
    """A value of a part, short: a log or a notebook is no place for the bytes of a file."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{value.nbytes if isinstance(value, memoryview) else len(value)} bytes>"
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {list(value.shape)}>"
    return repr(value[:79] + "\N{HORIZONTAL ELLIPSIS}" if isinstance(value, str) and len(value) > 500 else value)


def _described(self: Any) -> str:
    """The representation of a part."""
    values = ", ".join(f"{field.name}={_shown(getattr(self, field.name))}" for field in fields(self))
    return f"{type(self).__name__}({values})"


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture with a token budget of its own. `tokens=None` takes the budget of the request.

    A source whose content turns out to be a PDF is read as `Pdf(source, tokens=tokens)`, a video as
    `Video(source, tokens=tokens)`, and one that is a sound as `Audio(source)`.
    """

    source: ImageSource
    tokens: int | None = None

    __repr__ = _described


@dataclass(frozen=True, slots=True, eq=False)
class Pdf:
    """Pages of a PDF, each of which becomes one picture, in order.

    Attributes:
        source: a path, the bytes, a binary file object or a data URI.
        pages: page numbers counted from 1: "3", "1-3", "1-3, 7", a number, or numbers such as range(1, 4). None is all.
        tokens: token budget of each page; None takes the budget of the request.
    """

    source: FileSource
    pages: str | int | Sequence[int] | None = None
    tokens: int | None = None

    __repr__ = _described


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Frames of a video, each of which the model sees as a small picture with its time in front of it.

    Attributes:
        source: a path, the bytes, a binary file object or a data URI. A path is read twice, and nothing of the file is
            held in memory.
        fps: frames for each second; None is the bundle's default (1). More frames than `Limits.max_frames` (60) are
            thinned evenly.
        start: seconds from the first frame of the file; None is the beginning.
        end: seconds from the first frame of the file, not included; None is the end.
        tokens: token budget of each frame; None is the bundle's default for frames (70), whatever the request says
            about images.
        sound: whether the model hears it too. The video then becomes several, one for each clip of sound that the model
            can hear at once (30 s), each followed by its sound.
    """

    source: FileSource
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    tokens: int | None = None
    sound: bool = False

    __repr__ = _described


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """A sound, or the sound of a video.

    Attributes:
        source: a path, the bytes, a binary file object or a data URI of a file; or samples as a numpy array [n],
            [n, channels] or [channels, n], floating point in -1..1 or integers.
        start, end: the part that is heard, in seconds from the first sample; None is the end.
        split: a sound that is longer than the model hears at once becomes several, one after another, all of about the
            same length. Otherwise it is refused.
        sample_rate: samples a second of an array, which must have it; with a file it says that the file is raw PCM, 16
            bits a sample, low byte first, one channel. Other files say it themselves.
    """

    source: AudioSource
    start: float = 0.0
    end: float | None = None
    split: bool = False
    sample_rate: int | None = None

    __repr__ = _described


ImageInput = Image | ImageSource | EncodedImage
AudioInput = Audio | EncodedSound
PartLike = Text | Pdf | Video | EncodedVideo | ImageInput | AudioInput
"""A part of a prompt. A plain `str` is text, unless it is a data URI of a picture, a sound, a PDF or a video, or one
line that ends like the name of such a file; wrap text that you did not write yourself in `Text` so that it can never
name a file."""

Conversation = PartLike | Sequence["PartLike | Turn"]
"""A part, a list of parts (one user turn) or a list of turns; not a list of both."""
# One type of sequence and not two: mypy cannot tell which of two a list of a picture and a text is meant for.


TurnPart = PartLike | Thought | ToolCall | ToolResult
"""A part of a turn: of the assistant also a thought or a call, of a tool a result and nothing else."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: `role` is "system", "user", "assistant" or "tool".

    A turn of the assistant that calls tools ends in its calls, and the turn behind it has a result for each of them.
    """

    role: str
    parts: TurnPart | Sequence[TurnPart]

    @classmethod
    def of(cls, reply: Reply | Candidate) -> Turn:
        """What the assistant has said, as the next request takes it.

        The thought belongs to it only if it led to calls: until these are answered the turn goes on, and thoughts of
        turns that are over are forgotten.
        """
        candidate = reply.candidates[0] if isinstance(reply, Reply) else reply
        said: list[TurnPart] = [Text(candidate.text)] if candidate.text or not candidate.tool_calls else []
        if candidate.tool_calls and candidate.thought:
            said.append(Thought(candidate.thought))
        return cls("assistant", [*said, *candidate.tool_calls])


Words = Text | Thought | ToolCall | ToolResult
"""What of a turn is no medium."""

NormalPart = Words | Image | Pdf | Video | Audio | EncodedImage | EncodedVideo | EncodedSound


def turns_of(conversation: Conversation, system: str | None) -> list[tuple[str, list[NormalPart]]]:
    """(role, parts) of every turn. A bare part or a list of parts is one user turn; `system` becomes the first turn."""
    if not isinstance(system, str | None):
        raise PromptError(f"system is {type(system).__name__}, expected text")
    listed = _as_list(conversation)
    if listed and all(isinstance(item, Turn) for item in listed):
        turns = [(turn.role, _normal_parts(_as_list(turn.parts))) for turn in listed]
    elif any(isinstance(item, Turn) for item in listed):
        raise PromptError("a conversation is a list of parts or a list of turns, not a mixture")
    else:
        turns = [("user", _normal_parts(listed))]
    return [("system", [Text(system)]), *turns] if system is not None else turns


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _normal_parts(parts: list[Any]) -> list[NormalPart]:
    return [_normal_part(part, index) for index, part in enumerate(parts)]


def _normal_part(part: Any, index: int) -> NormalPart:
    if isinstance(part, NormalPart):
        return part
    if isinstance(part, str):
        if _VIDEO_NAME.fullmatch(part) or _VIDEO_URI.match(part):
            return Video(part)
        return Image(part) if _FILE_NAME.fullmatch(part) or _FILE_URI.match(part) else Text(part)
    if isinstance(part, (os.PathLike, bytes, bytearray, memoryview, PIL.Image.Image, np.ndarray)) or hasattr(
        part, "read"
    ):
        return Image(part)
    hint = ""
    if isinstance(part, Mapping):
        hint = ": a message is Turn(role, parts)"
    elif isinstance(part, Iterable):
        hint = ": several parts are one list"
    raise PromptError(
        f"part {index} is of type {type(part).__name__}, expected text, a picture, a sound, a PDF or a video{hint}"
    )
