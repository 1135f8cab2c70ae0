"""Files that the command line attaches to a prompt, and what its options want of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .audio import is_sound_source
from .errors import InputError
from .media import is_document, is_moving
from .parts import Audio, Image, PartLike, Pdf, Video
from .prompt import Text

__all__ = ["Attached", "Scene", "attach", "attach_all", "parts_of"]

Attached = Image | Pdf | Video | Audio


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


def parts_of(files: Sequence[str] | None, pages: str | None, scene: Scene, prompt: str) -> list[PartLike]:
    """The files and the question behind them. Raises InputError like `attach_all`."""
    return [*attach_all(files, pages, scene), *([Text(prompt)] if prompt else [])]


def attach_all(files: Sequence[str] | None, pages: str | None, scene: Scene) -> list[Attached]:
    """The files as parts. Raises InputError for an option that is for none of them."""
    attached = [attach(argument, pages, scene) for argument in files or []]
    scene.check(attached)
    if pages is not None and not any(isinstance(part, Pdf) for part in attached):
        raise InputError(f"--pages {pages}: none of the files is a PDF")
    return attached


def attach(argument: str, pages: str | None, scene: Scene) -> Attached:
    """FILE or FILE@BUDGET; a file whose name really ends in @digits is found under its full name."""
    name, separator, budget = argument.rpartition("@")
    has_budget = separator and budget.isdecimal() and not os.path.exists(argument)
    source = name if has_budget else argument
    source = source if source.lower().startswith("data:") else Path(source)
    tokens = int(budget) if has_budget else None
    is_sound = is_sound_source(source)
    if is_sound and tokens is None and not (scene.start is None and scene.end is None):
        return Audio(source, scene.start or 0.0, scene.end)
    if is_moving(source) and not is_sound:
        return Video(source, scene.fps, scene.start, scene.end, tokens, scene.sound)
    return Pdf(source, pages, tokens) if pages is not None and is_document(source) else Image(source, tokens)
