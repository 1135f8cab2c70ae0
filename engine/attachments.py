"""Files that the command line attaches to a prompt, and what its options want of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .audio import is_sound_source
from .errors import InputError
from .limits import DEFAULT_LIMITS, Limits
from .media import is_document, is_moving
from .parts import Audio, Image, PartLike, Pdf, Video, turns_of
from .prompt import Text
from .sources import read_source

__all__ = ["Attached", "Scene", "attach", "attach_all", "named_files", "parts_of", "unseen"]

Attached = Image | Pdf | Video | Audio

_WORDS = 200  # of a text that are looked at


@dataclass(frozen=True, slots=True)
class Scene:
    """What is wanted of videos, and which part of sounds."""

    fps: float | None = None
    start: float | None = None
    end: float | None = None
    sound: bool = False

    def __str__(self) -> str:
        given = {"--fps": self.fps, "--start": self.start, "--end": self.end}
        options = [f"{name} {value:g}" for name, value in given.items() if value is not None]
        return " ".join([*options, *(["--sound"] if self.sound else [])])

    def check(self, attached: Sequence[Attached]) -> None:
        """Raise InputError if an option is for none of the files."""
        if (self.fps is not None or self.sound) and not any(isinstance(part, Video) for part in attached):
            raise InputError(f"{self}: none of the files is a video")
        if str(self) and not any(isinstance(part, Video | Audio) for part in attached):
            raise InputError(f"{self}: none of the files is a video or a sound")


def parts_of(attached: Sequence[Attached], prompt: str) -> list[PartLike]:
    """The files and the question behind them."""
    return [*attached, *([Text(prompt)] if prompt else [])]


def attach_all(
    files: Sequence[str] | None, pages: str | None, scene: Scene, limits: Limits = DEFAULT_LIMITS
) -> list[Attached]:
    """The files as parts; "-" is what is piped into the program.

    Raises InputError for an option that is for none of them, and for a pipe that gives too much.
    """
    piped = getattr(sys.stdin, "buffer", None)  # a program may run this one with another kind of object
    attached = [attach(argument, pages, scene, limits, piped) for argument in files or []]
    scene.check(attached)
    if pages is not None and not any(isinstance(part, Pdf) for part in attached):
        raise InputError(f"--pages {pages}: none of the files is a PDF")
    return attached


def named_files(text: str) -> list[str]:
    """Pictures, sounds and other media that a text names and that exist: people expect that the model sees them."""
    named: list[str] = []
    for word in text.split(None, _WORDS)[:_WORDS]:
        name = word.lstrip("'\"`([<").rstrip("'\"`)]>,.;:!?")
        [(_, [part])] = turns_of(name, None)
        if isinstance(part, Image | Video) and part.source == name and os.path.isfile(name) and name not in named:
            named.append(name)
    return named


def unseen(prompt: str) -> list[str]:
    """Remarks on files that a prompt names and nothing shows to the model."""
    return [f"the model does not see the file {name}: -i {name} shows it" for name in named_files(prompt)]


def attach(
    argument: str, pages: str | None, scene: Scene, limits: Limits = DEFAULT_LIMITS, piped: BinaryIO | None = None
) -> Attached:
    """FILE or FILE@BUDGET; a file whose name really ends in @digits is found under its full name.

    What can be read only once, a pipe or `piped` under the name "-", is read here: its content says what it is, and
    --draw needs it again. Raises InputError.
    """
    name, separator, budget = argument.rpartition("@")
    has_budget = separator and budget.isdecimal() and not os.path.exists(argument)
    source = name if has_budget else argument
    source = source if source.lower().startswith("data:") else _opened(source, limits, piped)
    tokens = int(budget) if has_budget else None
    is_sound = is_sound_source(source)
    if is_sound and tokens is None and not (scene.start is None and scene.end is None):
        return Audio(source, scene.start or 0.0, scene.end)
    if is_moving(source) and not is_sound:
        return Video(source, scene.fps, scene.start, scene.end, tokens, scene.sound)
    return Pdf(source, pages, tokens) if pages is not None and is_document(source) else Image(source, tokens)


def _opened(name: str, limits: Limits, piped: BinaryIO | None) -> Path | bytes:
    path = Path(name)
    source = piped if name == "-" and piped is not None else path
    if source is path and (not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)):
        return path
    try:
        return read_source(source, limits.max_bytes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
