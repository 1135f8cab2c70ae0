"""What a caller may put into a prompt, made one form at once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from .errors import PromptError
from .image import ImageSource
from .prompt import Text
from .reply import EncodedImage

__all__ = ["Conversation", "Image", "ImageInput", "PartLike", "Turn", "turns_of"]

# A text that is one line ending in one of these is taken for the path of a picture; `Text(...)` says that it is not.
_PICTURE_NAME = re.compile(r"[^\n]*\.(png|jpe?g|webp|gif|bmp|tiff?|ppm|ico|avif)", re.IGNORECASE)
_DATA_URI = re.compile(r"\s*data:", re.IGNORECASE)
_IMAGE_URI = re.compile(r"data:image/", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A picture with a token budget of its own. `tokens=None` takes the budget of the request."""

    source: ImageSource
    tokens: int | None = None

    @property
    def file_name(self) -> str:
        """What to call the picture in messages: the name of its file, "" for a picture that is none."""
        if not isinstance(self.source, (str, os.PathLike)) or _DATA_URI.match(str(self.source)):
            return ""
        return os.path.basename(os.fsdecode(self.source))[-100:]


ImageInput = Image | ImageSource | EncodedImage
PartLike = Text | ImageInput
"""A part of a prompt. A plain `str` is text, unless it is a data URI of an image or one line that ends like the name
of a picture file; wrap text that you did not write yourself in `Text` so that it can never name a file."""

Conversation = PartLike | Sequence[PartLike] | Sequence["Turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: `role` is "system", "user" or "assistant"."""

    role: str
    parts: PartLike | Sequence[PartLike]


NormalPart = Text | Image | EncodedImage


def turns_of(conversation: Conversation, system: str | None) -> list[tuple[str, list[NormalPart]]]:
    """(role, parts) of every turn. A bare part or a list of parts is one user turn; `system` becomes the first turn."""
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
    if isinstance(part, (Text, Image, EncodedImage)):
        return part
    if isinstance(part, str):
        return Image(part) if _PICTURE_NAME.fullmatch(part) or _IMAGE_URI.match(part) else Text(part)
    if isinstance(part, (os.PathLike, bytes, bytearray, memoryview, PIL.Image.Image, np.ndarray)) or hasattr(
        part, "read"
    ):
        return Image(part)
    raise PromptError(f"part {index} is of type {type(part).__name__}, expected text or a picture")
